"""Trials as processes on this machine; no server, no configuration."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cgo.allowed import ALLOWED_MODULES, as_text
from cgo.commands import Command
from cgo.errors import TrialError
from cgo.events import Event, events_in, is_finish
from cgo.interface import WorkerInfo
from cgo.machine import Device, cores, devices, python_command
from cgo.platforms.base import TrialExit, TrialId, TrialRequest
from cgo.platforms.logs import LAST_LINES, how_ended, last_lines
from cgo.platforms.protocol import Request, Said, Spoken
from cgo.platforms.workers import Worker, start_alone, start_serving

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

#: The file of a trial's folder that holds what it prints.
LOG = "log.txt"

#: Variables that are read when they are used, and change while a search runs: libraries set some
#: when they are imported. Any other may be read when a process starts, and is only set there.
_LATE = frozenset(
    {"PYTEST_CURRENT_TEST", "PWD", "OLDPWD", "COLUMNS", "LINES", "_", "TORCHINDUCTOR_CACHE_DIR",
     "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
)  # fmt: skip

#: Seconds between SIGTERM and SIGKILL.
GRACE_S = 5.0


@dataclass(eq=False)
class _Slot:
    """The place of one worker: a process, if there is one, and the trial that it has or awaits."""

    number: int
    worker: Worker | None = None
    running: _Running | None = None
    modules: frozenset[str] = frozenset()  # that its last trial named


@dataclass(eq=False)
class _Running:
    request: TrialRequest
    slot: _Slot
    logged: int  # bytes that its log had before it began
    worker: Worker | None = None  # whom it was given to; None: it waits for one
    again: bool = False  # it was given to one that ended without having looked at it
    cancelled: bool = False
    finished: bool = False
    commands: list[Command] = field(default_factory=list)  # that came before it was given away


class LocalPlatform:
    """Runs trials in processes of their own, one or several at once.

    The processes are started with the platform. Each has its imports behind it when a trial comes,
    and takes the next one when that has ended cleanly and left nothing behind that the next could
    notice (see `cgo.runtime.pristine`); otherwise another process takes its place. Where what was
    left came with libraries, that one imports them before its first trial, and takes no trials but
    those whose models name the same modules.

    Args:
        workers: How many trials may run at once. They all see all devices; the default is one
            trial that holds the whole machine. Without a GPU, small models train fastest with a
            worker for each core: operators of their size gain nothing from several.
        env: Environment variables for trials, over this process's own.
        module: What a trial runs; tests put another in its place.
        warm: Whether processes take several trials. Without, each trial has one of its own, which
            takes seconds to start, and none is there while no trial runs.
        max_growth_bytes: By how much a process may grow before another takes its place; default is
            2 GiB, or an eighth of the machine's memory where that is less.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        env: Mapping[str, str] | None = None,
        module: str = "cgo.trial",
        warm: bool = True,
        max_growth_bytes: int | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self._env = dict(env or {})
        self._command = python_command(module)
        self._warm, self._max_growth_bytes = warm, max_growth_bytes
        self._slots = [_Slot(number) for number in range(workers)]
        self._libraries: dict[frozenset[str], tuple[str, ...]] = {}  # by who needs them
        self._running: dict[TrialId, _Running] = {}
        self._readers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def start(
        self,
        on_event: Callable[[TrialId, Event], None],
        on_exit: Callable[[TrialExit], None],
    ) -> None:
        """Keep the callbacks, and start processes, without waiting for them."""
        self._on_event, self._on_exit = on_event, on_exit
        if self._warm:
            with self._lock:
                for slot in self._slots:
                    self._replace(slot)

    def submit(self, request: TrialRequest) -> None:
        """Give the trial to a process, once that has warmed up.

        Raises:
            TrialError: no worker is idle, or no process can be started.
        """
        with self._lock:
            slot = self._idle_slot()
            if slot is None or self._closed:
                raise TrialError(f"trial {request.trial_id}: no idle worker")
            try:
                running = _Running(request, slot, _bytes_of(request.folder / LOG))
                slot.running = self._running[request.trial_id] = running
                slot.modules = request.modules
                (self._assign if self._warm else self._start_alone)(running)
            except OSError as error:
                slot.running = None
                self._running.pop(request.trial_id, None)
                raise TrialError(f"trial {request.trial_id} cannot be started: {error}") from error

    def _idle_slot(self) -> _Slot | None:
        return next((slot for slot in self._slots if slot.running is None), None)

    def _extra(self) -> dict[str, str]:
        """What the environment of all trials has beyond this process's.

        Trials side by side share the cores; what the user has set stays.
        """
        if len(self._slots) == 1 or "OMP_NUM_THREADS" in os.environ:
            return self._env
        share = max(1, cores() // len(self._slots))
        return {"OMP_NUM_THREADS": str(share), **self._env}

    # --- processes; all locked ----------------------------------------------------------------

    def _start_alone(self, running: _Running) -> None:
        """Start a process that ends with its trial."""
        request, given = running.request, running.request.allowed_modules
        limit = {} if given is None else {ALLOWED_MODULES: as_text(given)}
        environment = trial_environment(request.import_roots, self._extra() | limit)
        command = [*self._command, str(running.request.document)]
        with (request.folder / LOG).open("ab") as log_file:
            worker = start_alone(command, environment, log_file)
        running.worker = running.slot.worker = worker
        self._read(running.slot, worker)

    def _start_serving(self, slot: _Slot) -> None:
        limit = self._max_growth_bytes
        options = [] if limit is None else ["--max-growth-bytes", str(limit)]
        slot.worker = start_serving([*self._command, *options], self._environment())
        self._read(slot, slot.worker)

    def _environment(self) -> dict[str, str]:
        """The environment of a process, to which requests add what concerns one trial."""
        return trial_environment((), self._extra())

    def _read(self, slot: _Slot, worker: Worker) -> None:
        self._readers = [reader for reader in self._readers if reader.is_alive()]
        name = f"cgo-worker-{slot.number}"
        reader = threading.Thread(target=self._follow, args=(slot, worker), name=name, daemon=True)
        self._readers.append(reader)
        reader.start()

    def _replace(self, slot: _Slot) -> None:
        """Start another process for trials to come; where that fails, the next trial tries it."""
        if self._warm and not self._closed and slot.worker is None:
            try:
                self._start_serving(slot)
            except OSError as error:
                log.warning("a worker cannot be started: %s", error)

    def _dismiss(self, slot: _Slot) -> None:
        """Kill a process that has no trial."""
        if slot.worker is not None:
            slot.worker.signal(signal.SIGKILL)
            slot.worker = None

    def _assign(self, running: _Running) -> None:
        """Give a trial to its slot's process, or let it wait until there is one that is ready.

        Much of an environment is read when a process starts, so one with another is not used.
        """
        slot = running.slot
        before = self._environment() if slot.worker is None else slot.worker.environment
        if early := _changes(before, self._environment()).keys() - _LATE:
            names = ", ".join(sorted(early))
            log.info("worker %d is replaced: the environment has other %s", slot.number, names)
            self._dismiss(slot)
        elif slot.worker is not None and not _fits(slot.worker, slot.modules):
            log.info("worker %d is replaced: it has imported libraries of others", slot.number)
            self._dismiss(slot)
        if slot.worker is None:
            self._start_serving(slot)
        assert slot.worker is not None
        if slot.worker.ready and not self._brings(slot, slot.worker):
            self._give(running, slot.worker)

    def _brings(self, slot: _Slot, worker: Worker) -> bool:
        """Let a process that is ready import libraries first, once, where it is known which.

        Importing them leaves what no other trial is to meet, so that each trial of these modules
        would end its process, and the next one would import them again, for seconds.
        """
        libraries = self._libraries.get(slot.modules)
        if not libraries or worker.brought is not None:
            return False
        worker.bring(slot.modules, libraries)
        return True

    def _give(self, running: _Running, worker: Worker) -> None:
        changes = _changes(worker.environment, self._environment())
        running.worker = worker
        worker.ask(_asked(running, changes))
        while running.commands:
            worker.tell(str(running.request.document), running.commands.pop(0))

    # --- what processes say -------------------------------------------------------------------

    def _follow(self, slot: _Slot, worker: Worker) -> None:
        """Read what a process says, as long as it is there."""
        undertaker = threading.Thread(target=worker.bury, daemon=True)
        undertaker.start()
        with os.fdopen(worker.events_fd, "r", encoding="utf-8", errors="replace") as lines:
            spoken = Spoken(lines)
            while True:
                for event in events_in(spoken, functools.partial(_refused, slot)):
                    running = slot.running
                    if running is not None and running.worker is worker:
                        self._on_event(running.request.trial_id, event)
                        running.finished |= is_finish(event)
                if spoken.said is None:
                    break
                self._hear(slot, worker, spoken.said)
        undertaker.join()
        self._ended(slot, worker, worker.process.wait())

    def _hear(self, slot: _Slot, worker: Worker, said: Said) -> None:
        if said.word == "took":
            worker.took = True
        elif said.word == "retired":
            log.info("worker %d is replaced: %s", slot.number, said.reason)
            with self._lock:
                if slot.modules:
                    before = self._libraries.get(slot.modules, ())
                    self._libraries[slot.modules] = (*before, *said.libraries)
        elif said.word == "ready":
            self._ready(slot, worker, said.reason)

    def _ready(self, slot: _Slot, worker: Worker, left: str) -> None:
        """A process has warmed up, has imported libraries, or its trial has ended cleanly."""
        with self._lock:
            if worker.bringing:
                worker.bringing, worker.alone = False, bool(left)
            ended = slot.running
            if ended is not None and ended.worker is worker:
                self._forget(ended)
            else:
                ended = None
            if worker.doomed:  # a signal is on its way; `_ended` does the rest
                worker.signal(signal.SIGKILL)
            else:
                worker.ready = worker.warmed = True
                if not self._brings(slot, worker) and slot.running is not None:
                    self._give(slot.running, worker)
        if ended is not None:
            self._report(ended, 0)

    def _ended(self, slot: _Slot, worker: Worker, code: int) -> None:
        """A process has ended; with its trial, unless that can still be given to another."""
        with self._lock:
            worker.close()
            if worker.bringing and worker.brought is not None and not worker.doomed:
                log.warning("worker %d ended as it imported libraries beforehand", slot.number)
                self._libraries[worker.brought] = ()
            if slot.worker is not worker:
                return
            slot.worker, running = None, slot.running
            if running is not None and self._waits_on(running, worker):
                running.worker, running.again = None, True
                self._replace(slot)
                if slot.worker is not None:
                    return
            if running is not None and running.worker is None:
                _add_to_log(running, worker.last_words())
            if running is not None:
                self._forget(running)
            if worker.warmed:
                self._replace(slot)
        if running is not None:
            self._report(running, code)

    def _waits_on(self, running: _Running, worker: Worker) -> bool:
        """Whether a trial has nothing to do with the end of a process that it was to run in."""
        if not self._warm or running.cancelled or running.again or self._closed:
            return False
        return worker.warmed and not (running.worker is worker and worker.took)

    def _forget(self, running: _Running) -> None:
        del self._running[running.request.trial_id]
        running.slot.running = None

    def _report(self, running: _Running, code: int) -> None:
        died = None if code == 0 and running.finished else _obituary(running, code)
        self._on_exit(TrialExit(running.request.trial_id, died, running.cancelled))

    def expect(self, modules: frozenset[str], libraries: Sequence[str]) -> None:
        """Hear of trials to come, while their models are captured.

        Args:
            modules: That they name.
            libraries: Modules of installed packages that these import.
        """
        with self._lock:
            self._libraries.setdefault(modules, tuple(libraries))
            for slot in self._slots:
                if slot.running is None:
                    slot.modules = modules
                    if slot.worker is not None and slot.worker.ready:
                        self._brings(slot, slot.worker)

    # --- from outside -------------------------------------------------------------------------

    def cancel(self, trial_id: TrialId) -> None:
        """SIGTERM, and SIGKILL if that is not obeyed within `GRACE_S`."""
        with self._lock:
            running = self._running.get(trial_id)
            if running is None or running.slot.worker is None:
                return
            running.cancelled = True
            worker = running.slot.worker
            worker.signal(signal.SIGTERM)
        timer = threading.Timer(GRACE_S, worker.signal, (signal.SIGKILL,))
        timer.daemon = True
        timer.start()

    def command(self, trial_id: TrialId, command: Command) -> bool:
        """Send a trial a command, once it has begun."""
        with self._lock:
            running = self._running.get(trial_id)
            if running is None or running.cancelled or running.finished:
                return False
            if running.worker is None:
                running.commands.append(command)
                return True
            return running.worker.tell(str(running.request.document), command)

    def worker_of(self, trial_id: TrialId) -> WorkerInfo | None:
        """The trial's worker; it holds every device of the machine."""
        with self._lock:
            running = self._running.get(trial_id)
        return None if running is None else _worker_info(running.slot.number, devices())

    def idle_workers(self) -> Sequence[WorkerInfo]:
        """Workers without a trial; each holds every device of the machine."""
        with self._lock:
            idle = [slot.number for slot in self._slots if slot.running is None]
        found = devices()
        return [_worker_info(number, found) for number in idle]

    def has_idle_worker(self) -> bool:
        """Whether `submit` would find a worker, without looking at devices."""
        with self._lock:
            return not self._closed and self._idle_slot() is not None

    def close(self) -> None:
        """Cancel all trials, end all processes, and wait until the exits are reported."""
        with self._lock:
            self._closed = True
            running = list(self._running)
            for slot in self._slots:
                if slot.running is None:
                    self._dismiss(slot)
            readers = list(self._readers)
        for trial_id in running:
            self.cancel(trial_id)
        until = time.monotonic() + 2 * GRACE_S
        for reader in readers:
            if reader is not threading.current_thread():
                reader.join(max(0.0, until - time.monotonic()))
                if reader.is_alive():
                    log.warning("%s does not end", reader.name)


def _asked(running: _Running, environment: Mapping[str, str | None]) -> Request:
    """A trial as it is asked of a process that is started already, in our current directory."""
    try:
        folder: str | None = os.getcwd()
    except OSError:  # it was removed
        folder = None
    request = running.request
    document, log_file = str(request.document), str(request.folder / LOG)
    limits = request.import_roots, request.allowed_modules, request.vouched, request.eager
    return Request(document, log_file, folder, environment, *limits)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that are others now, with their values."""
    names = before.keys() | now.keys()
    return {name: now.get(name) for name in names if before.get(name) != now.get(name)}


def _fits(worker: Worker, modules: frozenset[str]) -> bool:
    """Whether a trial whose models name these modules would import what the process has."""
    return not worker.alone or (worker.brought or frozenset()) <= modules


def _refused(slot: _Slot, reason: str) -> None:
    trial_id = "-" if slot.running is None else slot.running.request.trial_id
    log.warning("trial %s: %s", trial_id, reason)


def _bytes_of(log_file: Path) -> int:
    """How long a log is, which is made if there is none; raises `OSError`."""
    with log_file.open("ab") as stream:
        return stream.tell()


def _add_to_log(running: _Running, text: bytes) -> None:
    with contextlib.suppress(OSError), (running.request.folder / LOG).open("ab") as stream:
        stream.write(text)


def default_workers() -> int:
    """Trials side by side for a search of small models: without a GPU one for each core.

    Operators of small models gain nothing from several threads.
    """
    return 1 if devices()[0].device != "cpu" else cores()


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


def _obituary(running: _Running, code: int) -> str:
    path = running.request.folder / LOG
    how = how_ended(code)
    text = f"trial {running.request.trial_id} ended with {how}; its log is {path}"
    last = last_lines(path, LAST_LINES, running.logged)
    return f"{text}; last lines:\n{last}" if last else text


def follow_parent(fd: int) -> None:
    """In a trial: end this process when the engine's end of the pipe closes, however it died."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="cgo-follow-parent", daemon=True).start()
