"""From a trial's stream of events to `Model` attributes, listeners and wake-ups.

Everything is keyed by model id, never by position. One thread calls `dispatch`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cgo.events import Event
from cgo.graph import ModelId
from cgo.interface import AbstractGraphListener
from cgo.model import Model, ModelStatus
from cgo.platforms.base import TrialId
from cgo.user_code import contained

log = logging.getLogger(__name__)

#: Writes an event down; called before anyone is told of it.
Record = Callable[[TrialId, Event], None]
#: How to read a trained model's weights, given its trial and its "ended" value.
LoadState = Callable[[TrialId, Mapping[str, Any]], Callable[[], dict[str, torch.Tensor]]]


@dataclass
class _Track:
    """What has been heard of one model."""

    model: Model
    final: bool = False
    early: dict[int, tuple[TrialId, Event]] = field(default_factory=dict)  # epochs ahead of a gap


class Demultiplexer:
    """Hands each model its own events.

    Args:
        record: Writes an event into the journal.
        load_state: Makes the function behind `Model.state_dict`.
    """

    def __init__(self, record: Record, load_state: LoadState) -> None:
        self._record = record
        self._load_state = load_state
        self._tracks: dict[ModelId, _Track] = {}
        self._aliases: dict[ModelId, list[ModelId]] = {}
        self._listeners: list[AbstractGraphListener] = []
        self._ended: set[ModelId] = set()
        self._changed = threading.Condition()

    def add(self, model: Model) -> None:
        """Expect events of a model; its attributes will follow them."""
        self._tracks[model.model_id] = _Track(model)

    def alias(self, alias: ModelId, twin: ModelId) -> None:
        """Give `alias` every event of `twin` from now on; both were added."""
        self._aliases.setdefault(twin, []).append(alias)

    def aliases_of(self, twin: ModelId) -> tuple[ModelId, ...]:
        """The models that get this one's events as well."""
        return tuple(self._aliases.get(twin, ()))

    def register(self, listener: AbstractGraphListener) -> None:
        """Call a listener for every event from now on."""
        self._listeners.append(listener)

    def dispatch(self, trial_id: TrialId, event: Event) -> None:
        """Take one event; late, repeated and unknown ones are logged and change nothing."""
        if event.kind == "trial":
            self._write_down(trial_id, event)
            return
        if event.model not in self._tracks:
            log.warning("trial %s: event for unknown model %r", trial_id, event.model)
            return
        for id_ in (event.model, *self.aliases_of(event.model)):
            self._take(trial_id, replace(event, model=id_))

    def end(self, trial_id: TrialId, event: Event) -> None:
        """Take the end of one model, and of none that equals it; further events change nothing."""
        if not self.ended(event.model):
            self._take(trial_id, event)

    def _write_down(self, trial_id: TrialId, event: Event) -> None:
        """Into the journal; one that cannot be written keeps nobody waiting."""
        try:
            self._record(trial_id, event)
        except Exception:
            log.exception("trial %s: %s of model %r is not in the journal",
                          trial_id, event.kind, event.model)  # fmt: skip

    def wait(self, ids: Iterable[ModelId], timeout_s: float | None = None) -> bool:
        """Block until all these models have ended; False when the time ran out first."""
        wanted = set(ids)
        with self._changed:
            return self._changed.wait_for(lambda: wanted <= self._ended, timeout_s)

    def ended(self, id_: ModelId) -> bool:
        """Whether nothing more will be told of a model."""
        with self._changed:
            return id_ in self._ended

    def settled(self, id_: ModelId) -> bool:
        """Whether neither a model nor one that gets its events waits for any."""
        with self._changed:
            return self._ended.issuperset((id_, *self.aliases_of(id_)))

    def _take(self, trial_id: TrialId, event: Event) -> None:
        track = self._tracks[event.model]
        if event.model in self._ended:
            cancelled = track.model.status is ModelStatus.CANCELLED  # it may train on for a while
            level = logging.DEBUG if cancelled else logging.WARNING
            log.log(level, "trial %s: late event %s of model %r", trial_id, event.kind, event.model)
            return
        match event.kind:
            case "started":
                self._started(track, trial_id, event)
            case "epoch":
                self._epoch(track, trial_id, event)
            case "final":
                self._final(track, trial_id, event)
            case "ended":
                self._end(track, trial_id, event)
            case _:
                log.warning("trial %s: unknown event kind %r", trial_id, event.kind)

    def _started(self, track: _Track, trial_id: TrialId, event: Event) -> None:
        if track.model.status is not ModelStatus.SUBMITTED:
            log.debug("trial %s: model %r started again", trial_id, event.model)
            return
        self._write_down(trial_id, event)
        track.model.status = ModelStatus.TRAINING

    def _epoch(self, track: _Track, trial_id: TrialId, event: Event) -> None:
        """Epochs are told in order; one that comes ahead of a gap waits for the missing ones."""
        done, training = len(track.model.history), track.model.training
        if training.metric_name not in event.value or (event.epoch or 0) >= training.epochs:
            log.warning("trial %s: epoch %s of %r is none", trial_id, event.epoch, event.model)
            return
        if event.epoch is None or event.epoch < done or event.epoch in track.early:
            log.info("trial %s: repeated epoch %s of %r", trial_id, event.epoch, event.model)
            return
        track.early[event.epoch] = (trial_id, event)
        if event.epoch > done:
            log.warning(
                "trial %s: epoch %d of model %r came before epoch %d",
                trial_id, event.epoch, event.model, done,
            )  # fmt: skip
        while (ready := track.early.pop(len(track.model.history), None)) is not None:
            self._tell_epoch(track, *ready)

    def _tell_epoch(self, track: _Track, trial_id: TrialId, event: Event) -> None:
        self._write_down(trial_id, event)
        model = track.model
        model.status = ModelStatus.TRAINING
        model.history.append(dict(event.value))
        metric = float(event.value[model.training.metric_name])
        model.intermediate_metrics.append(metric)
        self._call("on_intermediate_metric", model, metric)

    def _flush(self, track: _Track) -> None:
        """Tell epochs that waited for ones that never came."""
        for epoch in sorted(track.early):
            log.warning("model %r: an epoch before %d is missing", track.model.model_id, epoch)
            self._tell_epoch(track, *track.early.pop(epoch))

    def _final(self, track: _Track, trial_id: TrialId, event: Event) -> None:
        if track.final:
            log.info("trial %s: repeated final metric of %r", trial_id, event.model)
            return
        self._flush(track)
        self._write_down(trial_id, event)
        track.final = True
        track.model.metric = float(event.value)
        self._call("on_metric", track.model, track.model.metric)

    def _end(self, track: _Track, trial_id: TrialId, event: Event) -> None:
        self._flush(track)
        model, success = track.model, bool(event.value["success"])
        if success and not track.final:
            log.warning("model %r ended without its final metric", model.model_id)
            metric = model.intermediate_metrics[-1] if model.intermediate_metrics else float("nan")
            self._final(track, trial_id, Event(model.model_id, "final", None, metric))
        self._write_down(trial_id, event)
        if success:
            model.status = ModelStatus.TRAINED
            model._load_state = self._load_state(trial_id, event.value)
        else:
            cancelled = bool(event.value.get("cancelled"))
            model.status = ModelStatus.CANCELLED if cancelled else ModelStatus.FAILED
            model.metric = None
            model.error = event.value["error"]
        self._call("on_training_end", model, success)
        with self._changed:
            self._ended.add(model.model_id)
            self._changed.notify_all()

    def _call(self, method: str, model: Model, value: float | bool) -> None:
        for listener in tuple(self._listeners):
            try:
                with contained:
                    getattr(listener, method)(model, value)
            except Exception:
                log.exception(
                    "listener %s.%s raised for model %r",
                    type(listener).__name__, method, model.model_id,
                )  # fmt: skip
