"""Where the time of a search went, from its journal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from cgo.events import Event
from cgo.platforms.base import TrialId
from cgo.store import Experiment, TrialRecord


@dataclass(frozen=True)
class Spent:
    """One trial's seconds, in the order in which they were spent.

    `capture_s` and `merge_s` are the engine's, the others the trial's: from its submission to its
    first event, to the end of its preparations, for measurements, and for epochs. `other_s` is
    what is left until its last event. `alone_s` is what its models were estimated to take one after
    another, on one worker; None: that was not estimated.
    """

    trial_id: TrialId
    models: int
    capture_s: float
    merge_s: float
    start_s: float
    lowering_s: float
    tuning_s: float
    training_s: float
    other_s: float
    alone_s: float | None

    @property
    def total_s(self) -> float:
        """All of it."""
        parts = (field.name for field in fields(self) if field.name not in _NO_PARTS)
        return float(sum(getattr(self, name) for name in parts))


_NO_PARTS = ("trial_id", "models", "alone_s")


def timeline(experiment: Experiment) -> list[Spent]:
    """The trials of an experiment, in the order of their start; those that told anything."""
    told = ((trial, experiment.told_by(trial.trial_id)) for trial in experiment.trials())
    return [_spent(trial, events) for trial, events in told if events]


def _spent(trial: TrialRecord, told: Sequence[tuple[float, Event]]) -> Spent:
    begun = _first(told, "begun", trial.started_at)
    lowered = _first(told, "lowered", begun)
    tuning_s = sum(float(value.get("seconds", 0.0)) for value in _figures(told, "tuned"))
    training_s = max(_epochs(told), default=0.0) - tuning_s  # the first epoch makes them
    estimate = trial.report.get("estimate") or {}
    return Spent(
        trial.trial_id,
        len(trial.models),
        capture_s=trial.report.get("capture_s", 0.0),
        merge_s=trial.report.get("merge_s", 0.0),
        start_s=begun - trial.started_at,
        lowering_s=lowered - begun,
        tuning_s=tuning_s,
        training_s=max(0.0, training_s),
        other_s=max(0.0, told[-1][0] - lowered - tuning_s - max(0.0, training_s)),
        alone_s=estimate.get("plain_s"),
    )


def _first(told: Iterable[tuple[float, Event]], what: str, otherwise: float) -> float:
    """When a trial first told something of its own."""
    times = (at for at, event in told if event.kind == "trial" and event.value["what"] == what)
    return next(times, otherwise)


def _figures(told: Iterable[tuple[float, Event]], what: str) -> list[dict[str, float]]:
    trials = (event.value for _, event in told if event.kind == "trial")
    return [value for value in trials if value["what"] == what]


def _epochs(told: Iterable[tuple[float, Event]]) -> list[float]:
    """Seconds of each model's epochs; models of one loader share them."""
    seconds: dict[str, float] = {}
    for _, event in told:
        if event.kind == "epoch":
            spent = seconds.get(event.model, 0.0) + float(event.value.get("seconds", 0.0))
            seconds[event.model] = spent
    return list(seconds.values())
