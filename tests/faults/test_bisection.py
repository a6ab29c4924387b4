"""Models that take their trial down are found, and what the others learn is not harmed by it."""

import logging
import math

import pytest
import torch
from support.crashers import WAYS

import cgo
from cgo import ModelStatus
from cgo.platforms.local import LocalPlatform

pytestmark = pytest.mark.long  # each start of a trial takes seconds, and imports torch

WAIT_S = 400
K = "support.crashers"
#: 40 samples in batches of 8: a crash after 7 steps is in the second epoch, behind a checkpoint.
STEPS = 7


class Counted(LocalPlatform):
    def __init__(self, workers=1):
        super().__init__(workers)
        self.started = []

    def submit(self, request):
        super().submit(request)
        self.started.append(request.trial_id)


def model(id_, module, kwargs=None, seed=0, precision="float32", **training):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = {"metrics": ("accuracy",), "epochs": 3, "precision": precision, **training}
    return cgo.Model(
        module, kwargs, data=data, training=cgo.TrainingSpec(**spec), seed=seed, model_id=id_
    )


def good(precision="float32"):
    """Merged and opaque models, two that share a stem, and one that equals another."""
    adam = {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.01}}
    steps = {"scheduler": "StepLR", "scheduler_kwargs": {"step_size": 1}}
    return [
        model("b-plain", f"{K}:plain", precision=precision),
        model("c-adam", f"{K}:plain", seed=1, precision=precision, **adam),
        model("d-stem", f"{K}:stemmed", precision=precision),
        model("f-stem", f"{K}:stemmed", seed=1, precision=precision, **steps),
        model("g-norm", "support.small:mlp", precision=precision, epochs=4),
        model("h-opaque", f"{K}:crasher", {"after": 10**6}, precision=precision),
        model("i-alias", f"{K}:stemmed", precision=precision),
    ]


def culprit(id_="e-culprit", how="segfault", precision="float32", **kwargs):
    return model(id_, f"{K}:crasher", {"how": how, "after": STEPS, **kwargs}, precision=precision)


def search(folder, given, fuse=False, workers=1):
    """Train; gives the ids of the trials in the order of their starts."""
    platform = Counted(workers)
    options = cgo.BatchOperators() if fuse else None
    tuning = cgo.Tuning(measure=False)
    with cgo.CGOEngine(folder, platform=platform, batch_operators=options, tuning=tuning) as engine:
        engine.submit_models(*given)
        engine.wait_models(timeout_s=WAIT_S)
    return platform.started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The good models without a culprit: float32 unfused, and float64 fused."""
    found = {}
    for fuse, precision in ((False, "float32"), (True, "float64")):
        found[fuse] = good(precision)
        assert len(search(tmp_path_factory.mktemp("undisturbed"), found[fuse], fuse)) == 1
    return found


def rows(each):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in each.history]


def assert_same_bits(found, expected):
    for each, other in zip(found, expected, strict=True):
        assert each.status is ModelStatus.TRAINED, each.error
        assert rows(each) == rows(other)
        state = each.state_dict()
        for path, value in other.state_dict().items():
            assert torch.equal(state[path], value), (each.model_id, path)


def assert_close(found, expected):
    for each, other in zip(found, expected, strict=True):
        assert each.status is ModelStatus.TRAINED, each.error
        for row, wanted in zip(each.history, other.history, strict=True):
            for key in ("train_loss", "val_loss", "lr"):
                assert row[key] == pytest.approx(wanted[key], rel=1e-9)


def assert_culprit(each, way):
    assert each.status is ModelStatus.FAILED
    assert each.error.startswith(f"model '{each.model_id}': trial t")
    assert WAYS[way] in each.error
    assert "its log is" in each.error


def starts_of(count):
    return 2 * math.log2(count) + 2


def test_a_segfault_among_seven_costs_the_others_no_bit(undisturbed, tmp_path, caplog):
    caplog.set_level(logging.INFO, "cgo.demultiplexer")
    models, bad = good(), culprit()
    started = search(tmp_path, [*models[:3], bad, *models[3:]])
    assert_same_bits(models, undisturbed[False])
    assert_culprit(bad, "segfault")
    assert len(bad.history) == 1
    assert "crashers.py" in bad.error  # where, in Python
    assert "in crash" in bad.error
    assert len(started) <= starts_of(7)
    # Nobody's epoch was trained again once it stood in a checkpoint.
    assert "repeated epoch" not in caplog.text


@pytest.mark.parametrize("how", ["exit 0", "exit 3", "abort"])
def test_fused_models_stay_equal_whatever_the_crash(how, undisturbed, tmp_path, caplog):
    caplog.set_level(logging.INFO, "cgo.demultiplexer")
    models, bad = good("float64"), culprit(how=how, precision="float64")
    started = search(tmp_path, [bad, *models], fuse=True)
    assert_close(models, undisturbed[True])
    assert_culprit(bad, how)
    assert len(started) <= starts_of(7)
    assert "repeated epoch" not in caplog.text


@pytest.mark.parametrize(("count", "last"), [(2, False), (5, False), (8, True), (16, False)])
def test_few_starts_for_any_number_of_models(count, last, tmp_path):
    models = [model(f"m{n}", f"{K}:plain", seed=n) for n in range(count - 1)]
    bad = culprit("z" if last else "a")
    started = search(tmp_path, [*models, bad] if last else [bad, *models])
    assert all(each.status is ModelStatus.TRAINED for each in models)
    assert_culprit(bad, "segfault")
    assert len(started) <= starts_of(count)


def test_two_culprits_and_halves_side_by_side(undisturbed, tmp_path):
    models = good()
    bad = [culprit("a-culprit", "exit 0"), culprit("z-culprit", "abort", after=2)]
    started = search(tmp_path, [bad[0], *models, bad[1]], workers=2)
    assert_same_bits(models, undisturbed[False])
    assert_culprit(bad[0], "exit 0")
    assert_culprit(bad[1], "abort")
    assert bad[1].history == []
    assert len(started) <= 4 * math.ceil(math.log2(8)) + 4


def test_what_crashes_only_in_company_is_trained(undisturbed, tmp_path):
    models, shy = good(), culprit(least=2)
    started = search(tmp_path, [shy, *models])
    assert_same_bits([*models, shy], [*undisturbed[False], *_alone(tmp_path)])
    assert len(started) <= starts_of(7) + 1


def _alone(folder):
    alone = [culprit(least=2)]
    search(folder / "alone", alone)
    return alone


def test_a_crash_while_models_are_built_is_one_as_well(undisturbed, tmp_path):
    models = good()
    bad = model("e-culprit", f"{K}:crashes_while_built")
    started = search(tmp_path, [*models, bad])
    assert_same_bits(models, undisturbed[False])
    assert_culprit(bad, "segfault")
    assert bad.history == []
    assert len(started) <= starts_of(7)
