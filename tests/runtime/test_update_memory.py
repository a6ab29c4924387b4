"""Memory of the optimizers' step, by a few of the models that are alike."""

from dataclasses import replace

import pytest

from cgo.graph import TensorType
from cgo.model import TrainingSpec
from cgo.runtime import update_memory
from cgo.runtime.packing import Pack
from cgo.runtime.rehearsal import rehearse_update
from cgo.runtime.update_memory import update_held

SHAPES = {"w": (512, 64), "b": (64,)}


def company(count, optimizer="Adam", shapes=SHAPES, letter="m"):
    """Types, places that learn, packs and trainings of models that are alike."""
    models = [f"{letter}{number:02}" for number in range(count)]
    types = {
        (m, path): TensorType("float32", shape) for m in models for path, shape in shapes.items()
    }
    packs = [
        Pack(tuple(f"{m}.{path}" for m in models), tuple((m, path) for m in models), True)
        for path in shapes
    ]
    trainings = {
        m: TrainingSpec(optimizer=optimizer, optimizer_kwargs={"lr": 0.1 + 0.001 * number})
        for number, m in enumerate(models)
    }
    return types, frozenset(types), packs, trainings


def joined(*companies):
    types, learning, packs, trainings = {}, frozenset(), [], {}
    for one in companies:
        types |= one[0]
        learning |= one[1]
        packs += one[2]
        trainings |= one[3]
    return types, learning, packs, trainings


@pytest.fixture
def sizes(monkeypatch):
    """Numbers of models that are rehearsed together."""
    found = []

    def watched(types, learning, packs, trainings, *rest):
        found.append(len(trainings))
        return rehearse_update(types, learning, packs, trainings, *rest)

    monkeypatch.setattr(update_memory, "rehearse_update", watched)
    return found


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
def test_a_few_stand_for_all_that_are_alike(optimizer, device_type, sizes):
    given = company(48, optimizer)
    found, whole = update_held(*given, device_type), rehearse_update(*given, device_type)
    assert found.highest == pytest.approx(whole.highest, rel=0.02)
    assert found.after == pytest.approx(whole.after, rel=0.02, abs=16 * 512)  # a few small blocks
    assert sizes == [8]


def test_different_models_are_rehearsed_themselves(sizes):
    given = joined(
        *(company(1, shapes={"w": (number + 1,)}, letter=f"{number:02}") for number in range(20))
    )
    assert update_held(*given) == rehearse_update(*given)
    assert sizes == [20]


def test_each_kind_counts_beside_those_that_are_few(sizes):
    given = joined(
        company(32, "Adam"), company(3, "SGD", letter="s"), company(24, "SGD", letter="t")
    )
    found, whole = update_held(*given, "cuda"), rehearse_update(*given, "cuda")
    assert sizes == [8 + 8, 8, 8]  # 32 of one kind, 27 of the other
    assert whole.highest <= found.highest < 1.3 * whole.highest
    assert found.after == pytest.approx(whole.after, rel=0.02)


def test_models_of_other_settings_are_no_company(sizes):
    types, learning, packs, trainings = company(20)
    clipped = {m: replace(trainings[m], grad_clip_norm=1.0) for m in list(trainings)[:10]}
    given = types, learning, packs, trainings | clipped
    assert update_held(*given) == rehearse_update(*given)
    assert sizes == [20]


def test_rates_that_differ_differ_among_the_few(sizes):
    types, learning, packs, trainings = company(48, "RMSprop")
    same = {m: replace(t, optimizer_kwargs={"lr": 0.1}) for m, t in trainings.items()}
    last = {**same, "m47": trainings["m47"]}
    alike = update_held(types, learning, packs, same)
    assert update_held(types, learning, packs, last).after > alike.after
