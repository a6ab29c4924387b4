"""User code that raises SystemExit and its like ends its model, and no other, wherever it is."""

import os

import pytest
import torch
from support import escapes

import cgo
from cgo import trial, user_code, weights
from cgo.planner import Planner

E = "support.escapes"


@pytest.fixture(autouse=True)
def in_a_trial(monkeypatch):
    """Nobody interrupts a trial from the keyboard, so each KeyboardInterrupt is the model's own."""
    monkeypatch.setattr(user_code, "_signals_terminate", True)
    monkeypatch.setattr(escapes, "ARMED", None)


def model(id_, place="nowhere", data=None, source=None, **training):
    if data is None:
        data = cgo.DataSpec(source or "support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(**{"metrics": ("accuracy",), "epochs": 2, **training})
    return cgo.Model(f"{E}:leaver", {"place": place}, data=data, training=spec, model_id=id_)


def good():
    """A merged model and an opaque one, beside which others leave."""
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=2)
    mlp = cgo.Model("support.small:mlp", data=data, training=spec, model_id="merged")
    return [mlp, model("opaque")]


class Ran:
    def __init__(self, models, folder, leaving=None):
        plan = Planner(batch_operators=None).plan(models, folder, {"tuning": {"measure": False}})
        assert not plan.failures, plan.failures
        escapes.ARMED = leaving
        events = []
        try:
            trial.execute(plan.graph_data, folder=folder, report=events.append)
        finally:
            escapes.ARMED = None
        self.ended = {e.model: e.value for e in events if e.kind == "ended"}
        self.rows = {
            id_: [without_time(e.value) for e in events if e.kind == "epoch" and e.model == id_]
            for id_ in self.ended
        }
        self.state = {
            id_: weights.load(folder / value["weights"])
            for id_, value in self.ended.items()
            if value["success"]
        }


def without_time(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Ran(good(), tmp_path_factory.mktemp("alone"))


def assert_unharmed(ran, alone):
    for id_ in ("merged", "opaque"):
        assert ran.rows[id_] == alone.rows[id_]
        for path, value in alone.state[id_].items():
            assert torch.equal(ran.state[id_][path], value)


def spec_of(place):
    return cgo.DataSpec(f"{E}:points", {"place": place}, batch_size=8)


def augmented(name):
    return cgo.DataSpec("support.small:points", batch_size=8, augment=f"{E}:{name}")


def optimized(place):
    return {"optimizer": f"{E}:Optimizer", "optimizer_kwargs": {"place": place, "lr": 0.1}}


def scheduled(place, **more):
    return {"scheduler": f"{E}:Scheduler", "scheduler_kwargs": {"place": place}, **more}


#: For each place a model that leaves there, and what its error says besides.
PLACES = {
    "factory": (lambda: model("bad", "factory"), "factory support.escapes:leaver raised "),
    "named_parameters": (lambda: model("bad", "named_parameters"), "building it raised "),
    "forward": (lambda: model("bad", "forward"), ""),
    "backward": (lambda: model("bad", "backward"), ""),
    "evaluation": (lambda: model("bad", "evaluation"), ""),
    "train": (lambda: model("bad", "train"), ""),
    "loss": (lambda: model("bad", loss=f"{E}:loss"), ""),
    "source": (lambda: model("bad", data=spec_of("source")), "support.escapes:points raised"),
    "length": (lambda: model("bad", data=spec_of("length")), "of the training data set raised "),
    "sample": (lambda: model("bad", data=spec_of("sample")), "of the train data raised "),
    "validation": (
        lambda: model("bad", data=spec_of("validation sample")), "of the validation data raised ",
    ),
    "augment": (lambda: model("bad", data=augmented("augment")), "in batch 0 of epoch 0, raised "),
    "augment factory": (
        lambda: model("bad", data=augmented("unbuildable_augment")), "unbuildable_augment raised ",
    ),
    "metric": (lambda: model("bad", metrics=(f"{E}:metric",)), ""),
    "metric.update": (lambda: model("bad", metrics=(f"{E}:metric_update",)), ""),
    "metric.compute": (lambda: model("bad", metrics=(f"{E}:metric_compute",)), ""),
    "optimizer": (lambda: model("bad", **optimized("optimizer")), "optimizer support.escapes:"),
    "optimizer.step": (lambda: model("bad", **optimized("optimizer.step")), ""),
    "optimizer.zero_grad": (lambda: model("bad", **optimized("optimizer.zero_grad")), ""),
    "scheduler": (lambda: model("bad", **scheduled("scheduler")), "or scheduler support.escapes:"),
    "scheduler.step": (lambda: model("bad", **scheduled("scheduler.step")), ""),
    "scheduler.step by steps": (
        lambda: model("bad", **scheduled("scheduler.step", scheduler_interval="step")), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_system_exit_ends_its_model_wherever_it_is_raised(place, alone, tmp_path):
    make, text = PLACES[place]
    ran = Ran([*good(), make()], tmp_path, SystemExit(3))
    assert not ran.ended["bad"]["success"]
    assert "SystemExit: 3" in ran.ended["bad"]["error"]
    assert text in ran.ended["bad"]["error"]
    assert_unharmed(ran, alone)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_of_a_merged_model_fails_it_alone(interval, alone, tmp_path):
    spec = cgo.TrainingSpec(
        metrics=("accuracy",), epochs=2, **scheduled("scheduler.step", scheduler_interval=interval)
    )
    data = cgo.DataSpec("support.small:points", batch_size=8)
    bad = cgo.Model("support.small:mlp", {"hidden": 5}, data=data, training=spec, model_id="bad")
    ran = Ran([*good(), bad], tmp_path, ValueError("no rate"))
    assert ran.ended["bad"]["error"] == "ValueError: no rate"
    assert_unharmed(ran, alone)


KINDS = {
    "SystemExit: None": SystemExit(None),
    "SystemExit: 0": SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "StopIteration": StopIteration(),
    "StopAsyncIteration": StopAsyncIteration(),
    "Vanish: gone": escapes.Vanish("gone"),
    "MemoryError": MemoryError(),
    "RecursionError: maximum recursion depth": "recursion",
    "Unprintable, whose message cannot be printed": escapes.Unprintable(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_model_and_its_data_raise_ends_that_model(kind, alone, tmp_path):
    """The model in its forward, the data in a sample, the metric in its result."""
    bad = [
        model("bad-forward", "forward"),
        model("bad-sample", data=spec_of("sample")),
        model("bad-metric", metrics=(f"{E}:metric_compute",)),
    ]
    ran = Ran([*good(), *bad], tmp_path, KINDS[kind])
    for each in bad:
        assert kind in ran.ended[each.model_id]["error"]
    assert_unharmed(ran, alone)


def test_what_a_loaders_worker_raises_is_the_datas_error(alone, tmp_path):
    data = cgo.DataSpec(f"{E}:points", {"place": "sample"}, batch_size=8, num_workers=1)
    ran = Ran([*good(), model("bad", data=data)], tmp_path, SystemExit(3))
    assert "of the train data raised SystemExit: 3" in ran.ended["bad"]["error"]
    assert_unharmed(ran, alone)


def test_a_loaders_worker_that_dies_is_the_datas_error(alone, tmp_path, monkeypatch):
    """It leaves with exit code 0, which nobody is told of."""
    monkeypatch.setattr(escapes, "leave", lambda: escapes.ARMED and os._exit(0))
    data = cgo.DataSpec(f"{E}:points", {"place": "sample"}, batch_size=8, num_workers=1)
    ran = Ran([*good(), model("bad", data=data)], tmp_path, "gone")
    assert (
        "loading the train data raised RuntimeError: DataLoader worker" in ran.ended["bad"]["error"]
    )
    assert_unharmed(ran, alone)
