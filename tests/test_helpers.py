"""Capture in several processes: nothing depends on how many, and one that dies costs its model."""

import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest

import cgo
from cgo.capture import helpers
from cgo.planner import Planner

DATA = cgo.DataSpec("support.small:points", batch_size=16)
ROOTS = (str(Path(__file__).parent),)


def dies_elsewhere(hidden):
    """Fine in this process, the end of any other."""
    from support import small

    if sys.modules["__main__"].__spec__.name == "cgo.capture.helper":
        os._exit(7)
    return small.mlp(hidden)


def models(count, module="support.small:mlp"):
    return [model(module, 4 + number, f"m{number}") for number in range(count)]


def model(module, hidden, id_):
    training = cgo.TrainingSpec()
    return cgo.Model(module, {"hidden": hidden}, data=DATA, training=training, model_id=id_)


@pytest.fixture
def eager_start(monkeypatch):
    """A process is started for every queue, and this one waits for it."""
    monkeypatch.setattr(helpers, "START_S", 0.0)
    monkeypatch.setattr(helpers, "cores", lambda: 2)
    taken = []

    class Patient(helpers.Helpers):
        def take(self):
            found = super().take()
            if self._threads:
                self._threads[0].join()
            return found

        def _take_last(self):
            found = super()._take_last()
            taken.append(found)
            return found

    monkeypatch.setattr("cgo.planner.Helpers", Patient)
    return taken


def document(folder, roots=None):
    planner = Planner(roots=roots)
    plan = planner.plan(models(8), folder)
    assert plan.failures == {}
    return (folder / "graph.json").read_bytes()


def test_the_document_does_not_depend_on_processes(tmp_path, eager_start):
    alone = document(tmp_path / "alone")
    assert eager_start == []
    assert document(tmp_path / "helped", roots=lambda models: ROOTS) == alone
    assert len([model for model in eager_start if model is not None]) == 6


def test_a_process_that_dies_costs_the_model_it_was_at(eager_start):
    given = models(6)
    given[4] = model("test_helpers:dies_elsewhere", 3, "deadly")
    planner = Planner(roots=lambda models: ROOTS)
    planner.capture(given)
    assert set(planner.captured()) == {"m0", "m1", "m2", "m3", "m5"}
    assert planner.take("deadly") == (
        None,
        "model 'deadly': capturing it ended its process, with exit code 7",
    )


def test_a_module_that_is_given_stays_in_this_process(eager_start):
    from support import small

    given = [
        *models(3),
        cgo.Model(small.mlp(), data=DATA, training=cgo.TrainingSpec(), model_id="given"),
    ]
    planner = Planner(roots=lambda models: ROOTS)
    planner.capture(given)
    assert set(planner.captured()) == {"m0", "m1", "m2", "given"}
    assert "given" not in [model.model_id for model in eager_start if model is not None]


def test_few_or_quick_models_are_not_worth_a_process():
    queue = helpers.Helpers(deque(models(20)), lambda *told: None, ROOTS, most=4)
    queue.consider(seconds_each=0.01)
    assert queue._threads == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_process_held_to_one_core_has_no_help():
    """Another process would take its time, and first import everything a second time."""
    code = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "from collections import deque\nfrom cgo.capture.helpers import Helpers\n"
        "helpers = Helpers(deque(range(1000)), print, ())\n"
        "helpers.consider(60.0)\nassert not helpers._threads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
