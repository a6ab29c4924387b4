"""Training steps of a CPU that are replayed whole: as alone, undone where an operator refuses."""

from dataclasses import replace

import pytest
from support.merged import KNOWN, Case, Merged, assert_equal_float64

from cgo import trial
from cgo.runtime import accelerator
from cgo.runtime.bodies import Undone, record_body
from cgo.runtime.rows import RowSteps

MOMENTUM = {"lr": 0.05, "momentum": 0.9}


def training(optimizer="SGD", **more):
    settings = {"lr": 0.003, "eps": 1e-3} if optimizer == "Adam" else MOMENTUM
    kwargs = {"optimizer": optimizer, "optimizer_kwargs": settings}
    return {"precision": "float64", "epochs": 3, **kwargs, **more}


class Unobserved(Merged):
    """A trial that nobody looks into: gradients may stay factors."""

    def run(self, data, **given):
        return trial.execute(data, **given)


def plain(count, width=48, **more):
    """Networks that draw nothing, wide enough that their weights' gradients stay products."""
    given = training(**more)
    return [
        Case(f"m{i}", "deep", {"count": 10, "width": width}, seed=i, batch_size=16,
             training={**given, "optimizer_kwargs": {**MOMENTUM, "lr": 0.02 * (i + 1)}})
        for i in range(count)
    ]  # fmt: skip


def assert_rows_and_state(merged, case):
    """As `assert_equal_float64`, but for the losses of steps, which nobody saw."""
    alone = case.alone()
    merged.losses[case.id] = alone.losses
    assert_equal_float64(merged, case, alone)


@pytest.fixture
def added(monkeypatch):
    """Products that were added to momentum as they are."""
    seen = []
    add = RowSteps._add
    monkeypatch.setattr(RowSteps, "_add", lambda *given: seen.append(given[2]) or add(*given))
    return seen


@pytest.mark.parametrize("more", [{}, {"scheduler": "ExponentialLR",
    "scheduler_kwargs": {"gamma": 0.9}, "scheduler_interval": "step"}])  # fmt: skip
def test_a_cpus_steps_are_replayed_whole_and_train_as_alone(more, added, tmp_path):
    cases = plain(8, **more)
    cases[3].training["optimizer_kwargs"] = {"lr": 0.03, "momentum": 0.5}
    merged = Unobserved(cases, tmp_path)
    assert [value["program"] for value in merged.told("captured")] == ["train/16"]
    assert added
    for case in cases:
        assert_rows_and_state(merged, case)


@pytest.mark.parametrize("family", ["cnn", "residual", "lstm"])
def test_a_cpus_steps_of_other_families(family, tmp_path):
    given = training()
    cases = [Case(f"m{i}", family, seed=i, training=given) for i in range(5)]
    merged = Unobserved(cases, tmp_path)
    assert merged.told("captured")
    for case in cases:
        assert_rows_and_state(merged, case)


def test_clipped_models_need_their_gradients(added, tmp_path):
    cases = plain(6, grad_clip_norm=0.5)
    merged = Unobserved(cases, tmp_path)
    assert merged.told("captured")
    assert not added
    for case in cases:
        assert_rows_and_state(merged, case)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(
    ("net", "kwargs"),
    [
        ("recurrent", {"kind": "LSTM"}),  # one call reads a weight at each step in time
        ("recurrent", {"kind": "GRU"}),
        ("attending", {"learned": True}),  # a factor is a parameter, whose step may come first
        ("attending", {"learned": False}),  # a factor is a buffer, which is written before
    ],
)
def test_gradients_that_are_no_product_or_whose_factors_change(net, kwargs, optimizer, tmp_path):
    given = training(optimizer)
    if optimizer == "SGD":  # with larger rates these blow rounding up
        given["optimizer_kwargs"] = {**MOMENTUM, "lr": 0.01}
    cases = [Case(f"m{i}", net, kwargs, seed=i, batch_size=16, training=given) for i in range(6)]
    merged = Unobserved(cases, tmp_path)
    for case in cases:
        assert_rows_and_state(merged, case)


def test_an_error_after_something_was_written_ends_the_models_of_the_step(monkeypatch, tmp_path):
    """As in an eager step of all optimizers; there is no way back to before."""
    replayed = []

    def replay(*given):
        found = record_body(*given)

        def failing():
            replayed.append(1)
            if len(replayed) == 3:
                raise MemoryError("no room for moments")
            found[1]()

        return found[0], failing

    monkeypatch.setattr(accelerator, "record_body", replay)
    merged = Unobserved(plain(6), tmp_path)
    assert len(replayed) == 3
    for number in range(6):
        assert "no room for moments" in merged.ended(f"m{number}")["error"]


def test_a_replay_that_alone_raises_leaves_the_step_eager(monkeypatch, tmp_path):
    def replay(*given):
        results, _ = record_body(*given)

        def failing():
            raise Undone("a rewrite of ours is wrong")

        return results, failing

    monkeypatch.setattr(accelerator, "record_body", replay)
    cases = plain(6)
    merged = Unobserved(cases, tmp_path)
    assert [value["reason"] for value in merged.told("eager")] == ["a rewrite of ours is wrong"]
    for case in cases:
        assert_rows_and_state(merged, case)


def test_a_step_whose_tape_was_refused_is_not_replayed_whole(monkeypatch, tmp_path):
    monkeypatch.setattr("cgo.runtime.taped.agree", lambda left, right: False)
    cases = plain(6)
    merged = Unobserved(cases, tmp_path)
    assert not merged.told("captured")
    for case in cases:
        assert_rows_and_state(merged, case)


@pytest.mark.parametrize("batch", range(1, 10))
def test_a_class_that_one_model_lacks_costs_the_others_nothing(batch, tmp_path):
    """Before steps are replayed, in the one that is captured, and after: the model ends alone."""
    cases = plain(6)
    for case in cases:
        case.source, case.source_kwargs = "late_class", {"at": 16 * batch + 3}
    odd = replace(cases[0], id="odd", kwargs={"count": 9, "width": 48}, seed=11)
    merged = Unobserved([*cases, odd], tmp_path)
    ended = merged.ended("odd")
    assert not ended["success"]
    assert "Target 9 is out of bounds" in ended["error"]
    # The first three run it, record its forward and backward, and check what was recorded.
    assert merged.told("captured")[0]["models"] == (7 if batch > 3 else 6)
    for case in cases:
        assert_rows_and_state(merged, case)


@pytest.mark.parametrize(
    ("change", "tuning"),
    [
        ({"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.01}}, {}),
        ({}, {"capture": False}),
    ],
)
def test_steps_that_gain_nothing_stay_eager(change, tuning, tmp_path):
    cases = plain(6)
    for case in cases:
        case.training |= change
    merged = Unobserved(cases, tmp_path, tuning=replace(KNOWN, **tuning))
    assert not merged.told("captured")
    assert not merged.told("eager")
    assert all(merged.ended(case.id)["success"] for case in cases)
