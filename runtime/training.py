"""The training loop of a trial."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cgo import weights
from cgo.errors import CgoError, DataError
from cgo.events import Event
from cgo.graph import ModelId
from cgo.graph_data import GraphData, ModelEntry
from cgo.runtime import checkpoint
from cgo.runtime.data import Leaves, Loader, open_data, target_of
from cgo.runtime.lanes import MergedLanes, OpaqueLane, Outcome, Result
from cgo.runtime.member import Member, Report
from cgo.runtime.meters import EvaluationMeter
from cgo.runtime.stems import StemStore, plan_stems
from cgo.runtime.tuning import Record, Tuner, make_tuner
from cgo.tuning import Tuning

log = logging.getLogger(__name__)

#: The file of a trial's folder that holds its lowering choices.
RECORD = "lowering.json"

#: Steps between two looks at the losses on a GPU.
_LOOK_EVERY = 64


class Observer(Protocol):
    """Sees every step, for tests and measurements; each call may cost a synchronisation."""

    def on_loss(self, model: ModelId, step: int, loss: Tensor) -> None:
        """A model's training loss in its step `step` (from 0, over all epochs)."""

    def on_gradients(
        self, model: ModelId, step: int, gradients: Mapping[str, Tensor | None]
    ) -> None:
        """Its gradients before clipping, by parameter name."""


def train(
    data: GraphData,
    folder: Path,
    report: Callable[[Event], None],
    *,
    observer: Observer | None = None,
    device: torch.device | None = None,
) -> dict[ModelId, float]:
    """Train all models of a document, and say what happens to each.

    Args:
        data: What to train.
        folder: Where weights and the checkpoint go; with a checkpoint in it, training goes on.
        report: Called with each event, in order.
        observer: Sees every step.
        device: Where to train; default is the first CUDA device, or the CPU.

    Returns:
        Each trained model's final metric, aliases included.

    Raises:
        GraphDataError: files that the document refers to are missing or changed.
        TrialError: the checkpoint in the folder cannot be read.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.check_files()
    trial = _Trial(data, folder, report, observer, device)
    trial.run()
    return trial.metrics()


class _Trial:
    def __init__(
        self,
        data: GraphData,
        folder: Path,
        report: Report,
        observer: Observer | None,
        device: torch.device,
    ) -> None:
        started = time.perf_counter()
        self.data, self.folder, self.report, self.device = data, folder, report, device
        self.members: dict[ModelId, Member] = {}
        for entry in data.models:
            member = self._member(entry)
            if member is not None:
                self.members[entry.id] = member
        self._resume()
        constants = self._constants()
        choose = self._tuner()
        self.cohorts = [
            Cohort(data, key, members, constants, device, observer, choose)
            for key, members in self._by_data().items()
        ]
        seconds = time.perf_counter() - started
        self._tell("lowered", models=len(self.members), loaders=len(self.cohorts), seconds=seconds)

    def _member(self, entry: ModelEntry) -> Member | None:
        try:
            return Member(entry, self.data, self.device, self.folder, self.report)
        except CgoError as error:
            ended = {"success": False, "error": str(error), "weights": None, "sha256": None}
            self.report(Event(entry.id, "ended", None, ended))
            return None

    def _resume(self) -> None:
        records = checkpoint.load(self.folder) or {}
        for id_, member in self.members.items():
            if id_ in records:
                member.load(records[id_])

    def _tuner(self) -> Tuner:
        tuning = Tuning.from_json(self.data.experiment.get("tuning", {}))
        record = Record(self.folder / RECORD, self.device, tuning.record)
        return make_tuner(tuning, self.device, record=record, tell=self._tell)

    def _constants(self) -> dict[str, Tensor]:
        if self.data.constants is None:
            return {}
        stored = weights.load(self.data.base / self.data.constants.file)
        return {content: value.to(self.device) for content, value in stored.items()}

    def _by_data(self) -> dict[str, list[Member]]:
        grouped: dict[str, list[Member]] = {}
        for member in self.members.values():
            grouped.setdefault(member.entry.data, []).append(member)
        return grouped

    def run(self) -> None:
        """Train epoch by epoch; models of different loaders take turns."""
        for member in self.members.values():
            member.start()
        while any(member.running for member in self.members.values()):
            for cohort in self.cohorts:
                if cohort.running():
                    cohort.epoch()
                cohort.merged.sync()
            checkpoint.save(self.folder, {id_: m.dump() for id_, m in self.members.items()})
        self._tell("finished")

    def metrics(self) -> dict[ModelId, float]:
        """Final metrics of what was trained."""
        found = {
            id_: member.history[-1][member.entry.training.metric_name]
            for id_, member in self.members.items()
            if member.ended is not None and member.ended["success"]
        }
        return found | {a: found[twin] for a, twin in self.data.aliases.items() if twin in found}

    def _tell(self, what: str, **figures: Any) -> None:
        self.report(Event("", "trial", None, {"what": what, **figures}))


class Cohort:
    """The models that share a loader; they see the same batches in the same order."""

    def __init__(
        self,
        data: GraphData,
        key: str,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        device: torch.device,
        observer: Observer | None,
        tuner: Tuner,
    ) -> None:
        self.spec = data.data[key]
        self.members = {member.id: member for member in members}
        self.observer = observer
        self.device = device
        captured = [member for member in members if member.entry.opaque is None]
        self.tuner = tuner
        self._graph, self._constants = data.graph, constants
        self._lanes = partial(
            MergedLanes, members=captured, constants=constants, device=device, choose=tuner
        )
        self.merged = self._lanes(data.graph)
        self._stems: StemStore | None = None  # None: every step computes its stem
        self.opaque = {m.id: OpaqueLane(m) for m in members if m.entry.opaque is not None}
        self._loader: Loader | None = None

    def running(self) -> list[Member]:
        """Models that still train."""
        return [member for member in self.members.values() if member.running]

    def epoch(self) -> None:
        """One epoch of every running model that is furthest behind, then its evaluation."""
        behind = min(len(member.history) for member in self.running())
        members = [member for member in self.running() if len(member.history) == behind]
        started = time.perf_counter()
        for member in members:
            member.begin_epoch()
        try:
            loader = self._open()
            self._train(loader, behind, members)
            members = [member for member in members if member.running]
            rows = self._evaluate(loader, members) if members else {}
        except DataError as error:
            self._fail_all(members, error)
            return
        seconds = time.perf_counter() - started
        for member in members:
            if member.running:
                member.updater.end_epoch()
                member.end_epoch(rows[member.id], seconds)
            if not member.running:
                self.merged.forget(member.id)

    def _open(self) -> Loader:
        if self._loader is None:
            self._loader = Loader(open_data(self.spec), self.device)
            epochs = max(member.entry.training.epochs for member in self.members.values())
            self.tuner.steps = epochs * len(self._loader.data.train_sizes)
            self._store_stems(self._loader)
        return self._loader

    def _store_stems(self, loader: Loader) -> None:
        """Let the models read stored values of their stems, where that repays."""
        captured = {m.id: m for m in self.running() if m.entry.opaque is None}
        try:
            self._stems = plan_stems(
                self._graph,
                captured,
                self._constants,
                loader.data,
                self.device,
                self.tuner.tuning,
                tell=self.tuner.tell,
            )
        except Exception as error:
            self._compute_stems(error)
        if self._stems is not None:
            self.merged = self._lanes(self._stems.rest)

    def _extended(self, leaves: Leaves, size: int) -> Leaves:
        """The batch with stored values; without a store that works, the steps compute them."""
        if self._stems is None:
            return leaves
        try:
            return self._stems.extend(leaves, size)
        except Exception as error:
            self._compute_stems(error)
            return leaves

    def _compute_stems(self, error: Exception) -> None:
        """Go on without stored values: they only save time, so that no model fails for them."""
        log.warning("stems are not stored: %s: %s", type(error).__name__, error)
        self.tuner.tell("stems", bytes=0, values=0, models=0, reason=str(error))
        self.merged.sync()
        self._stems, self.merged = None, self._lanes(self._graph)

    def _fail_all(self, members: Sequence[Member], error: DataError) -> None:
        for member in members:
            if member.running:
                self._fail(member, error)

    def _fail(self, member: Member, error: Exception) -> None:
        text = str(error) if isinstance(error, CgoError) else f"{type(error).__name__}: {error}"
        member.fail(text)
        self.merged.forget(member.id)

    def _train(self, loader: Loader, epoch: int, members: Sequence[Member]) -> None:
        step = epoch * len(loader.data.train_sizes)
        running = [member for member in members if member.running]
        if self._stems is not None:
            self._stems.begin("train", epoch)
        for size, leaves in loader.train(epoch):
            for member in running:
                member.updater.zero_grad()
            learned = []
            for member, outcome in self._compute(running, leaves, size, training=True):
                if isinstance(outcome, Result):
                    self._count(member, outcome, size, step)
                    learned.append(member)
                else:
                    self._fail(member, outcome)
            self._update(learned)
            step += 1
            if any(member.ended is not None for member in running):
                running = [member for member in running if member.running]
                if not running:
                    return

    def _count(self, member: Member, result: Result, size: int, step: int) -> None:
        if self.observer is not None:
            self.merged.hand_out_gradients()
            self.observer.on_loss(member.id, step, result.loss.detach())
            self.observer.on_gradients(member.id, step, member.state.named_gradients())
        member.train_loss.add(result.loss, size)
        # Looking at a loss waits for a GPU, so there it is done now and then.
        looks = self.device.type == "cpu" or step % _LOOK_EVERY == 0
        if looks and member.entry.training.stop_on_nan and not math.isfinite(result.loss.detach()):
            member.diverged = True

    def _update(self, members: Sequence[Member]) -> None:
        merged = [member.id for member in members if member.entry.opaque is None]
        failures = self.merged.update(merged) if merged else {}
        for member in members:
            if member.entry.opaque is not None and not member.diverged:
                try:
                    member.updater.step()
                except Exception as error:
                    failures[member.id] = error
        for id_, failure in failures.items():
            self._fail(self.members[id_], failure)

    def _evaluate(
        self, loader: Loader, members: Sequence[Member]
    ) -> dict[ModelId, dict[str, float]]:
        meters = {member.id: EvaluationMeter(member.entry.training) for member in members}
        if self._stems is not None:
            self._stems.begin("validation", 0)
        for size, leaves in loader.validation():
            running = [member for member in members if member.running]
            for member, outcome in self._compute(running, leaves, size, training=False):
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    target = target_of(leaves)
                    meters[member.id].add(outcome.loss, outcome.prediction, target, size)
                except Exception as error:
                    self._fail(member, error)
        return self._values(meters)

    def _values(self, meters: Mapping[ModelId, EvaluationMeter]) -> dict[ModelId, dict[str, float]]:
        rows = {}
        for id_, meter in meters.items():
            if self.members[id_].running:
                try:
                    rows[id_] = meter.values()
                except Exception as error:
                    self._fail(self.members[id_], error)
        return rows

    def _compute(
        self, members: Sequence[Member], leaves: Leaves, size: int, *, training: bool
    ) -> list[tuple[Member, Outcome]]:
        merged = [member.id for member in members if member.entry.opaque is None]
        outcomes: list[tuple[Member, Outcome]] = []
        if merged:
            extended = self._extended(leaves, size)
            compute = self.merged.train if training else self.merged.evaluate
            found = compute(merged, extended, size)
            outcomes += [(self.members[id_], outcome) for id_, outcome in found.items()]
        if len(merged) < len(members):
            for member in members:
                if (lane := self.opaque.get(member.id)) is not None:
                    outcome = lane.train(leaves) if training else lane.evaluate(leaves)
                    outcomes.append((member, outcome))
        return outcomes
