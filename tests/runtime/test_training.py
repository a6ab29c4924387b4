"""The trial's loop: isolation, shared state, checkpoints. `tests/equivalence` has the numbers."""

from pathlib import Path

import psutil
import pytest
import torch
from support.observers import Losses

import cgo
from cgo import trial, weights
from cgo.errors import MissingWeightsError, TrialError
from cgo.passes.batch_operators import BatchOperators
from cgo.planner import Planner

DATA = cgo.DataSpec("support.small:points", batch_size=16)


def model(id_, module="support.small:mlp", kwargs=None, data=DATA, seed=0, **training):
    training = {"optimizer_kwargs": {"lr": 0.1}, "epochs": 3, "metrics": ("accuracy",)} | training
    spec = cgo.TrainingSpec(**training)
    return cgo.Model(module, kwargs, data=data, training=spec, seed=seed, model_id=id_)


class Run:
    def __init__(self, *models, folder: Path, merge=True, fuse=True, measure=False):
        self.folder = folder
        # Nothing is measured: two trials that are compared bit by bit have to choose alike.
        settings = {"tuning": {"measure": measure, "tape": True}}
        planner = Planner(merge, BatchOperators() if fuse else None)
        self.plan = planner.plan(models, folder, settings)
        self.events = []
        self.observer = Losses()

    def execute(self, report=None):
        self.metrics = trial.execute(
            self.plan.graph_data,
            folder=self.folder,
            report=report or self.events.append,
            observer=self.observer,
        )
        return self

    @property
    def losses(self):
        return self.observer.seen

    def ended(self, id_):
        return next(e.value for e in self.events if e.model == id_ and e.kind == "ended")

    def state(self, id_):
        return weights.load(self.folder / self.ended(id_)["weights"])


def alone(candidate, tmp_path):
    return Run(candidate, folder=tmp_path / f"alone-{candidate.model_id}").execute()


def assert_same_state(left, right):
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_same(run, solo, id_, *, fused):
    """To the bit without fusion; fused operators sum in another order."""
    if not fused:
        assert run.losses[id_] == solo.losses[id_]
        assert_same_state(run.state(id_), solo.state(id_))
        return
    assert run.losses[id_] == pytest.approx(solo.losses[id_], rel=1e-9)
    left, right = run.state(id_), solo.state(id_)
    assert set(left) == set(right)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-9, atol=1e-11)


def precision(fused):
    return "float64" if fused else "float32"


def test_events_of_a_model_come_in_order(tmp_path):
    run = Run(model("a"), model("b", kwargs={"hidden": 5}), folder=tmp_path).execute()
    kinds = [(e.kind, e.epoch) for e in run.events if e.model == "a"]
    assert kinds == [
        ("started", None), ("epoch", 0), ("epoch", 1), ("epoch", 2), ("final", None),
        ("ended", None),
    ]  # fmt: skip
    row = next(e.value for e in run.events if e.kind == "epoch")
    assert set(row) == {"train_loss", "val_loss", "val_accuracy", "lr", "seconds"}
    assert set(run.metrics) == {"a", "b"}


def test_the_table_of_costs_is_closed_when_a_trial_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))
    seen = []

    def report(event):
        if event.kind == "epoch":
            seen.append(open_tables(tmp_path))

    run = Run(model("a"), model("b", kwargs={"hidden": 5}), folder=tmp_path, measure=True)
    run.execute(report)
    assert seen
    assert all(seen)
    assert open_tables(tmp_path) == []


def open_tables(folder):
    files = [Path(file.path) for file in psutil.Process().open_files()]
    return [path for path in files if path.parent == folder / "cache"]


@pytest.mark.parametrize("fuse", [False, True])
def test_company_changes_nothing(tmp_path, fuse):
    given = {"precision": precision(fuse)}
    models = [
        model("a", kwargs={"dropout": 0.3}, **given),
        model("b", kwargs={"hidden": 5, "dropout": 0.2}, seed=3, epochs=2, **given),
        model("c", "support.small:stemmed", **given),
        model("d", "support.small:raises_later", {"after": 100}, **given),
        model("e", kwargs={"dropout": 0.1}, seed=4, epochs=1, **given),
    ]
    together = Run(*models, folder=tmp_path / "merged", fuse=fuse).execute()
    for candidate in models:
        solo = alone(candidate, tmp_path)
        assert_same(together, solo, candidate.model_id, fused=fuse)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("short_first", [True, False])
@pytest.mark.parametrize("stem_training", [True, False])
def test_a_shared_stem_outlives_the_model_that_lent_it(tmp_path, short_first, stem_training, fuse):
    stem = {"stem_training": stem_training}
    given = {"precision": precision(fuse)}
    models = [
        model("a", "support.small:stemmed", stem, epochs=1 if short_first else 4, **given),
        model(
            "b",
            "support.small:stemmed",
            {"hidden": 3, **stem},
            epochs=4 if short_first else 1,
            **given,
        ),
    ]
    together = Run(*models, folder=tmp_path / "merged", fuse=fuse).execute()
    assert together.plan.report.stems_shared > 0
    for candidate in models:
        solo = alone(candidate, tmp_path)
        assert_same(together, solo, candidate.model_id, fused=fuse)


def test_an_opaque_model_that_raises_fails_alone(tmp_path):
    good, bad = model("good"), model("bad", "support.small:raises_later", {"after": 4})
    run = Run(good, bad, folder=tmp_path / "merged").execute()
    assert run.ended("bad")["error"] == "RuntimeError: gave up"
    assert run.ended("good")["success"]
    assert run.losses["good"] == alone(good, tmp_path).losses["good"]
    assert len(run.losses["bad"]) == 4
    assert set(run.metrics) == {"good"}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_captured_model_that_raises_fails_alone(tmp_path, precision):
    # Batch 0 has only classes that the narrow model knows; a later one does not.
    data = cgo.DataSpec("support.small:late_class", batch_size=16, shuffle=False)
    good = model("good", kwargs={"dropout": 0.4}, data=data, precision=precision)
    bad = model("bad", "support.small:narrow", data=data, precision=precision)
    run = Run(good, bad, folder=tmp_path / "merged").execute()
    assert run.plan.report.captured == 2
    assert "out of bounds" in run.ended("bad")["error"]
    assert len(run.losses["bad"]) == 1
    solo = alone(good, tmp_path)
    assert run.losses["good"] == solo.losses["good"]
    assert_same_state(run.state("good"), solo.state("good"))


@pytest.mark.parametrize("fuse", [False, True])
def test_nan_ends_a_model_and_no_other(tmp_path, fuse):
    given = {"precision": precision(fuse)}
    good, bad = model("good", **given), model("bad", "support.small:explodes", **given)
    run = Run(good, bad, folder=tmp_path / "merged", fuse=fuse).execute()
    assert run.ended("bad")["error"] == "the training loss became nan in epoch 0"
    assert_same(run, alone(good, tmp_path), "good", fused=fuse)


def test_nan_is_trained_through_when_asked(tmp_path):
    run = Run(model("bad", "support.small:explodes", stop_on_nan=False), folder=tmp_path).execute()
    assert run.ended("bad")["success"]


def test_a_broken_data_set_ends_its_models_only(tmp_path):
    broken = cgo.DataSpec("support.small:broken_points", {"bad": 39}, batch_size=16, shuffle=False)
    run = Run(model("good"), model("bad", data=broken), folder=tmp_path).execute()
    assert "sample 39 of the train data raised OSError" in run.ended("bad")["error"]
    assert run.ended("good")["success"]


def test_equal_models_are_trained_once_and_counted_twice(tmp_path):
    run = Run(model("a"), model("b"), model("c", seed=1), folder=tmp_path).execute()
    assert run.plan.report.aliases == {"b": "a"}
    assert run.metrics["a"] == run.metrics["b"]
    assert "b" not in run.losses


class Killed(Exception):
    pass


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_killed_trial_goes_on_from_its_checkpoint(tmp_path, epoch):
    models = [
        model("a", kwargs={"dropout": 0.3}, optimizer="Adam", optimizer_kwargs={}, epochs=4),
        model("b", "support.small:stemmed", epochs=1, scheduler="StepLR",
              scheduler_kwargs={"step_size": 1}),
        model("c", "support.small:stemmed", {"hidden": 3}, epochs=4,
              optimizer_kwargs={"lr": 0.1, "momentum": 0.9}, scheduler="OneCycleLR",
              scheduler_interval="step", scheduler_kwargs={"max_lr": 0.2, "total_steps": 12}),
        model("d", "support.small:raises_later", {"after": 1000}, epochs=4),
        model("e", kwargs={"dropout": 0.3}, optimizer="Adam", seed=2, optimizer_kwargs={"lr": 0.02},
              epochs=4),
        model("f", "support.small:counting", epochs=4),
    ]  # fmt: skip
    whole = Run(*models, folder=tmp_path / "whole").execute()
    halved = Run(*models, folder=tmp_path / "halved")

    def die(event):
        halved.events.append(event)
        if event.kind == "epoch" and event.epoch == epoch + 1 and event.model == "a":
            raise Killed

    with pytest.raises(Killed):
        halved.execute(die)
    halved.events = [e for e in halved.events if e.kind == "ended"]
    halved.execute()
    for candidate in models:
        assert_same_state(halved.state(candidate.model_id), whole.state(candidate.model_id))
    assert halved.metrics == whole.metrics


def test_a_finished_trial_run_again_repeats_no_event(tmp_path):
    run = Run(model("a"), folder=tmp_path).execute()
    run.events.clear()
    first = run.metrics
    run.execute()
    assert [e.kind for e in run.events] == ["trial", "trial"]
    assert run.metrics == first


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = Run(model("a"), folder=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrialError, match="cannot read checkpoint"):
        run.execute()


def test_missing_start_weights_stop_the_trial(tmp_path):
    from support import small

    run = Run(model("a", small.mlp()), folder=tmp_path)
    (tmp_path / "start" / "a.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match="weights of model 'a'"):
        run.execute()


def test_a_factory_that_builds_something_else_in_the_trial_fails_its_model(tmp_path, monkeypatch):
    from support import small

    run = Run(model("good"), model("bad", "support.small:stemmed"), folder=tmp_path)
    monkeypatch.setattr(small, "stemmed", lambda **kwargs: small.Stemmed(hidden=9))
    run.execute()
    assert "must build the same module each time" in run.ended("bad")["error"]
    assert run.ended("good")["success"]
