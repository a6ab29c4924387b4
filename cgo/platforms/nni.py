"""Trials as trials of an NNI experiment, on any of its training services.

One experiment and its manager are started when the first trial is submitted. NNI may hand
parameters to its trials in another order than it names them at their ends, and the end of a trial
may be told before its last metric: so trials say in each metric which of ours they are, and only
that is believed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from nni.experiment import AlgorithmConfig, Experiment, ExperimentConfig, RunMode, rest
from nni.experiment.config.training_service import TrainingServiceConfig
from nni.runtime.tuner_command_channel import TunerCommandChannel
from nni.runtime.tuner_command_channel.command_type import CommandType

from cgo.allowed import ALLOWED_MODULES, as_text
from cgo.errors import TrialError
from cgo.events import Event
from cgo.interface import WorkerInfo
from cgo.nni.trial import CANCELLED, events_of, is_metric, order_of
from cgo.platforms import guard
from cgo.platforms.base import TrialExit, TrialId, TrialRequest
from cgo.platforms.local import GRACE_S, IMPORT_ROOTS, MALLOC, THREADS
from cgo.platforms.logs import LAST_LINES, how_ended, last_lines
from cgo.platforms.nni_fence import fenced

log = logging.getLogger(__name__)

#: Seconds to wait for metrics of a trial whose end was told: of one that succeeded, of one that
#: died.
_LATE_S, _LATE_DEAD_S = 20.0, 1.0


#: Printed before a trial's exit code, which NNI does not tell.
_EXIT_CODE = "cgo.trial exit code"


@dataclass
class _Running:
    request: TrialRequest
    job: str | None = None  # NNI's id, once a metric has told it
    process: tuple[str, int] | None = None  # host and pid, likewise
    cancelled: bool = False
    heard: set[int] = field(default_factory=set)  # sequence numbers of metrics
    expected: int | None = None  # how many there are, once the final one has told it
    ended: str | None = None  # NNI's word for how it ended


class NniPlatform:
    """Runs each trial as one trial of an NNI experiment.

    NNI has no channel into a trial that runs: models that are submitted meanwhile wait for an idle
    worker, and `cancel_models` ends a trial only with the last of its models.

    Args:
        training_service: "local", another platform's name, or NNI's configuration of a training
            service, which is passed on as it is. Workers on other machines must see the experiment
            folder under the same path, and have this package installed.
        concurrency: How many trials may run at once.
        port: Of NNI's manager and web page; a free one by default.
        working_directory: Where NNI keeps its own logs; its default if not given.
        python: What starts Python on a worker; this interpreter's path by default.
        private: Whether NNI's manager and its web page are for this machine alone. NNI asks nobody
            for a password: without, whoever reaches the port can read, stop and start trials, that
            is, run code.
    """

    def __init__(
        self,
        training_service: str | TrainingServiceConfig = "local",
        *,
        concurrency: int = 1,
        port: int | None = None,
        working_directory: str | Path | None = None,
        python: str | None = None,
        private: bool = True,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        self._service, self._workers, self._port = training_service, range(concurrency), port
        self._working_directory = working_directory
        self._private = private
        self._python = python or shlex.quote(sys.executable)
        self._manager: _Manager | None = None
        self._limit: Mapping[str, str] = {}  # on what its trials import, in their environment
        self._running: dict[TrialId, _Running] = {}
        self._jobs: dict[str, TrialId] = {}
        self._lost: list[str] = []  # jobs that ended before they said whose they are
        self._lock = threading.RLock()
        self._closed = False

    def start(
        self,
        on_event: Callable[[TrialId, Event], None],
        on_exit: Callable[[TrialExit], None],
    ) -> None:
        """Keep the callbacks; the experiment begins with the first trial."""
        self._on_event, self._on_exit = on_event, on_exit

    def submit(self, request: TrialRequest) -> None:
        """Send the trial to NNI.

        Raises:
            TrialError: no worker is idle, or NNI's manager cannot be started.
        """
        with self._lock:
            if len(self._running) >= len(self._workers) or self._closed:
                raise TrialError(f"trial {request.trial_id}: no idle worker")
            manager = self._alive_manager(request)
            (request.folder / CANCELLED).unlink(missing_ok=True)
            pids = (os.getpid(), manager.pid)
            order = order_of(request.trial_id, request.folder, request.import_roots, pids)
            self._running[request.trial_id] = _Running(request)
        manager.send(order)

    def _alive_manager(self, request: TrialRequest) -> _Manager:
        limit = _limit(request)
        if self._manager is None or not self._manager.alive:
            told = self._heard, self._ended, self._died
            config = self._config(limit)
            self._manager = _Manager(config, self._port, *told, private=self._private)
            self._limit = limit
        elif limit != self._limit:
            raise TrialError(
                f"allowed_modules and import paths {limit} are not those under which NNI's manager "
                f"was started, {self._limit}: they stand in its trials' command; give each setting "
                "a platform of its own, and the engine all import_paths"
            )
        return self._manager

    def _config(self, limit: Mapping[str, str]) -> ExperimentConfig:
        service = self._service
        config = ExperimentConfig(service if isinstance(service, str) else None)
        if not isinstance(service, str):
            config.training_service = service
        given = {**MALLOC, **THREADS, **limit}
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in given.items())
        safe = "-P " if sys.version_info >= (3, 11) else ""
        command = f"env {settings} {self._python} {safe}-m cgo.trial"
        config.trial_command = f"{command}; code=$?; echo {_EXIT_CODE} $code; exit $code"
        # One more, so that a trial need not wait until NNI has noticed that the last one is over;
        # how many run is counted here.
        config.trial_concurrency = len(self._workers) + 1
        config.search_space = {}
        # NNI wants one; with a channel of ours it is not started.
        config.tuner = AlgorithmConfig(name="Random")
        config.max_trial_number = 10**6
        if self._working_directory is not None:
            config.experiment_working_directory = str(self._working_directory)
        return config

    # --- what NNI tells ---------------------------------------------------------------------------

    def _heard(self, payload: Any) -> None:
        """A metric."""
        if not is_metric(payload) or payload["trial"] not in self._running:
            return
        trial_id = payload["trial"]
        with self._lock:
            running = self._running[trial_id]
            running.job, running.process = payload["job"], (payload["host"], payload["pid"])
            self._jobs[payload["job"]] = trial_id
            if payload["sequence"] in running.heard:
                return
            if "metrics" in payload:
                running.expected = payload["sequence"]
        for event in events_of(payload):
            self._on_event(trial_id, event)
        with self._lock:
            if "metrics" not in payload:
                running.heard.add(payload["sequence"])
            complete = running.expected is not None and len(running.heard) >= running.expected
        if running.cancelled:
            self.cancel(trial_id)
        if complete:  # NNI takes seconds to notice that the process has ended
            running.ended = running.ended or "SUCCEEDED"
            self._exit(running, None)

    def _ended(self, job: str, how: str) -> None:
        """A trial of NNI's is over."""
        with self._lock:
            trial_id = self._jobs.get(job)
            if trial_id is None:
                self._lost.append(job)
                trial_id = self._certainly_lost()
            if trial_id is None or trial_id not in self._running:
                return
            running = self._running[trial_id]
            if running.job not in (None, job):  # the end of an earlier run of this trial
                return
            running.ended, running.job = how, job
        wait_s = _LATE_S if how == "SUCCEEDED" else _LATE_DEAD_S
        threading.Thread(target=self._settle, args=(running, wait_s), daemon=True).start()

    def _certainly_lost(self) -> TrialId | None:
        """A trial of ours that no job can be running: as many jobs ended unheard as are unheard.

        Which of several it was does not matter: none of them has begun.
        """
        unheard = [id_ for id_, r in self._running.items() if r.job is None and r.ended is None]
        if not unheard or len(self._lost) < len(unheard):
            return None
        self._lost.pop()
        return unheard[0]

    def _settle(self, running: _Running, wait_s: float) -> None:
        """Give metrics that are under way their time, then tell the trial's exit."""
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            with self._lock:
                if running.expected is not None and len(running.heard) >= running.expected:
                    break
            time.sleep(0.05)
        self._exit(running, self._obituary(running))

    def _exit(self, running: _Running, error: str | None) -> None:
        with self._lock:
            if self._running.pop(running.request.trial_id, None) is None:
                return
        self._on_exit(TrialExit(running.request.trial_id, error, running.cancelled))

    def _obituary(self, running: _Running) -> str | None:
        if running.expected is not None and running.ended == "SUCCEEDED":
            return None  # it has told its final metrics
        request = running.request
        manager = self._manager
        state = manager.exit_code(running.job) if manager is not None and running.job else None
        how = f"NNI: {running.ended}"
        if state is not None:
            how += f", {how_ended(128 - state if 128 < state < 160 else state)}"
        path = request.folder / "log.txt"
        text = f"trial {request.trial_id} ended ({how}); its log is {path}"
        last = last_lines(path, LAST_LINES)
        if not last and manager is not None and running.job:
            last = manager.printed(running.job)
        return f"{text}; last lines:\n{last}" if last else text

    def _died(self, manager: _Manager) -> None:
        """The manager is gone without having been asked to; its trials follow it by themselves."""
        with self._lock:
            running = list(self._running.values())
            self._lost.clear()
        for item in running:
            self._kill(item)
            self._exit(
                item, f"NNI's manager (process {manager.pid}) died; see {manager.log_folder}"
            )

    # --- cancelling -------------------------------------------------------------------------------

    def cancel(self, trial_id: TrialId) -> None:
        """The trial sees the mark in its folder and ends; if it does not, NNI is to kill it."""
        with self._lock:
            running = self._running.get(trial_id)
            if running is None:
                return
            first, running.cancelled = not running.cancelled, True
            (running.request.folder / CANCELLED).touch()
        if first:
            timer = threading.Timer(GRACE_S, self._kill, (running,))
            timer.daemon = True
            timer.start()

    def _kill(self, running: _Running) -> None:
        if running.job is not None and self._manager is not None and self._manager.alive:
            self._manager.kill(running.job)
        if running.process is not None and running.process[0] == socket.gethostname():
            _kill_trial(running.process[1])

    def idle_workers(self) -> Sequence[WorkerInfo]:
        """Places for trials; what they hold is known to NNI alone."""
        with self._lock:
            idle = len(self._workers) - len(self._running)
        name = self._service if isinstance(self._service, str) else self._service.platform
        return [WorkerInfo(f"nni-{n}", name, f"NNI {name}", 0, 0) for n in range(max(0, idle))]

    def has_idle_worker(self) -> bool:
        """Whether `submit` would find a place."""
        with self._lock:
            return len(self._running) < len(self._workers) and not self._closed

    def close(self) -> None:
        """Cancel all trials, wait for their exits, and stop the experiment."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running = list(self._running.values())
        for item in running:
            self.cancel(item.request.trial_id)
        until = time.monotonic() + 2 * GRACE_S
        while self._running and time.monotonic() < until:
            time.sleep(0.05)
        if self._manager is not None:
            self._manager.close()
        for item in list(self._running.values()):
            self._exit(item, "cancelled with its experiment")

    @property
    def web_page(self) -> str | None:
        """Where NNI shows the experiment, while it runs."""
        return None if self._manager is None else f"http://localhost:{self._manager.port}"


class _Manager:
    """NNI's manager process, with the channel on which algorithms talk to it."""

    def __init__(
        self,
        config: ExperimentConfig,
        port: int | None,
        heard: Callable[[Any], None],
        ended: Callable[[str, str], None],
        died: Callable[[_Manager], None],
        *,
        private: bool,
    ) -> None:
        self.port = port or _free_port()
        self._heard, self._told_death = heard, died
        self._closing = False
        self._number = 0
        # NNI copies a trial's code to every worker: ours is installed there, so there is none.
        self._code = tempfile.TemporaryDirectory(prefix="cgo-nni-")
        config.trial_code_directory = self._code.name
        self._experiment = Experiment(config)
        self._root = Path(config.canonical_copy().experiment_working_directory)
        url = f"ws://localhost:{self.port}/tuner"
        try:
            self._experiment._start_logging(False)
            with fenced(self.port, private=private, local=_is_local(config)):
                self._experiment._start_nni_manager(self.port, False, RunMode.Detach, url, ["cgo"])
        except Exception as error:
            raise TrialError(f"NNI's manager cannot be started: {error}") from error
        assert self._experiment._proc is not None
        self.process = self._experiment._proc
        self.pid: int = self.process.pid
        self._guard = guard.start(self.pid)
        self._channel = TunerCommandChannel(url)
        self._channel.on_initialize(lambda command: self._channel.send_initialized())
        self._channel.on_report_metric_data(self._on_metric)
        self._channel.on_trial_end(lambda command: ended(command.trial_job_id, command.event))
        self._channel.connect()
        for target in (self._listen, self._follow):
            threading.Thread(target=target, name=f"cgo-nni{target.__name__}", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs, and is to."""
        return not self._closing and self.process.poll() is None

    @property
    def log_folder(self) -> Path:
        """Where it writes."""
        return self._root / self._experiment.id / "log"

    def send(self, order: dict[str, Any]) -> None:
        """One trial."""
        number, self._number = self._number, self._number + 1
        self._channel.send_trial(number, order)

    def kill(self, job: str) -> None:
        """Kill one of its trials."""
        with contextlib.suppress(Exception):  # it is ending by itself, or the manager is
            self._channel._send(CommandType.KillTrialJob, json.dumps(job))

    def _on_metric(self, command: Any) -> None:
        value = command.value
        with contextlib.suppress(ValueError):
            value = json.loads(value) if isinstance(value, str) else value
        try:
            self._heard(value)
        except Exception:  # an exception would end the listening thread, and nobody would hear
            log.exception("a metric could not be handled")

    def _listen(self) -> None:
        stop = threading.Event()
        while self.alive:
            try:
                self._channel.listen(stop)
                return
            except Exception as error:
                log.debug("NNI's channel: %s", error)
                time.sleep(0.2)

    def _follow(self) -> None:
        self.process.wait()
        if not self._closing:
            self._told_death(self)
        self._close_guard()

    def _close_guard(self) -> None:
        """The guard kills what is left of the manager's children."""
        with contextlib.suppress(OSError):
            assert self._guard.stdin is not None
            self._guard.stdin.close()
        self._guard.wait()

    def exit_code(self, job: str) -> int | None:
        """How a trial's process ended, where NNI runs it on this machine."""
        words = self._printed(job, "trial.stdout", 1).rpartition(" ")
        return int(words[2]) if words[0] == _EXIT_CODE else None

    def printed(self, job: str) -> str:
        """The end of what a trial printed before it knew its folder."""
        return self._printed(job, "trial.stderr", 20)

    def _printed(self, job: str, name: str, count: int) -> str:
        found = self._root.glob(f"{self._experiment.id}/environments/*/trials/{job}/{name}")
        return "\n".join(last_lines(path, count) for path in found)

    def close(self) -> None:
        """Stop the experiment and wait until the process is gone."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(Exception):
            rest.delete(self.port, "/experiment")
        with contextlib.suppress(Exception):
            self.process.wait(timeout=20)
        if self.process.poll() is None:
            guard.kill_tree(self.pid)
        self._close_guard()
        with contextlib.suppress(Exception):
            self._experiment._stop_logging()
        self._code.cleanup()


def _limit(request: TrialRequest) -> dict[str, str]:
    """What limits a trial's imports; where user modules lie is part of it, and of no parameter."""
    if request.allowed_modules is None:
        return {}
    roots = os.pathsep.join(request.import_roots)
    return {ALLOWED_MODULES: as_text(request.allowed_modules), IMPORT_ROOTS: roots}


def _is_local(config: ExperimentConfig) -> bool:
    """Whether all trials run on this machine."""
    service = config.training_service
    return not isinstance(service, list) and service.platform == "local"


def _kill_trial(pid: int) -> None:
    """Kill a process, if it is a trial: its number came with a metric, which others can send."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if any("cgo.trial" in part for part in process.cmdline()):
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
