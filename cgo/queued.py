"""What the scheduler has in hand: models to plan, trials to start, and trials that run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cgo.graph import ModelId
from cgo.model import Model
from cgo.platforms.base import TrialRequest


@dataclass
class Batch:
    """Models that are to be planned together."""

    models: list[Model]
    company: Sequence[Model] = ()  # of a share: the models of all shares
    apart: bool = False  # could not be planned with others, and is joined with none
    waits: bool = False  # did not fit beside others: for a worker of its own

    @property
    def may_join(self) -> bool:
        """Whether its models may be added to a trial that runs."""
        return not self.apart and not self.waits


@dataclass
class Part:
    """Some models of a trial that crashed, which go on in a trial of their own."""

    whole: TrialRequest
    models: list[Model]
    other: Part | None = None  # the other half
    passed: bool = False  # its trial ran to its end
    probe: bool = False  # a trial of no models: can there be any?


@dataclass
class Trial:
    """Models whose document is written; where it cannot run by itself, it may join another."""

    request: TrialRequest
    models: list[Model]  # without aliases
    part: Part | None = None
    restarts: int = 0
    done: list[ModelId] = field(default_factory=list)  # models that it is to pass over
    spoke: bool = False  # it told something
    cancels: int = 0  # how often everything had been cancelled when it began
    ids: Sequence[ModelId] = ()  # for the journal: all that were planned with it
    report: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False  # it joins no other
    adding: Trial | None = None  # was told to take this one's models, and has not answered
    closed: bool = False  # it has refused some, and is told of no more

    @property
    def open(self) -> bool:
        """Whether it may be told to take further models: none that has crashed, or may do so."""
        return not self.closed and self.adding is None and self.part is None and not self.restarts


def halves(whole: TrialRequest, models: Sequence[Model]) -> tuple[Part, Part]:
    """A trial's models, divided to find the one at fault."""
    half = len(models) // 2
    first, second = Part(whole, list(models[:half])), Part(whole, list(models[half:]))
    first.other, second.other = second, first
    return first, second
