"""What compiling parts of steps took and gained on this device, in the table of costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cgo.runtime.cost_table import CostTable

log = logging.getLogger(__name__)

#: Seconds of compiling a call, where nothing was compiled on the device yet.
_CALL_S = 0.15

_PRICE = "compiling, seconds and calls"


@dataclass(frozen=True)
class Verdict:
    """A compiled part, measured; or why there is none."""

    before_s: float
    after_s: float
    compile_s: float
    error: str | None = None

    @property
    def faster(self) -> bool:
        """Whether it is worth loading."""
        return self.error is None and self.after_s < self.before_s


class Verdicts:
    """Verdicts by the key of a compiled part.

    Args:
        table: Where they are kept.
        anew: Find none, so that everything is measured again.
    """

    def __init__(self, table: CostTable, *, anew: bool = False) -> None:
        self._table, self._anew = table, anew
        self._own: dict[str, Verdict] = {}

    def find(self, key: str) -> Verdict | None:
        """What is known."""
        if key in self._own or self._anew:
            return self._own.get(key)
        row = self._table.recall(_name(key))
        if row is None:
            return None
        if not _is_verdict(row):
            log.warning("a verdict on a compiled part has another form; it is measured again")
            return None
        return Verdict(**row)

    def add(self, key: str, verdict: Verdict) -> None:
        """Keep what was measured."""
        self._own[key] = verdict
        self._table.remember(_name(key), asdict(verdict), anew=True)

    def paid(self, seconds: float, calls: int) -> None:
        """Learn what compiling so many calls took."""
        known = self._paid()
        self._table.remember(_PRICE, [known[0] + seconds, known[1] + calls], anew=True)

    @property
    def call_s(self) -> float:
        """Expected seconds of compiling a call."""
        seconds, calls = self._paid()
        return seconds / calls if calls else _CALL_S

    def _paid(self) -> Sequence[float]:
        found = self._table.recall(_PRICE)
        known = isinstance(found, list) and len(found) == 2 and all(map(_is_number, found))
        return found if known else (0.0, 0)


def _name(key: str) -> str:
    return f"compiled {key}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_verdict(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {field.name for field in fields(Verdict)}:
        return False
    error = row["error"]
    numbers = all(_is_number(row[name]) for name in ("before_s", "after_s", "compile_s"))
    return numbers and (error is None or isinstance(error, str))


@dataclass(frozen=True)
class Swap:
    """That a step took a compiled form.

    Args:
        at: The run of the step after which it did, counted from 1; None: it was to, but training
            ended before it was compiled.
        parts: The keys of what was compiled; None: all parts.
    """

    at: int | None
    parts: tuple[str, ...] | None = None

    def as_json(self) -> Any:
        """As JSON values."""
        return {"at": self.at, "parts": None if self.parts is None else list(self.parts)}


#: A decision on a step; False: it keeps its plain form.
Decision = Swap | Literal[False]


def decision_of(value: Any) -> Decision | None:
    """A decision from JSON values; None where they are none. True is all, from the start."""
    if type(value) is bool:
        return Swap(0) if value else False
    if not isinstance(value, dict) or value.keys() != {"at", "parts"}:
        return None
    at, parts = value["at"], value["parts"]
    if not (at is None or (type(at) is int and at >= 0)):
        return None
    if parts is None:
        return Swap(at)
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return None
    return Swap(at, tuple(parts))
