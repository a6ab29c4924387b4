"""A trial's checkpoint: one file, replaced as a whole after epochs."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from cgo.errors import TrialError
from cgo.graph import ModelId
from cgo.paths import open_plain, replacing
from cgo.user_code import told

log = logging.getLogger(__name__)

NAME = "checkpoint.pt"
VERSION = 1


#: Part of the time of training that goes into checkpoints: what a crash costs is the rest of it.
_MOST = 0.05


class Pace:
    """After which epochs a checkpoint is written: the first, then as often as `_MOST` allows.

    Example:
        >>> pace = Pace()
        >>> pace.due()
        True
        >>> pace.wrote(3600.0)
        >>> pace.due()
        False
        >>> pace.renew()
        >>> pace.due()
        True
    """

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        """Whether one is to be written now."""
        return time.monotonic() >= self._next

    def wrote(self, seconds: float) -> None:
        """One was written, which took so long."""
        self._next = time.monotonic() + seconds / _MOST

    def renew(self) -> None:
        """Others train from now on: the next epoch is like a first one."""
        self._next = 0.0


def save(folder: Path, members: dict[str, Any]) -> None:
    """Write the checkpoint so that a crash leaves either the old one or the new one.

    Args:
        folder: The trial's folder.
        members: What each member's `dump` gave, by model id.

    Raises:
        TrialError: the disk is full, or the folder cannot be written; it says which.
    """
    try:
        with replacing(folder / NAME) as stream:
            torch.save({"version": VERSION, "members": members}, stream)
    except (OSError, RuntimeError) as error:
        partial = folder / f"{NAME}.partial"
        raise TrialError(f"cannot write checkpoint {partial}: {_reason(error)}") from error


def check(record: Any) -> None:
    """See that a member's record could be read again.

    Raises:
        TrialError: it holds what `load` refuses, such as an object of a class of the user's.
    """
    stream = io.BytesIO()
    try:
        torch.save(record, stream)
        stream.seek(0)
        torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrialError(f"its record cannot be written and read: {told(error)}") from error


def take(source: Path, target: Path, models: Collection[ModelId]) -> None:
    """Give a trial that goes on with some of another's models their part of its checkpoint.

    Args:
        source: The other trial's folder. Without a checkpoint that can be read, there is none in
            `target` either: the models start from the beginning.
        target: The trial's own folder.
        models: What it trains.
    """
    try:
        records = load(source) or {}
    except TrialError as error:
        log.warning("%s; models %s start anew", error, ", ".join(sorted(models)))
        return
    if kept := {id_: record for id_, record in records.items() if id_ in models}:
        save(target, kept)


def end(folder: Path, models: Collection[ModelId]) -> None:
    """Let a trial that goes on pass over models whose end was told after its checkpoint.

    Args:
        folder: The trial's folder; without a checkpoint it gets one.
        models: Those that have ended.
    """
    if not models:
        return
    try:
        records = load(folder) or {}
    except TrialError as error:  # the trial itself will say so
        log.warning("%s", error)
        return
    told_ended = {"success": False, "error": "ended before", "weights": None, "sha256": None}
    late = {
        id_: {"history": [], "ended": told_ended}
        for id_ in models
        if records.get(id_, {}).get("ended") is None
    }
    if late:
        save(folder, records | late)


def _reason(error: BaseException) -> BaseException:
    """The system's own error: torch.save may hide it behind one of its archive writer's."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def load(folder: Path) -> dict[str, Any] | None:
    """Each member's record, or None when the folder has no checkpoint.

    Raises:
        TrialError: the file is damaged or of another version. It is read without unpickling code.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with open_plain(path) as stream:
            found = torch.load(stream, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not isinstance(found.get("members", {}), dict):
            raise ValueError("it has another form")
    except Exception as error:
        raise TrialError(
            f"cannot read checkpoint {path}: {error}; remove it to start over"
        ) from error
    if (version := found.get("version")) != VERSION:
        raise TrialError(f"checkpoint {path} has version {version}, expected {VERSION}")
    members: dict[str, Any] = found.get("members", {})
    return members
