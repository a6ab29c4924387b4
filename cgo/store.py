"""The experiment directory: one SQLite journal, and a folder a trial.

journal.sqlite                 models, trials, events, results (WAL)
trials/<trial>/graph.json      what the trial was given
trials/<trial>/weights/        a safetensors file a trained model
trials/<trial>/checkpoint.pt, log.txt
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cgo import weights
from cgo.demultiplexer import Demultiplexer
from cgo.errors import StoreError
from cgo.events import Event
from cgo.graph import ModelId
from cgo.graph_data import file_sha256
from cgo.model import LATER_FIELDS, DataSpec, Model, ModelStatus, TrainingSpec, as_json
from cgo.paths import inside
from cgo.platforms.base import TrialId

log = logging.getLogger(__name__)

JOURNAL = "journal.sqlite"
VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS models (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    content TEXT,
    submitted_at REAL NOT NULL,
    since INTEGER NOT NULL DEFAULT 0  -- events up to here belong to an earlier submission
);
CREATE TABLE IF NOT EXISTS trials (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    trial_id TEXT NOT NULL UNIQUE,
    models TEXT NOT NULL,
    report TEXT NOT NULL,
    started_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    trial_id TEXT NOT NULL,
    model_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    epoch INTEGER,
    value TEXT NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS events_of_model ON events (model_id, position);
CREATE UNIQUE INDEX IF NOT EXISTS events_once ON events
    (trial_id, model_id, kind, ifnull(epoch, -1)) WHERE trial_id != '-' AND kind != 'trial';
CREATE TABLE IF NOT EXISTS results (
    model_id TEXT PRIMARY KEY,
    content TEXT,
    trial_id TEXT NOT NULL,
    weights TEXT NOT NULL,
    sha256 TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS results_by_content ON results (content);
"""


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the journal has it."""

    trial_id: TrialId
    models: tuple[ModelId, ...]
    # A MergeReport as JSON; of a crashed trial's part: "part_of" which. "joined" has one for those
    # models, last in `models`, that joined while it ran.
    report: Mapping[str, Any]
    started_at: float  # seconds since the epoch


class Store:
    """The journal of one experiment; one process at a time writes to it.

    Raises:
        StoreError: the folder cannot be used, is damaged, or another engine holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lock = threading.RLock()
        try:
            (self.folder / "trials").mkdir(parents=True, exist_ok=True)
            self._held = _hold(self.folder / "lock")
            self._db = sqlite3.connect(self.folder / JOURNAL, check_same_thread=False)
            with self._db:
                self._db.execute("PRAGMA journal_mode=WAL")
                # Written is handed to the system, which keeps it whatever becomes of this process.
                # A power cut may lose the last events, whose models are then trained again.
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)
                self._db.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('version', ?)", (str(VERSION),)
                )
            _check_version(self._db, self.folder)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"experiment {self.folder} cannot be opened: {error}") from error

    def close(self) -> None:
        """Close the journal and let another process have the experiment."""
        with self._lock:
            self._db.close()
            self._held.close()

    def add_models(self, models: Sequence[Model]) -> None:
        """Write submitted models, all or none.

        One that an earlier session submitted keeps its place; unless it was trained, it begins
        anew.
        """
        rows = [(m.model_id, spec_of(m), time.time()) for m in models]
        try:
            with self._lock, self._db:
                self._db.executemany(
                    "UPDATE models SET since = (SELECT ifnull(max(position), 0) FROM events) "
                    "WHERE model_id = ? AND model_id NOT IN (SELECT model_id FROM results)",
                    [(model.model_id,) for model in models],
                )
                self._db.executemany(
                    "INSERT OR IGNORE INTO models (model_id, spec, submitted_at) VALUES (?, ?, ?)",
                    rows,
                )
        except sqlite3.Error as error:
            raise StoreError(f"experiment {self.folder}: {error}") from error

    def set_content(self, model_id: ModelId, content: str) -> None:
        """Write what decides a model's result."""
        self._write("UPDATE models SET content = ? WHERE model_id = ?", [(content, model_id)])

    def add_trial(
        self, trial_id: TrialId, models: Sequence[ModelId], report: Mapping[str, Any]
    ) -> None:
        """Write a trial that is about to start."""
        row = (trial_id, json.dumps(list(models)), json.dumps(report), time.time())
        sql = "INSERT INTO trials (trial_id, models, report, started_at) VALUES (?, ?, ?, ?)"
        self._write(sql, [row])

    def join_trial(
        self, trial_id: TrialId, models: Sequence[ModelId], report: Mapping[str, Any]
    ) -> None:
        """Write that models joined a trial; their report is one of "joined" in the trial's own."""
        with self._lock:
            ((known, text),) = self._read(
                "SELECT models, report FROM trials WHERE trial_id = ?", (trial_id,)
            )
            whole = json.loads(text)
            whole["joined"] = [*whole.get("joined", ()), dict(report)]
            row = (json.dumps([*json.loads(known), *models]), json.dumps(whole), trial_id)
            self._write("UPDATE trials SET models = ?, report = ? WHERE trial_id = ?", [row])

    def record(self, trial_id: TrialId, event: Event) -> None:
        """Write an event; a successful end makes the model's result known by its content."""
        row = (trial_id, event.model, event.kind, event.epoch, json.dumps(event.value), time.time())
        with self._lock, self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO events (trial_id, model_id, kind, epoch, value, at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
            if event.kind == "ended" and event.value["success"]:
                self._db.execute(
                    "INSERT OR REPLACE INTO results (model_id, content, trial_id, weights, sha256) "
                    "SELECT model_id, content, ?, ?, ? FROM models WHERE model_id = ?",
                    (trial_id, event.value["weights"], event.value["sha256"], event.model),
                )

    def find_result(self, content: str) -> list[tuple[TrialId, Event]] | None:
        """The events of a trained model with this content, if its weights are still there."""
        rows = self._read(
            "SELECT model_id, trial_id, weights, sha256 FROM results WHERE content = ?", (content,)
        )
        for model_id, trial_id, file, sha256 in rows:
            try:
                if file_sha256(inside(self.folder / "trials", f"{trial_id}/{file}")) == sha256:
                    return self.events(model_id)
            except (OSError, ValueError) as error:
                log.debug("weights of model %r cannot be used: %s", model_id, error)
        return None

    def trial_folder(self, trial_id: TrialId) -> Path:
        """Where a trial's files are."""
        return self.folder / "trials" / trial_id

    def next_trial_id(self) -> TrialId:
        """An id that no trial of this experiment has."""
        (count,) = self._read("SELECT COUNT(*) FROM trials")[0]
        while self.trial_folder(f"t{count:04d}").exists():
            count += 1
        return f"t{count:04d}"

    def specs(self) -> dict[ModelId, str]:
        """All models ever submitted to the experiment, each with its `spec_of`."""
        return dict(self._read("SELECT model_id, spec FROM models"))

    def events(self, model_id: ModelId) -> list[tuple[TrialId, Event]]:
        """What was told of a model, in order."""
        with self._lock:
            return _events(self._db, model_id)

    def load_state(
        self, trial_id: TrialId, ended: Mapping[str, Any]
    ) -> Callable[[], dict[str, torch.Tensor]]:
        """A function that reads a trained model's weights."""
        name = f"{trial_id}/{ended['weights']}"
        return functools.partial(_load_inside, self.folder / "trials", name)

    def _write(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        try:
            with self._lock, self._db:
                self._db.executemany(sql, rows)
        except sqlite3.Error as error:
            raise StoreError(f"experiment {self.folder}: {error}") from error

    def _read(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()


def _load_inside(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        path = inside(folder, name)
    except ValueError as error:
        raise StoreError(f"weights: {error}") from error
    return weights.load(path)


def _hold(path: Path) -> Any:
    """Hold a lock file until it is closed or the process dies."""
    stream = path.open("a")
    try:
        import fcntl
    except ImportError:  # not on Windows; there the journal's own locking has to do
        return stream
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise StoreError(
            f"experiment {path.parent} is in use by another engine; close it, or give another "
            "experiment_dir"
        ) from error
    return stream


def _check_version(db: sqlite3.Connection, folder: Path) -> None:
    (version,) = db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
    if version != str(VERSION):
        raise StoreError(f"experiment {folder} has journal version {version}, expected {VERSION}")


def spec_of(model: Model) -> str:
    """What a model was submitted with, as JSON; of an instance no more than its class."""
    instance = not isinstance(model.module, str)
    values = {
        "module": None if instance else model.module,
        "class": type(model.module).__qualname__ if instance else None,
        "kwargs": model.kwargs,
        "seed": model.seed,
        "data": as_json(model.data),
        "training": as_json(model.training),
    }
    return json.dumps(values, sort_keys=True)


class Experiment:
    """A read-only view of an experiment directory, during or after its engine's life."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if not (self.folder / JOURNAL).is_file():
            raise StoreError(f"{self.folder} is no experiment directory: it has no {JOURNAL}")
        with self._connected() as db:
            _check_version(db, self.folder)

    def models(self) -> list[Model]:
        """All models in order of submission, as their events left them.

        User modules are not imported; a model given as an `nn.Module` has its class name as
        `module`.
        """
        with self._connected() as db:
            rows = db.execute("SELECT model_id, spec FROM models ORDER BY position").fetchall()
            return [self._restored(db, model_id, json.loads(spec)) for model_id, spec in rows]

    def state_dict(self, model_id: ModelId) -> dict[str, torch.Tensor]:
        """A trained model's weights, under its module's own names.

        Raises:
            StoreError: there is no such model, or it is not trained.
        """
        for model in self.models():
            if model.model_id == model_id:
                if model.status is not ModelStatus.TRAINED:
                    raise StoreError(f"model {model_id!r} is {model.status.value}: no weights")
                return model.state_dict()
        raise StoreError(f"experiment {self.folder} has no model {model_id!r}")

    def events(self, model_id: ModelId) -> list[Event]:
        """What was told of a model, in order."""
        with self._connected() as db:
            return [event for _, event in _events(db, model_id)]

    def told_by(self, trial_id: TrialId) -> list[tuple[float, Event]]:
        """All that a trial told, in order, each with its time in seconds since the epoch."""
        with self._connected() as db:
            rows = db.execute(
                "SELECT at, model_id, kind, epoch, value FROM events WHERE trial_id = ? "
                "ORDER BY position",
                (trial_id,),
            ).fetchall()
        return [
            (at, Event(m, kind, epoch, json.loads(value))) for at, m, kind, epoch, value in rows
        ]

    def trials(self) -> list[TrialRecord]:
        """The trials in order of start."""
        with self._connected() as db:
            rows = db.execute(
                "SELECT trial_id, models, report, started_at FROM trials ORDER BY position"
            ).fetchall()
        return [
            TrialRecord(trial, tuple(json.loads(models)), json.loads(report), at)
            for trial, models, report, at in rows
        ]

    def _restored(self, db: sqlite3.Connection, model_id: ModelId, spec: dict[str, Any]) -> Model:
        model = _unchecked_model(model_id, spec)
        replay = Demultiplexer(_written_already, self._load_state)
        replay.add(model)
        for trial_id, event in _events(db, model_id):
            replay.dispatch(trial_id, event)
        return model

    def _load_state(
        self, trial_id: TrialId, ended: Mapping[str, Any]
    ) -> Callable[[], dict[str, torch.Tensor]]:
        name = f"{trial_id}/{ended['weights']}"
        return functools.partial(_load_inside, self.folder / "trials", name)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(f"{(self.folder / JOURNAL).as_uri()}?mode=ro", uri=True)
        except sqlite3.Error as error:
            raise StoreError(f"experiment {self.folder} cannot be opened: {error}") from error
        try:
            yield db
        except sqlite3.Error as error:
            raise StoreError(f"experiment {self.folder} is damaged: {error}") from error
        finally:
            db.close()


def open_experiment(folder: str | Path) -> Experiment:
    """Open a finished, interrupted or running experiment for reading.

    Raises:
        StoreError: the folder is no experiment, or its journal is damaged.
    """
    return Experiment(Path(folder))


def _written_already(trial_id: TrialId, event: Event) -> None:
    """Replayed events stand in the journal."""


def _events(db: sqlite3.Connection, model_id: ModelId) -> list[tuple[TrialId, Event]]:
    rows = db.execute(
        "SELECT trial_id, kind, epoch, value FROM events JOIN models USING (model_id) "
        "WHERE model_id = ? AND events.position > since ORDER BY events.position",
        (model_id,),
    )
    return [(t, Event(model_id, kind, epoch, json.loads(value))) for t, kind, epoch, value in rows]


def _unchecked_model(model_id: ModelId, spec: Mapping[str, Any]) -> Model:
    """A model from its journal row; its imports were checked when it was submitted."""
    model = object.__new__(Model)
    model.__dict__ |= {
        "model_id": model_id,
        "module": spec["module"] or spec["class"],
        "kwargs": spec["kwargs"],
        "seed": spec["seed"],
        "data": _unchecked(DataSpec, spec["data"]),
        "training": _unchecked(TrainingSpec, spec["training"]),
        "status": ModelStatus.SUBMITTED,
        "metric": None,
        "intermediate_metrics": [],
        "history": [],
        "error": None,
        "_load_state": None,
    }
    return model


def _unchecked(cls: type[Any], values: Mapping[str, Any]) -> Any:
    spec = object.__new__(cls)
    for name, value in (LATER_FIELDS.get(cls, {}) | dict(values)).items():
        object.__setattr__(spec, name, tuple(value) if name == "metrics" else value)
    return spec
