"""What a platform and its worker processes write to each other: see `cgo.worker`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TextIO

#: How lines of the worker's own begin; those of events begin with their model.
_OWN = '{"worker": '


@dataclass(frozen=True)
class Request:
    """One trial, as a platform asks for it.

    `folder` is the current directory, which relative paths lead from; None: it stays as it is.
    `environment` holds variables that are other than when the worker was started; None: not set.
    `vouched` is the SHA-256 of a document whose operators need not be tried. `eager`: see
    `TrialRequest`.
    """

    document: str
    log: str
    folder: str | None
    environment: Mapping[str, str | None]
    import_roots: tuple[str, ...] = ()
    allowed_modules: tuple[str, ...] | None = None
    vouched: str | None = None
    eager: bool = True

    def line(self) -> str:
        """The request as it is written."""
        return json.dumps({"do": "train", **asdict(self)}) + "\n"


@dataclass(frozen=True)
class Bring:
    """Libraries that trials to come import anyway, to be imported before them."""

    libraries: tuple[str, ...]

    def line(self) -> str:
        """The demand as it is written."""
        return json.dumps({"do": "bring", **asdict(self)}) + "\n"


@dataclass(frozen=True)
class Order:
    """A command for the trial of a document, a line of `cgo.commands`; others let it pass."""

    document: str
    command: str

    def line(self) -> str:
        """The order as it is written."""
        return json.dumps({"do": "tell", **asdict(self)}) + "\n"


@dataclass(frozen=True)
class Said:
    """A line of the worker's own: `ready`, `took` or `retired`.

    The last with a reason, and with the libraries that the trial has imported, in their order; the
    first with one where libraries that it was asked to import left something behind.
    """

    word: str
    reason: str = ""
    resident_bytes: int = 0
    libraries: tuple[str, ...] = ()

    def line(self) -> str:
        """The line as it is written."""
        rest = asdict(self)
        return json.dumps({"worker": rest.pop("word"), **rest}) + "\n"


def read_said(line: str) -> Said | None:
    """What a line of the worker's own says; None of any other line."""
    if not line.startswith(_OWN):
        return None
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(line)
        said = str(found["worker"]), str(found["reason"]), int(found["resident_bytes"])
        return Said(*said, tuple(map(str, found["libraries"])))
    return None


class Spoken:
    """The lines of a worker, trial by trial: to a reader of events each trial ends like a stream.

    Args:
        lines: What the worker writes.
    """

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._whole = True  # the last line that was read had an end
        self.said: Said | None = None  # at which the last trial ended; None: the stream did

    def readline(self, size: int = -1) -> str:
        """The next line, or its beginning; nothing at the end of a trial and of the stream."""
        line = self._lines.readline(size)
        self.said = read_said(line) if self._whole else None
        self._whole = not line or line.endswith("\n")
        return line if self.said is None else ""
