"""What a trial tells: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cgo.errors import TrialError
from cgo.graph import ModelId

Kind = Literal["started", "epoch", "final", "ended", "trial"]
KINDS: frozenset[str] = frozenset(("started", "epoch", "final", "ended", "trial"))


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
      "progress", "checkpoint" (what it does not hold, and why), "finished". Of its plan: "placed"
      (models on each device), "memory" (estimated bytes, and those measured once there are any),
      "tuned". Of steps: "captured" (seconds), "eager" (why it is not captured), "overlap" (calls
      on several streams), "compiled", "divided" (memory ran out). "stems" has the bytes and the
      number of stored values and the models that read them, or a reason why none are.
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
        TrialError: the line is not an event.
    """
    try:
        event = Event(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise TrialError(f"not an event: {line[:200]!r}") from error
    if event.kind not in KINDS or not isinstance(event.model, str):
        raise TrialError(f"not an event: {line[:200]!r}")
    return event
