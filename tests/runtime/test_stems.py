"""Stored values of frozen stems: training with them equals training alone."""

from dataclasses import replace

import pytest
import torch
from support.merged import Case, Merged, assert_equal_float64, relative
from torch.utils.data import Subset, TensorDataset

import cgo
from cgo import trial
from cgo.errors import TrialError
from cgo.graph import restrict
from cgo.passes.split_stems import SplitStems
from cgo.planner import Planner
from cgo.runtime import stems
from cgo.runtime.data import DataSets, Loader, open_data
from cgo.runtime.member import Member
from cgo.runtime.stems import StemStore, plan_stems, spare_bytes, stored_bytes, unaugmented

DEFAULTS = {"epochs": 3, "precision": "float64", "optimizer_kwargs": {"lr": 0.05}}
CPU = torch.device("cpu")


def case(id_, width=8, *, training=None, **given):
    kwargs = {"width": width, **given.pop("kwargs", {})}
    given = {"batch_size": 30, "source_kwargs": {"samples": 100, "validation": 40}, **given}
    return Case(id_, "headed", kwargs, training={**DEFAULTS, **(training or {})}, **given)


def told(events):
    found = [e.value for e in events if e.kind == "trial" and e.value["what"] == "stems"]
    return [{k: v for k, v in one.items() if k != "what"} for one in found]


@pytest.mark.parametrize(("images", "drop_last"), [(False, True), (True, False)])
def test_heads_over_a_stored_trunk_train_as_alone(tmp_path, images, drop_last):
    """Shuffled, with a ragged last batch, or with samples that only later epochs see."""
    kwargs = {"images": images}
    cases = [case(f"m{n}", 6 + 2 * n, seed=n, kwargs=kwargs, drop_last=drop_last) for n in range(2)]
    merged = Merged(cases, tmp_path)
    value = 8 * 16 if images else 8  # trunk channels, 4x4 pixels
    assert told(merged.events) == [{"bytes": 8 * value * 140, "values": 1, "models": 2}]
    for one in cases:
        assert_equal_float64(merged, one)
        assert "enter.0.weight" in merged.state(one.id)  # which no step has read


def test_models_of_all_kinds_keep_company(tmp_path):
    cases = [
        case("a-short-one-lends-its-trunk", 6, training={"epochs": 1}),
        case("long", training={"epochs": 4}),
        case("not-frozen", 6, kwargs={"frozen": False}),
        replace(case("without"), factory="mlp", kwargs={"width": 8}),
    ]
    merged = Merged(cases, tmp_path)
    assert [one["models"] for one in told(merged.events)] == [2]
    for one in cases:
        assert_equal_float64(merged, one)


class Stopped(Exception):
    """The trial's process is gone."""


@pytest.mark.usefixtures("checkpoint_after_every_epoch")
def test_a_trial_that_goes_on_fills_its_store_again(tmp_path):
    one = case("m", training={"epochs": 4})
    (tmp_path / "whole").mkdir()
    whole = Merged([one], tmp_path / "whole")
    events = []

    def stop(event):
        events.append(event)
        if event.kind == "epoch" and event.epoch == 2:
            raise Stopped

    document, folder = whole.plan.graph_data, tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(Stopped):
        trial.execute(document, folder=folder, report=stop)
    trial.execute(document, folder=folder, report=events.append)
    assert len(told(events)) == 2
    rows = [event.value for event in events if event.kind == "epoch"]
    assert len(rows) == 5  # the third epoch twice
    for row, expected in zip([*rows[:2], *rows[3:]], whole.history("m"), strict=True):
        assert relative(row["train_loss"], expected["train_loss"]) <= 1e-9
        assert relative(row["val_loss"], expected["val_loss"]) <= 1e-9


@pytest.mark.parametrize("batches", [0, 2, 6])
def test_steps_compute_the_stem_where_the_store_fails(tmp_path, monkeypatch, batches):
    """At once, in the middle of the first epoch, or in its validation."""
    compute, calls = StemStore._compute, []

    def failing(store, leaves, size):
        calls.append(size)
        if len(calls) > batches:
            raise torch.OutOfMemoryError("no memory left")
        return compute(store, leaves, size)

    monkeypatch.setattr(StemStore, "_compute", failing)
    one = case("m", training={"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.01}})
    merged = Merged([one], tmp_path)
    assert len(calls) == min(batches + 1, 6)  # 4 training and 2 validation batches fill the store
    assert told(merged.events)[1:] == (
        [{"bytes": 0, "values": 0, "models": 0, "reason": "no memory left"}] if batches < 6 else []
    )
    assert_equal_float64(merged, one)


# --- what is planned --------------------------------------------------------------------------


class Planned:
    """One model, ready for a store."""

    def __init__(self, folder, *cases):
        planner = Planner()
        self.document = planner.plan([one.model() for one in cases], folder).graph_data
        self.members = {
            entry.id: Member(entry, self.document, CPU, folder, lambda event: None)
            for entry in self.document.models
        }
        (spec,) = self.document.data.values()
        self.data = open_data(spec)
        self.events = []

    def store(self, store_stems=None, **given):
        found = []
        planned = plan_stems(
            self.document.graph, self.members, {}, self.data, CPU,
            cgo.Tuning(store_stems=store_stems),
            tell=lambda what, **figures: found.append(figures), **given,
        )  # fmt: skip
        return planned, found


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return Planned(tmp_path_factory.mktemp("planned"), case("m", training={"precision": "float32"}))


@pytest.fixture
def split(planned):
    return SplitStems()(restrict(planned.document.graph, models={"m"}))


def test_the_setting_and_the_memory_decide(planned):
    assert planned.store()[0] is not None
    assert planned.store(False) == (None, [])
    needed = 4 * 8 * 140
    assert planned.store(limit_bytes=needed)[1] == [{"bytes": needed, "values": 1, "models": 1}]
    assert planned.store(limit_bytes=needed - 1) == (
        None,
        [{"bytes": 0, "values": 0, "models": 0, "reason": "4480 bytes; 4479 may be taken"}],
    )


def test_a_single_epoch_is_not_worth_a_store(planned):
    member = planned.members["m"]
    member.history += [{}, {}]
    try:
        assert planned.store() == (None, [])
        assert planned.store(True)[0] is not None
    finally:
        del member.history[:]


def test_only_data_that_read_alike_in_every_epoch_are_stored(planned):
    data = planned.data
    assert unaugmented(data)
    part = Subset(data.train, range(20))
    assert not unaugmented(DataSets(data.spec, part, data.validation))
    assert not unaugmented(DataSets(data.spec, data.train, part))

    class Noisy(TensorDataset):
        pass

    assert not unaugmented(DataSets(data.spec, Noisy(*data.train.tensors), data.validation))


def test_stored_values_may_take_part_of_the_memory_that_is_free():
    assert 0 < spare_bytes(CPU) < 2**46


# --- the store --------------------------------------------------------------------------------


def passes(store, data, epochs, device=CPU):
    """Each epoch's batches, extended, of both splits."""
    loader = Loader(data, device)
    for epoch in range(epochs):
        for split, batches in (("train", loader.train(epoch)), ("validation", loader.validation())):
            store.begin(split, epoch)
            for size, leaves in batches:
                yield epoch, split, store.extend(leaves, size)


def filled(planned, split, device=CPU, **given):
    return StemStore(split, planned.members, {}, planned.data, device, **given)


def test_a_sample_keeps_the_bits_it_was_first_computed_with(planned, split):
    store = filled(planned, split)
    assert stored_bytes(split.values, planned.data) == 4 * 8 * 140
    seen = {}
    for epoch, part, leaves in passes(store, planned.data, 3):
        assert set(leaves) == {"input", "target", "stem.0"}
        assert leaves["stem.0"].shape == (len(leaves["target"]), 8)
        for sample, value in zip(leaves["input"], leaves["stem.0"]):
            first = seen.setdefault((part, sample.numpy().tobytes()), value)
            assert torch.equal(first, value)
        assert epoch == 0 or store.complete == {"train", "validation"}
    assert len(seen) == 140


def test_a_pass_that_was_not_finished_is_filled_again(planned, split):
    store = filled(planned, split)
    walk = passes(store, planned.data, 1)
    next(walk)
    assert store.complete == frozenset()
    list(passes(store, planned.data, 1))
    assert store.complete == {"train", "validation"}


def test_values_are_those_of_the_module(planned, split):
    """What the trunk gives, in whatever batch."""
    from support.nets import headed

    torch.manual_seed(planned.document.models[0].seed)
    net = headed(width=8)
    with torch.no_grad():
        for _, _, leaves in passes(filled(planned, split), planned.data, 2):
            x = torch.relu(net.enter(leaves["input"]))
            x = torch.max_pool2d(torch.relu(x + net.body(x)), 2).mean((2, 3))
            torch.testing.assert_close(leaves["stem.0"], x)


def test_a_value_that_is_not_what_the_graph_says_is_an_error(planned, split):
    value = replace(split.values[0], type=replace(split.values[0].type, dtype="bfloat16"))
    store = filled(planned, replace(split, values=(value,)))
    with pytest.raises(TrialError, match=r"stem\.0 of m is torch\.float32 \[8\] a sample; .* bfl"):
        next(passes(store, planned.data, 1))


def test_images_come_out_as_convolutions_leave_them():
    batch = torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    kept = stems._Kept.like(batch, 10)
    kept.put(torch.tensor([7, 1, 3, 0]), batch)
    again = kept.gather(torch.tensor([0, 7]))
    assert torch.equal(again, batch[[3, 0]])
    assert again.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_a_stem_on_the_cpu_feeds_models_on_a_gpu(planned, split, cuda):
    store = filled(planned, split, cuda, computed_on=CPU)
    here = passes(filled(planned, split), planned.data, 2)
    for (_, _, found), (_, _, expected) in zip(passes(store, planned.data, 2, cuda), here):
        assert found["stem.0"].device.type == "cuda"
        torch.testing.assert_close(found["stem.0"].cpu(), expected["stem.0"])
