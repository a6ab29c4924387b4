"""A trial's checkpoint: one file, replaced as a whole after every epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cgo.errors import TrialError
from cgo.paths import open_plain

NAME = "checkpoint.pt"
VERSION = 1


def save(folder: Path, members: dict[str, Any]) -> None:
    """Write the checkpoint so that a crash leaves either the old one or the new one.

    Args:
        folder: The trial's folder.
        members: What each member's `dump` gave, by model id.

    Raises:
        TrialError: the disk is full, or the folder cannot be written; it says which.
    """
    partial = folder / f"{NAME}.partial"
    with partial.open("wb") as stream:
        try:
            torch.save({"version": VERSION, "members": members}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            raise TrialError(f"cannot write checkpoint {partial}: {_reason(error)}") from error
    os.replace(partial, folder / NAME)


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
