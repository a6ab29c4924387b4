"""Trials as processes on this machine."""

import os
import subprocess
import sys

import psutil
import pytest
from support.contract import Heard, PlatformContract

from cgo.platforms.base import TrialRequest
from cgo.platforms.local import (
    MALLOC,
    LocalPlatform,
    trial_environment,
)


@pytest.fixture
def platform():
    return LocalPlatform()


class TestContract(PlatformContract):
    pass


def test_broken_lines_are_logged_and_do_not_stop_the_reader(tmp_path, caplog):
    platform = LocalPlatform(
        module="support.babbling_trial", env={"PYTHONPATH": "tests"}, warm=False
    )
    heard = Heard(platform)
    platform.submit(TrialRequest("t", tmp_path, ()))
    assert heard.exit().error is None
    assert [event.model for _, event in heard.events] == ["a", "b", ""]
    assert caplog.text.count("not an event") == 2
    platform.close()


def test_what_a_trial_leaves_behind_is_killed_and_keeps_nobody_waiting(tmp_path):
    platform = LocalPlatform()
    heard = Heard(platform)
    request = PlatformContract().request(tmp_path, module="support.crashers:leaves_a_child")
    platform.submit(request)
    (running,) = platform._running.values()
    worker = running.slot.worker
    assert "exit code 0" in heard.exit().error
    left = [p for p in psutil.process_iter() if _group(p) == worker.process.pid]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    platform.close()


def _group(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_output_goes_to_the_log_and_its_end_into_the_error(tmp_path):
    platform = LocalPlatform(module="support.no_such_module")
    heard = Heard(platform)
    platform.submit(TrialRequest("t", tmp_path, ()))
    error = heard.exit().error
    assert "exit code 1" in error
    assert "No module named" in error
    assert str(tmp_path / "log.txt") in error
    platform.close()


def test_a_trial_never_finds_modules_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "cgo").mkdir()
    (tmp_path / "cgo" / "__init__.py").write_text("raise RuntimeError('the wrong cgo')")
    monkeypatch.chdir(tmp_path)
    platform = LocalPlatform()
    heard = Heard(platform)
    platform.submit(TrialRequest("t", tmp_path, ()))
    error = heard.exit().error
    assert "wrong cgo" not in error
    assert "graph.json" in error
    platform.close()


def test_the_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    env = trial_environment(["/a", "/b"], {"EXTRA": "2"})
    assert env["MALLOC_TOP_PAD_"] == "1"
    assert env["EXTRA"] == "2"
    assert env["CGO_IMPORT_ROOTS"] == os.pathsep.join(["/a", "/b"])
    if sys.platform == "linux":
        assert env["MALLOC_MMAP_MAX_"] == MALLOC["MALLOC_MMAP_MAX_"]
        assert int(env["GOMP_SPINCOUNT"]) <= 10_000


def test_several_workers_run_several_trials():
    platform = LocalPlatform(workers=2)
    platform.start(lambda *_: None, lambda *_: None)
    first, second = platform.idle_workers()
    assert first.worker_id != second.worker_id
    assert first.device in ("cpu", "cuda:0") or "," in first.device
    assert 0 < first.free_memory_bytes <= first.total_memory_bytes
    with pytest.raises(ValueError, match="workers"):
        LocalPlatform(workers=0)
    platform.close()


def test_a_process_that_follows_its_parent_ends_with_it():
    code = (
        "import os, sys, time; from cgo.platforms.local import follow_parent; "
        "follow_parent(int(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    )
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(read)], pass_fds=(read,), stdout=subprocess.PIPE
    )
    os.close(read)
    assert child.stdout.readline() == b"up\n"
    os.close(write)
    assert child.wait(timeout=30) == 1
