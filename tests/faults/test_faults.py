"""Faults injected for real: killed processes, a full disk, interrupts."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import cgo
from cgo import AbstractGraphListener, ModelStatus, weights
from cgo.platforms.local import LocalPlatform

TESTS = Path(__file__).parent.parent
WAIT_S = 120


def model(id_, module="support.small:mlp", kwargs=None, source="slow_points", **training):
    data = cgo.DataSpec(f"support.small:{source}", batch_size=8)
    training = {"metrics": ("accuracy",), "epochs": 3} | training
    return cgo.Model(module, kwargs, data=data, training=cgo.TrainingSpec(**training), model_id=id_)


def trials_of(pid):
    """The trial processes below a process."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if any("cgo.trial" in part for part in child.cmdline())  # in a line of code, on Python 3.10
    ]


class KillOnce(AbstractGraphListener):
    """Kills the trial as soon as a model has reported an epoch."""

    def __init__(self):
        self.killed = []

    def on_intermediate_metric(self, model, metric):
        if not self.killed:
            self.killed = trials_of(os.getpid())
            for process in self.killed:
                process.kill()

    def on_metric(self, model, metric):
        pass


def test_a_killed_trial_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    def models():
        return [
            model("a", kwargs={"dropout": 0.3}, epochs=6),
            model("b", kwargs={"hidden": 20_000}, epochs=1),
        ]

    undisturbed, disturbed = models(), models()
    with cgo.CGOEngine(tmp_path / "undisturbed") as engine:
        engine.submit_models(*undisturbed)
        engine.wait_models(timeout_s=WAIT_S)
    killer = KillOnce()
    with cgo.CGOEngine(tmp_path / "disturbed") as engine:
        engine.register_graph_listener(killer)
        engine.submit_models(*disturbed)
        engine.wait_models(timeout_s=WAIT_S)
    assert len(killer.killed) == 1
    for left, right in zip(undisturbed, disturbed):
        assert right.status is ModelStatus.TRAINED
        assert left.intermediate_metrics == right.intermediate_metrics
        state = right.state_dict()
        assert all(bool((value == state[name]).all()) for name, value in left.state_dict().items())


@pytest.mark.long
def test_a_model_that_kills_its_process_fails_alone(tmp_path):
    good, other = model("good", kwargs={"hidden": 20_000}), model("other", kwargs={"hidden": 5})
    bad = model("bad", "support.small:crashes", {"after": 3})
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(good, bad, other)
        engine.wait_models(timeout_s=WAIT_S)
    assert good.status is other.status is ModelStatus.TRAINED
    assert bad.status is ModelStatus.FAILED
    assert "SIGKILL" in bad.error
    assert "its log is" in bad.error


@pytest.fixture
def child(tmp_path):
    """An engine in a process of its own, and the lines it prints."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "support.child", str(tmp_path), "2000"],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    yield process
    process.kill()
    process.wait()


def read_until(process, start):
    seen = []
    for line in process.stdout:
        seen.append(line.strip())
        if line.startswith(start):
            return seen
    raise AssertionError(f"{start!r} was never printed; got {seen}")


def test_a_killed_engine_leaves_no_orphan_and_a_readable_experiment(child, tmp_path):
    read_until(child, "end short True")
    read_until(child, "epoch long")
    (trial,) = trials_of(child.pid)
    child.kill()
    child.wait()
    trial.wait(timeout=30)
    assert not trial.is_running()
    short, long = cgo.open_experiment(tmp_path).models()
    assert short.status is ModelStatus.TRAINED
    assert short.metric is not None
    assert "0.weight" in short.state_dict()
    assert long.status is ModelStatus.TRAINING
    assert long.intermediate_metrics


def test_an_interrupted_engine_stops_its_trial_and_keeps_what_was_reported(child, tmp_path):
    read_until(child, "end short True")
    read_until(child, "epoch long")
    (trial,) = trials_of(child.pid)
    child.send_signal(signal.SIGINT)
    lines = read_until(child, "closed")
    assert any(line.startswith("interrupted ['trained', 'cancelled']") for line in lines)
    assert child.wait(timeout=30) == 0
    assert not trial.is_running()
    short, long = cgo.open_experiment(tmp_path).models()
    assert (short.status, long.status) == (ModelStatus.TRAINED, ModelStatus.CANCELLED)
    assert long.intermediate_metrics


def test_a_full_disk_fails_the_models_with_the_reason(tmp_path):
    # A limit on file size makes every write beyond it fail, as a full disk does. The limit is
    # far above what the log takes, wherever the project lies, and far below the weights.
    platform = LocalPlatform(module="support.limited_trial", env={"PYTHONPATH": str(TESTS)})
    a = model("a", kwargs={"hidden": 20_000}, source="points")
    with cgo.CGOEngine(tmp_path, platform=platform) as engine:
        engine.submit_models(a)
        engine.wait_models(timeout_s=WAIT_S)
    assert a.status is ModelStatus.FAILED
    assert "File too large" in a.error
    assert not list(tmp_path.glob("trials/*/weights/*.safetensors"))


def test_a_checkpoint_is_whole_at_every_moment(tmp_path):
    """Kill trials at many moments; each checkpoint left behind can be gone on from."""
    from cgo.runtime import checkpoint

    a = model("a", epochs=40, source="points")
    stop = threading.Event()
    read = []

    def watch():
        while not stop.is_set():
            for folder in tmp_path.glob("trials/*"):
                if (found := checkpoint.load(folder)) is not None:
                    read.append(len(found["a"]["history"]))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(a)
        engine.wait_models(timeout_s=WAIT_S)
    stop.set()
    watcher.join()
    assert read == sorted(read)
    assert len(set(read)) > 1
    assert weights.load(next(tmp_path.glob("trials/*/weights/a.safetensors")))
