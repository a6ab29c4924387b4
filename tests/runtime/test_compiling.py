"""The process that compiles: its failures are told, and cost nothing else."""

import json
import os
import signal
import time

import psutil
import pytest

from cgo.runtime.artifacts import Artifacts
from cgo.runtime.compiling import Compiling
from cgo.runtime.structure import Structure

UNKNOWN = Structure({"inputs": [], "calls": [["aten.none.default", {}, [0], False]], "gives": [0]})


@pytest.fixture
def compiling(tmp_path):
    found = Compiling(Artifacts(tmp_path / "own"))
    yield found
    found.close()


def test_what_the_compiler_refuses_is_told_once_and_lasts(compiling):
    assert compiling.pid is None
    compiling.ask("key", UNKNOWN)
    compiling.ask("key", UNKNOWN)
    compiling.ask("other", UNKNOWN)
    compiling.wait(["key", "other"])
    outcome = compiling.outcome("key")
    assert "none" in outcome.error
    assert outcome.lasting
    assert compiling.pid is not None  # for others


def test_a_process_that_is_killed_is_no_verdict_on_what_it_compiled(compiling):
    compiling.ask("key", UNKNOWN)
    os.kill(compiling.pid, signal.SIGKILL)
    compiling.wait(["key"])
    outcome = compiling.outcome("key")
    assert "ended" in outcome.error
    assert not outcome.lasting


def test_a_compiler_that_hangs_is_ended(tmp_path):
    compiling = Compiling(Artifacts(tmp_path / "own"), limit_s=0.0)
    compiling.ask("key", UNKNOWN)
    process = psutil.Process(compiling.pid)
    time.sleep(0.01)
    assert "within" in compiling.outcome("key").error
    assert compiling.pid is None
    assert not process.is_running()


def test_training_that_ends_waits_for_nobody(compiling):
    large = Structure({**UNKNOWN.document, "unused": "x" * 2**20})  # more than a pipe holds
    compiling.ask("key", large)
    process = psutil.Process(compiling.pid)
    compiling.close()
    assert not process.is_running()
    assert "ended" in compiling.outcome("key").error


def test_a_process_without_a_trial_ends(tmp_path):
    """Its input ends with the trial, whatever ended that."""
    import subprocess
    import sys

    program = "from cgo.runtime.compile_worker import main; main()"
    worker = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    setting = {"folder": str(tmp_path / "own"), "threads": 1, "nice": 0}
    worker.stdin.write(json.dumps(setting).encode() + b"\n")
    worker.stdin.close()
    assert worker.wait(60) == 0


def test_where_no_process_can_be_made_nothing_is_compiled(compiling, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    compiling.ask("key", UNKNOWN)
    assert "no process" in compiling.outcome("key").error
