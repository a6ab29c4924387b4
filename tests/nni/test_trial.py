"""The trial's side: orders, metrics of bounded size, and what ends a trial."""

import json
import math
import os
import random
import subprocess
import sys

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cgo
from cgo.errors import CgoError, GraphDataError, TrialError
from cgo.events import Event
from cgo.nni import trial
from cgo.nni.trial import (
    Order,
    Reporter,
    enter_roots,
    events_of,
    is_metric,
    order_of,
    read_order,
)
from cgo.planner import Planner


@pytest.fixture
def folder(tmp_path):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=2)
    models = [
        cgo.Model("support.small:mlp", data=data, training=spec, model_id=f"m{n}", seed=n)
        for n in range(2)
    ]
    plan = Planner().plan(models, tmp_path / "t")
    assert not plan.failures
    return tmp_path / "t"


def order(folder, **changed):
    return order_of("t0", folder, ["/roots"], [os.getpid()]) | changed


def test_an_order_travels_as_json_and_holds_the_document(folder):
    sent = json.loads(json.dumps(order(folder), allow_nan=False))
    read = read_order(sent)
    assert [entry.id for entry in read.document.models] == ["m0", "m1"]
    assert (read.trial, read.folder) == ("t0", folder)
    assert read.pids[0][0] == os.getpid()


def test_a_large_document_is_read_from_its_folder(folder, monkeypatch):
    monkeypatch.setattr(trial, "MOST_DOCUMENT_BYTES", 100)
    sent = order(folder)
    assert sent["document"] is None
    assert len(json.dumps(sent)) < 1000
    assert len(read_order(sent).document.models) == 2
    (folder / "graph.json").write_text("{}")
    with pytest.raises(TrialError, match="not the document that was submitted"):
        read_order(sent)


def test_a_worker_that_does_not_see_the_folder_says_so(folder, tmp_path):
    with pytest.raises(TrialError, match=r"does not see .*nowhere.*storage that all workers share"):
        read_order(order(folder) | {"folder": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("parameter", "error", "message"),
    [
        (3, TrialError, "the parameter is a int"),
        ({"lr": 0.1}, GraphDataError, "version None"),
        ({"cgo": 99}, TrialError, "form 99"),
    ],
)
def test_what_is_no_order_is_refused(parameter, error, message, tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
    with pytest.raises(error, match=message):
        read_order(parameter)


def test_a_bare_document_is_an_order(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "out"))
    read = read_order(json.loads((folder / "graph.json").read_text()))
    assert read.folder == tmp_path / "out" / "cgo"
    assert len(read.document.models) == 2


class Sent:
    """What a reporter sends."""

    def __init__(self, folder):
        self.intermediate, self.final = [], []
        given = read_order(order(folder))
        self.reporter = Reporter(given, "job", self._intermediate, self._final)

    def _intermediate(self, payload):
        self.intermediate.append(json.loads(json.dumps(payload)))

    def _final(self, payload):
        self.final.append(payload)


def epoch(model, number, accuracy):
    return Event(model, "epoch", number, {"val_accuracy": accuracy, "val_loss": 1.0})


def test_metrics_name_models_and_the_best_so_far_is_the_default(folder):
    sent = Sent(folder)
    for event in (
        Event("m0", "started", None, None),
        epoch("m0", 0, 0.5),
        epoch("m1", 0, float("nan")),
        epoch("m1", 1, 0.25),
    ):
        sent.reporter(event)
    sent.reporter.finish({"m0": 0.5, "m1": 0.25})
    first, *rest = sent.intermediate
    assert "default" not in first
    assert first["events"] == {"m0": [["started", None, None]]}
    told = [event for payload in rest for event in events_of(payload)]
    assert [(e.model, e.epoch) for e in told] == [("m0", 0), ("m1", 0), ("m1", 1)]
    assert math.isnan(told[1].value["val_accuracy"])
    (final,) = sent.final
    assert final["default"] == 0.5
    assert final["metrics"] == {"m0": 0.5, "m1": 0.25}
    assert [p["sequence"] for p in sent.intermediate] == list(range(final["sequence"]))


def test_many_events_are_several_metrics(folder, monkeypatch):
    monkeypatch.setattr(trial, "MOST_METRIC_BYTES", 2000)
    monkeypatch.setattr(trial, "_FLUSH_S", 1e9)
    sent = Sent(folder)
    sent.reporter._flushed = math.inf
    for number in range(100):
        sent.reporter(epoch("m0", number, 0.5))
    sent.reporter.flush()
    assert len(sent.intermediate) > 3
    assert max(len(json.dumps(payload)) for payload in sent.intermediate) < 2500
    told = [event.epoch for payload in sent.intermediate for event in events_of(payload)]
    assert told == list(range(100))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_events_of_a_model_keep_their_order(models, seed):
    dice = random.Random(seed)
    given_events = [epoch(f"m{dice.randrange(models)}", n, dice.random()) for n in range(40)]
    parts = trial._parts(given_events)
    assert [e for part in parts for e in part] == given_events


WATCHED = """
import sys, time
from pathlib import Path
from cgo.nni.trial import Order, watch
host, pid, born, folder = sys.argv[1:]
watch(Order("t", None, Path(folder), host, ((int(pid), float(born)),)))
time.sleep(30)
"""


def watched(tmp_path, process, host=None):
    import socket

    born = psutil.Process(process.pid).create_time()
    arguments = [host or socket.gethostname(), str(process.pid), str(born), str(tmp_path)]
    return subprocess.Popen([sys.executable, "-c", WATCHED, *arguments])


@pytest.fixture
def launcher():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_trial_does_not_outlive_its_launcher(tmp_path, launcher):
    process = watched(tmp_path, launcher)
    launcher.kill()
    assert process.wait(timeout=15) == 1


def test_a_cancelled_trial_ends(tmp_path, launcher):
    process = watched(tmp_path, launcher)
    (tmp_path / trial.CANCELLED).touch()
    assert process.wait(timeout=15) == 143


def test_processes_of_another_machine_are_not_looked_for(tmp_path, launcher):
    process = watched(tmp_path, launcher, host="elsewhere")
    launcher.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4)
    process.kill()


def test_an_order_is_a_value():
    assert Order("t", None, None) == Order("t", None, None)


# --- parameters of others -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"folder": None}, {"folder": 1}, {"pids": 1}, {"pids": [1]}, {"pids": [["x", "y"]]},
     {"document": 1}, {"document": []}, {"folder": "a\0b"}, {"cgo": 2}, {"trial": None}],
)  # fmt: skip
def test_a_parameter_of_another_form_is_refused(changes, tmp_path):
    order = {"cgo": 1, "trial": "t", "folder": str(tmp_path), "roots": [], "document": "{}",
             "sha256": "", "host": "h", "pids": []}  # fmt: skip
    with pytest.raises(CgoError):
        read_order(order | changes)
    for field in set(order) - {"roots", "sha256"}:
        with pytest.raises(CgoError):
            read_order({k: v for k, v in order.items() if k != field})


def test_under_a_limit_a_parameter_does_not_say_where_modules_lie(tmp_path, monkeypatch):
    """Its folder could hold another module of an allowed name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CGO_IMPORT_ROOTS", "/from/the/command")
    monkeypatch.setenv("CGO_ALLOWED_MODULES", "my_package")
    enter_roots({"roots": [str(tmp_path)]})
    assert sys.path[0] == "/from/the/command"
    assert str(tmp_path) not in sys.path
    monkeypatch.delenv("CGO_ALLOWED_MODULES")
    enter_roots({"roots": [str(tmp_path), 1, ""]})
    assert sys.path[0] == str(tmp_path)


METRIC = {"trial": "t", "job": "j", "host": "h", "pid": 1, "sequence": 0, "events": {}}


@pytest.mark.parametrize(
    "events",
    [1, [], {"a": 1}, {"a": [1]}, {"a": [["started"]]}, {"a/b": [["started", None, None]]},
     {"a": [["epoch", "x", {}]]}, {"a": [["ended", None, {"success": 1}]]}],
)  # fmt: skip
def test_metrics_of_others_hold_no_events(events):
    assert is_metric(METRIC)
    assert events_of(METRIC) == []
    with pytest.raises(TrialError, match=r"^not (an event|the events)"):
        events_of(METRIC | {"events": events})


@pytest.mark.parametrize(
    "payload",
    [None, 1, "x", [], {}, *({k: v for k, v in METRIC.items() if k != f} for f in METRIC
                             if f != "events"), METRIC | {"pid": "1"}, METRIC | {"trial": []}],
)  # fmt: skip
def test_what_is_no_metric_of_ours(payload):
    assert not is_metric(payload)
