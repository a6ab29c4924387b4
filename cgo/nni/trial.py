"""A trial inside NNI: the parameter says what to train, metrics tell what happens.

The parameter is what `NniPlatform` sends, or a bare GraphData document (from an advisor of one's
own). Metrics are small: events by model id, with NNI's `default` key for its web page; weights and
checkpoints stay in the trial's folder. NaN and infinity may stand in metrics, which NNI carries,
and never in parameters, where they would end its experiment.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cgo.allowed import allowed_modules
from cgo.errors import CgoError, TrialError
from cgo.events import Event, checked
from cgo.graph import ModelId
from cgo.graph_data import GraphData, file_sha256
from cgo.imports import search_first
from cgo.model import TrainingSpec
from cgo.paths import is_plain
from cgo.platforms.local import IMPORT_ROOTS
from cgo.reading import read_document
from cgo.user_code import contained, told

log = logging.getLogger(__name__)

#: The key under which a parameter is ours, and the version of its form.
KEY, VERSION = "cgo", 1

#: Bytes of a metric that are not exceeded: NNI's older channel takes 1,000,000, and beyond some
#: 50 MB metrics are lost in silence.
MOST_METRIC_BYTES = 500_000

#: Bytes of a document that travels in the parameter itself; a larger one is read from its folder.
#: NNI takes 20 MB in five seconds and drops its connection at 100; its database keeps each twice.
MOST_DOCUMENT_BYTES = 1_000_000

#: The file whose presence in a trial's folder ends the trial.
CANCELLED = "cancelled"

#: Seconds between two metrics, and between two looks at whether the trial is still wanted.
_FLUSH_S = 0.5
_WATCH_S = 0.5


@dataclass(frozen=True)
class Order:
    """What a parameter asks for."""

    trial: str
    document: GraphData
    folder: Path
    host: str = ""  # of the launcher
    pids: tuple[tuple[int, float], ...] = ()  # processes that the trial does not outlive
    refused: Mapping[ModelId, str] = field(default_factory=dict)  # models that cannot be trained


def order_of(trial: str, folder: Path, roots: Sequence[str], pids: Sequence[int]) -> dict[str, Any]:
    """The parameter for a trial whose folder holds `graph.json`.

    Args:
        trial: Its id.
        folder: On storage that the worker sees.
        roots: Folders in which the trial finds user modules.
        pids: Processes on this machine that the trial must not outlive.
    """
    path = folder.resolve() / "graph.json"
    text = path.read_text()
    inline = len(text.encode()) <= MOST_DOCUMENT_BYTES
    return {
        KEY: VERSION,
        "trial": trial,
        "folder": str(path.parent),
        "roots": list(roots),
        "document": text if inline else None,
        "sha256": file_sha256(path),
        "host": socket.gethostname(),
        "pids": [[pid, psutil.Process(pid).create_time()] for pid in pids],
    }


def read_order(parameter: Any) -> Order:
    """What a parameter asks for.

    Raises:
        TrialError: it is no order of ours, or this worker does not see the trial's folder.
        GraphDataError: the document is refused.
    """
    if not isinstance(parameter, dict):
        raise TrialError(f"the parameter is a {type(parameter).__name__}, no GraphData document")
    if KEY not in parameter:  # a bare document
        folder = Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / "cgo"
        folder.mkdir(parents=True, exist_ok=True)
        document, refused = read_document(json.dumps(parameter), folder)
        return Order("nni", document, folder, refused=refused)
    if parameter[KEY] != VERSION:
        raise TrialError(
            f"the parameter has form {parameter[KEY]!r}, this trial reads {VERSION}; use one "
            "version of cgo-engine on both sides"
        )
    try:
        return _read(parameter)
    except CgoError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TrialError(
            f"the parameter has another form than ours: {type(error).__name__}: {error}"
        ) from error


def _read(parameter: Mapping[str, Any]) -> Order:
    folder = Path(parameter["folder"])
    if not folder.is_dir():
        raise TrialError(
            f"worker {socket.gethostname()} does not see {folder}, where the trial's weights and "
            "checkpoints belong: put the experiment's folder on storage that all workers share "
            "(CGOEngine(experiment_dir=...))"
        )
    document, refused = read_document(_document(parameter, folder), folder)
    return Order(
        str(parameter["trial"]),
        document,
        folder,
        str(parameter["host"]),
        tuple((int(pid), float(born)) for pid, born in parameter["pids"]),
        refused,
    )


def _document(parameter: Mapping[str, Any], folder: Path) -> str | bytes:
    """The document's text."""
    if parameter["document"] is not None:
        return str(parameter["document"])
    path = folder / "graph.json"
    if not is_plain(path) or file_sha256(path) != parameter["sha256"]:
        raise TrialError(
            f"{path} is not the document that was submitted: the folder that worker "
            f"{socket.gethostname()} sees is another, or its copy is old"
        )
    return path.read_bytes()


class Reporter:
    """Sends events as metrics, several at once.

    Args:
        order: What is trained.
        job: NNI's id of this trial; TrialEnd names no other.
        intermediate: Sends an intermediate metric.
        final: Sends the final one.
    """

    def __init__(
        self,
        order: Order,
        job: str,
        intermediate: Callable[[Any], None],
        final: Callable[[Any], None],
    ) -> None:
        self._trial, self._job = order.trial, job
        self._intermediate, self._final = intermediate, final
        self._modes = {entry.id: _mode_of(entry.training) for entry in order.document.models}
        self._names = {entry.id: entry.training.metric_name for entry in order.document.models}
        self._events: list[Event] = []
        self._sequence = 0
        self._flushed = 0.0
        self._best: float | None = None

    def __call__(self, event: Event) -> None:
        """Take an event; sooner or later it is sent."""
        self._events.append(event)
        self._rate(event)
        urgent = event.kind in ("started", "ended")
        if urgent or time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def _rate(self, event: Event) -> None:
        """Keep the best metric so far."""
        if event.kind != "epoch":
            return
        value, mode = float(event.value[self._names[event.model]]), self._modes[event.model]
        if mode is None or not math.isfinite(value):
            return
        better = max if mode == "max" else min
        self._best = value if self._best is None else better(self._best, value)

    def flush(self) -> None:
        """Send what waits, in metrics of bounded size."""
        for part in _parts(self._events):
            events: dict[ModelId, list[Any]] = {}
            for event in part:
                row = [event.kind, event.epoch, event.value]
                events.setdefault(event.model, []).append(row)
            self._intermediate(self._payload(events=events))
            self._sequence += 1
        self._events.clear()
        self._flushed = time.monotonic()

    def finish(self, metrics: Mapping[ModelId, float]) -> None:
        """Send the final metric: all models' by id."""
        self.flush()
        self._final(self._payload(metrics=dict(metrics)))

    def _payload(self, **rest: Any) -> dict[str, Any]:
        best = {} if self._best is None else {"default": self._best}
        return {
            **best, "trial": self._trial, "job": self._job, "sequence": self._sequence,
            "pid": os.getpid(), "host": socket.gethostname(), **rest,
        }  # fmt: skip


def _mode_of(training: TrainingSpec) -> str | None:
    """Which way a metric is better; None where it does not say, or is a user's that raises."""
    try:
        with contained:
            return training.mode
    except Exception as error:
        log.info("metric %s is in no best so far: %s", training.metric_name, told(error))
        return None


def _parts(events: Sequence[Event]) -> list[list[Event]]:
    """Events in portions of bounded size, in order."""
    found: list[list[Event]] = []
    size = MOST_METRIC_BYTES
    for event in events:
        own = len(json.dumps(event.value)) + len(event.model) + 64
        if size + own > MOST_METRIC_BYTES // 2 or not found:
            found.append([])
            size = 0
        found[-1].append(event)
        size += own
    return found


def events_of(payload: Mapping[str, Any]) -> list[Event]:
    """The events of a metric.

    Raises:
        TrialError: one of them is none.
    """
    try:
        rows = [(model, *row) for model, rows in payload.get("events", {}).items() for row in rows]
        return [checked(Event(*row)) for row in rows]
    except (AttributeError, TypeError) as error:
        raise TrialError(f"not the events of a metric: {payload.get('events')!a:.200}") from error


def is_metric(payload: Any) -> bool:
    """Whether a metric has the form of ours, whatever events it holds."""
    if not isinstance(payload, dict):
        return False
    kinds = {"trial": str, "job": str, "host": str, "pid": int, "sequence": int}
    return all(type(payload.get(key)) is kind for key, kind in kinds.items())


def watch(order: Order) -> None:
    """End this process when the trial is cancelled or the processes that want it are gone."""
    here = order.host == socket.gethostname()
    pids = order.pids if here else ()

    def look() -> None:
        while True:
            if (order.folder / CANCELLED).exists():
                os._exit(143)
            if not all(map(_alive, pids)):
                os._exit(1)
            time.sleep(_WATCH_S)

    threading.Thread(target=look, name="cgo-nni-watch", daemon=True).start()


def _alive(process: tuple[int, float]) -> bool:
    """Whether a process lives, and is not another one with its number."""
    pid, born = process
    try:
        found = psutil.Process(pid)
        return abs(found.create_time() - born) < 2 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run() -> int:
    """Train what NNI's next parameter asks for; returns the exit code."""
    # Spaces are built without Lightning, whose import takes seconds.
    os.environ.setdefault("NNI_FRAMEWORK", "none")
    import nni

    from cgo import trial

    parameter = nni.get_next_parameter()
    if isinstance(parameter, dict) and parameter.get(KEY) == VERSION:
        folder = parameter.get("folder")
        if isinstance(folder, str) and Path(folder).is_dir():
            _write_log(Path(folder))
    enter_roots(parameter)  # before the document is read, which looks for what it names
    order = read_order(parameter)
    watch(order)
    report = Reporter(
        order, nni.get_trial_id(), nni.report_intermediate_result, nni.report_final_result
    )
    trial.enter(order.document)
    trial.begin(order.refused, report)
    report.finish(trial.execute(order.document, folder=order.folder, report=report))
    return 0


def enter_roots(parameter: Any) -> None:
    """Find user modules where the parameter says.

    Where modules are limited, only the trial's command says it: a folder could hold another module
    of an allowed name.
    """
    given = os.environ.get(IMPORT_ROOTS, "").split(os.pathsep)
    if allowed_modules() is None and isinstance(parameter, dict):
        named = parameter.get("roots")
        given = named if isinstance(named, list) else given
    roots = [root for root in given if root and isinstance(root, str)]
    search_first(roots)
    os.environ[IMPORT_ROOTS] = os.pathsep.join(roots)


def _write_log(folder: Path) -> None:
    """Send what this process prints to the trial's own log, as on every platform."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
