"""What a trial tells: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from cgo.errors import TrialError
from cgo.graph import ModelId
from cgo.ids import is_model_id
from cgo.paths import lies_beside

Kind = Literal["started", "epoch", "final", "ended", "trial"]
KINDS: frozenset[str] = frozenset(("started", "epoch", "final", "ended", "trial"))

#: Characters of a line that are read, and of a model's error that are sent.
MOST_LINE = 2**20
MOST_ERROR = 2**16


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one model (or, with kind "trial", to the whole trial).

    kind and value:

    - "started": None
    - "epoch" (epoch counts from 0): the epoch's row of `Model.history`
    - "final": the model's metric, a float
    - "ended": {"success": bool, "error": str | None, "weights": path relative to the trial's
      folder | None, "sha256": hash of that file | None}; always the model's last event
    - "trial" (model is ""): {"what": ..., ...figures}. Of the trial: "begun", "lowered",
      "progress", "checkpoint" (what it does not hold, and why), "finished". Of what it was told to
      do (`cgo.commands`): "added" (models of a further document, which is told before anything of
      them), "refused" (a document, and why), "joined" (models that step together from now on, and
      the seconds that making their program took, beside those of an epoch). Of its plan: "placed"
      (models on each device), "memory" (estimated bytes, and those measured once there are any),
      "tuned". Of steps: "captured" (seconds), "eager" (why it is not captured), "overlap" (calls
      on several streams), "compiled" (parts, how many of their structures were compiled for it
      and in what time, from which run of the step on; or a reason why none), "divided" (memory ran
      out). "stems" has the bytes and the number of stored values and the models that read them, or
      a reason why none are.
    """

    model: ModelId
    kind: Kind
    epoch: int | None
    value: Any


def is_finish(event: Event) -> bool:
    """Whether this is what a trial tells when all its models have ended."""
    return event.kind == "trial" and dict(event.value or {}).get("what") == "finished"


def encode(event: Event) -> str:
    """The event as one line of JSON; NaN and infinities as Python's json writes them."""
    return json.dumps(asdict(event), separators=(",", ":"))


def decode(line: str) -> Event:
    """Read one line.

    Raises:
        TrialError: the line is not an event, or one whose value is not what its kind says.
    """
    if len(line) > MOST_LINE:
        raise TrialError(f"an event of more than {MOST_LINE:,} characters")
    try:
        event = Event(**json.loads(line))
    except (TypeError, ValueError, RecursionError) as error:
        raise TrialError(f"not an event: {line[:200]!a}") from error
    return checked(event)


class Lines(Protocol):
    """What lines are read from, in parts."""

    def readline(self, size: int = -1, /) -> str:
        """The next line, or its first `size` characters; nothing at the end."""


def events_in(lines: Lines, refused: Callable[[str], None]) -> Iterator[Event]:
    """The events of a stream, as long as it lasts; no line, however long, is held as a whole.

    Args:
        lines: What a trial writes.
        refused: Told why a line is none; after a hundred it is told no more.
    """
    count = 0
    while line := lines.readline(MOST_LINE + 1):
        try:
            if len(line) > MOST_LINE:
                _skip_line(lines, line)
            yield decode(line)
        except TrialError as error:
            count += 1
            if count <= _MOST_REFUSED:
                refused(str(error) + (" (the last that is told)" if count == _MOST_REFUSED else ""))


#: Lines that are no events, of one trial, that are told of.
_MOST_REFUSED = 100


def _skip_line(lines: Lines, line: str) -> None:
    while line and not line.endswith("\n"):
        line = lines.readline(MOST_LINE)


def checked(event: Event) -> Event:
    """An event from outside this process, if it is one.

    Raises:
        TrialError: a model id that is none, an unknown kind, or a value of another form.
    """
    kind, value = event.kind, event.value
    if not isinstance(kind, str) or kind not in KINDS:
        raise TrialError(f"not an event: kind {kind!a:.60}")
    if kind == "trial" if event.model != "" else kind != "trial":
        raise TrialError(f"not an event: {kind} of model {event.model!a:.60}")
    if event.model != "" and not is_model_id(event.model):
        raise TrialError(f"not an event: {event.model!a:.120} is no model id")
    if not _FORMS[kind](value):
        raise TrialError(f"not an event: {kind} of model {event.model!a} with {value!a:.200}")
    if not _is_epoch(event.epoch) if kind == "epoch" else event.epoch is not None:
        raise TrialError(f"not an event: {kind} of {event.model!a}, epoch {event.epoch!a:.60}")
    return event


def _is_epoch(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and _is_number(number) for name, number in value.items()
    )


def _is_end(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("success")) is not bool:
        return False
    texts = {key: value.get(key) for key in ("error", "weights", "sha256")}
    if any(text is not None and not isinstance(text, str) for text in texts.values()):
        return False
    if not value["success"]:
        return isinstance(texts["error"], str)
    weights = texts["weights"]
    return weights is not None and lies_beside(weights) and texts["sha256"] is not None


def _is_figures(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("what"), str)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "started": lambda value: value is None,
    "epoch": _is_row,
    "final": _is_number,
    "ended": _is_end,
    "trial": _is_figures,
}


def cut(error: str) -> str:
    """A model's error as an event carries it: its beginning and its end, where it is long."""
    if len(error) <= MOST_ERROR:
        return error
    half = MOST_ERROR // 2
    return f"{error[:half]}\n... {len(error) - 2 * half:,} characters ...\n{error[-half:]}"
