"""Trials as processes on this machine; no server, no configuration."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cgo.allowed import ALLOWED_MODULES, as_text
from cgo.errors import TrialError
from cgo.events import Event, events_in, is_finish
from cgo.interface import WorkerInfo
from cgo.machine import Device, devices
from cgo.paths import open_plain
from cgo.platforms.base import TrialExit, TrialId, TrialRequest
from cgo.text import printable

log = logging.getLogger(__name__)

IMPORT_ROOTS = "CGO_IMPORT_ROOTS"

#: Set in a trial's process, and so in all that it starts.
IN_TRIAL = "CGO_IN_TRIAL"

#: Keep freed memory in the process: with glibc's defaults, large tensors are mapped, zeroed and
#: unmapped at every step, which costs up to a factor of two.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}

#: Waiting threads sleep soon. By default those of GNU OpenMP, which torch uses on Linux, spin for
#: long: beside another busy process each parallel operator then waits for a time slice (a step of
#: eight small networks on two busy cores: over 6 s, with this 0.4 s; on idle cores no difference).
THREADS = {"GOMP_SPINCOUNT": "10000"}

#: Seconds between SIGTERM and SIGKILL.
GRACE_S = 5.0

#: Lines of a trial's log in its error, and characters of a line.
LAST_LINES, _WIDEST = 30, 300

#: Of a log, what is looked at for its last lines.
_TAIL_BYTES = 2**16

#: Without -P (new in Python 3.11), Python puts the current directory on the module path.
_UNSAFE_PATH = (
    "import runpy, sys; sys.path[:] = [p for p in sys.path if p]; "
    "runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


@dataclass
class _Running:
    request: TrialRequest
    worker: int
    process: subprocess.Popen[bytes]
    parent_fd: int  # closing it ends the trial
    logged: int  # bytes that its log had before it began
    cancelled: bool = False
    reader: threading.Thread | None = None


class LocalPlatform:
    """Runs each trial in a process of its own.

    Args:
        workers: How many trials may run at once. They all see all devices; the default is one
            trial that holds the whole machine. Without a GPU, small models train fastest with a
            worker for each core: operators of their size gain nothing from several.
        env: Environment variables for trials, over this process's own.
        module: What a trial runs; tests put another in its place.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        module: str = "cgo.trial",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self._env = dict(env or {})
        self._module = module
        self._workers = range(workers)
        self._running: dict[TrialId, _Running] = {}
        self._lock = threading.Lock()
        self._closed = False

    def start(
        self,
        on_event: Callable[[TrialId, Event], None],
        on_exit: Callable[[TrialExit], None],
    ) -> None:
        """Keep the callbacks; trials are started by `submit`."""
        self._on_event, self._on_exit = on_event, on_exit

    def submit(self, request: TrialRequest) -> None:
        """Start the trial's process.

        Raises:
            TrialError: no worker is idle, or the process cannot be started.
        """
        with self._lock:
            worker = self._idle_worker()
            if worker is None or self._closed:
                raise TrialError(f"trial {request.trial_id}: no idle worker")
            events, running = self._launch(request, worker)
            self._running[request.trial_id] = running
        reader = threading.Thread(
            target=self._follow,
            args=(running, events),
            name=f"cgo-{request.trial_id}",
            daemon=True,
        )
        running.reader = reader
        reader.start()

    def _extra(self, request: TrialRequest) -> dict[str, str]:
        """What a trial's environment has beyond this process's."""
        given = request.allowed_modules
        limit = {} if given is None else {ALLOWED_MODULES: as_text(given)}
        return self._threads() | self._env | limit

    def _threads(self) -> dict[str, str]:
        """Trials side by side share the cores; what the user has set stays."""
        if len(self._workers) == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(self._workers)))}

    def _idle_worker(self) -> int | None:
        busy = {running.worker for running in self._running.values()}
        return next((worker for worker in self._workers if worker not in busy), None)

    def _launch(self, request: TrialRequest, worker: int) -> tuple[int, _Running]:
        events_read, events_write = os.pipe()
        parent_read, parent_write = os.pipe()
        options = ["--events-fd", str(events_write), "--parent-fd", str(parent_read)]
        command = [*_python(self._module), str(request.folder / "graph.json"), *options]
        try:
            with (request.folder / "log.txt").open("ab") as log_file:
                logged = log_file.tell()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    env=trial_environment(request.import_roots, self._extra(request)),
                    pass_fds=(events_write, parent_read),
                    start_new_session=True,
                )
        except OSError as error:
            os.close(events_read)
            os.close(parent_write)
            raise TrialError(f"trial {request.trial_id} cannot be started: {error}") from error
        finally:
            os.close(events_write)
            os.close(parent_read)
        return events_read, _Running(request, worker, process, parent_write, logged)

    def _follow(self, running: _Running, events: int) -> None:
        """Read a trial's events until it closes its end, then report its exit."""
        trial_id = running.request.trial_id
        undertaker = threading.Thread(target=self._bury, args=(running,), daemon=True)
        undertaker.start()
        finished = False
        with os.fdopen(events, "r", encoding="utf-8", errors="replace") as lines:
            refused = functools.partial(log.warning, "trial %s: %s", trial_id)
            for event in events_in(lines, refused):
                self._on_event(trial_id, event)
                finished |= is_finish(event)
        undertaker.join()
        code = running.process.wait()
        with self._lock:
            del self._running[trial_id]
        os.close(running.parent_fd)
        died = None if code == 0 and finished else _obituary(running, code)
        self._on_exit(TrialExit(trial_id, died, running.cancelled))

    def _bury(self, running: _Running) -> None:
        """When a trial has ended, kill what it leaves: that would hold its pipe and its memory."""
        _await_end(running.process.pid)
        with self._lock:
            # Before it is waited for, so that its number is not another's by now; see `_signal`.
            _signal(running, signal.SIGKILL)
            running.process.wait()

    def cancel(self, trial_id: TrialId) -> None:
        """SIGTERM, and SIGKILL if that is not obeyed within `GRACE_S`."""
        with self._lock:
            running = self._running.get(trial_id)
            if running is None:
                return
            running.cancelled = True
            _signal(running, signal.SIGTERM)
        timer = threading.Timer(GRACE_S, self._kill, (running,))
        timer.daemon = True
        timer.start()

    def _kill(self, running: _Running) -> None:
        with self._lock:
            _signal(running, signal.SIGKILL)

    def idle_workers(self) -> Sequence[WorkerInfo]:
        """Workers without a trial; each holds every device of the machine."""
        with self._lock:
            busy = {running.worker for running in self._running.values()}
        found = devices()
        return [_worker_info(worker, found) for worker in self._workers if worker not in busy]

    def has_idle_worker(self) -> bool:
        """Whether `submit` would find a worker, without looking at devices."""
        with self._lock:
            return not self._closed and self._idle_worker() is not None

    def close(self) -> None:
        """Cancel all trials and wait until their exits are reported."""
        with self._lock:
            self._closed = True
            running = list(self._running.values())
        for item in running:
            self.cancel(item.request.trial_id)
        for item in running:
            if item.reader is not None and item.reader is not threading.current_thread():
                item.reader.join(2 * GRACE_S)
                if item.reader.is_alive():
                    log.warning("trial %s does not end", item.request.trial_id)


def _python(module: str) -> list[str]:
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _UNSAFE_PATH.format(module=module)]


def default_workers() -> int:
    """Trials side by side for a search of small models: without a GPU one for each core.

    Operators of small models gain nothing from several threads.
    """
    return 1 if devices()[0].device != "cpu" else os.cpu_count() or 1


def trial_environment(import_roots: Sequence[str], extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a trial's process; what the user has set stays."""
    env = dict(os.environ)
    if sys.platform == "linux":
        env = {**THREADS, **env}
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        env = {**MALLOC, **env}
    else:
        log.info("allocator settings of trials are left alone: no glibc on %s", sys.platform)
    env[IMPORT_ROOTS] = os.pathsep.join(import_roots)
    env["PYTHONUNBUFFERED"] = "1"
    return {**env, **extra}


def _worker_info(worker: int, found: Sequence[Device]) -> WorkerInfo:
    first = found[0]
    return WorkerInfo(
        worker_id=f"local-{worker}",
        device=",".join(device.device for device in found),
        device_name=first.name if len(found) == 1 else f"{len(found)} x {first.name}",
        total_memory_bytes=sum(device.total_memory_bytes for device in found),
        free_memory_bytes=sum(device.free_memory_bytes for device in found),
    )


def _signal(running: _Running, number: int) -> None:
    """Signal a trial and all that it has started, unless it has been waited for; locked."""
    if running.process.returncode is None:
        # Gone in between, or (on macOS) nothing but a process that has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(running.process.pid, number)


def _await_end(pid: int) -> None:
    """Block until a child has ended, and leave it to be waited for."""
    # Where nobody may wait for children (SIGCHLD is ignored), there is nothing to be left.
    with contextlib.suppress(ChildProcessError, psutil.NoSuchProcess):
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return
        child = psutil.Process(pid)  # macOS, before Python 3.13
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)


def _obituary(running: _Running, code: int) -> str:
    path = running.request.folder / "log.txt"
    how = how_ended(code)
    text = f"trial {running.request.trial_id} ended with {how}; its log is {path}"
    last = last_lines(path, LAST_LINES, running.logged)
    return f"{text}; last lines:\n{last}" if last else text


def how_ended(code: int) -> str:
    """An exit code in words; negative, it is the number of the signal that killed the process."""
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"signal {known.get(-code, -code)}"
    return f"exit code {code}" if code else "exit code 0, before its models had ended"


def last_lines(path: Path, count: int, start: int = 0) -> str:
    """The end of a log, in lines of bounded length, fit for a terminal; nothing where it is none.

    Args:
        path: The log.
        count: The most lines.
        start: The byte from which it counts.
    """
    try:
        with open_plain(path) as stream:  # of a log of any size
            stream.seek(max(start, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = stream.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    lines = text.splitlines()[-count:]
    cut = [f"{line[:_WIDEST]} ..." if len(line) > _WIDEST else line for line in lines]
    return printable("\n".join(cut))


def follow_parent(fd: int) -> None:
    """In a trial: end this process when the engine's end of the pipe closes, however it died."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="cgo-follow-parent", daemon=True).start()
