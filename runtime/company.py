"""Models that step together: of one loader, and all at the same epoch."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgo.errors import CgoError, DataError, GraphDataError, ImportPathError
from cgo.graph import Graph, ModelId
from cgo.runtime.data import DataSets, Leaves, Loader, target_of
from cgo.runtime.device_lanes import DeviceLanes, Observer
from cgo.runtime.member import Member
from cgo.runtime.meters import EvaluationMeter, fetched
from cgo.runtime.stems import StemStore, plan_stems
from cgo.runtime.tuning import Chooser, Tuner
from cgo.user_code import contained, told

log = logging.getLogger(__name__)

#: Predictions of a model that are kept on a GPU before its metrics are computed from them.
_KEPT_BYTES = 2**24


def _nobody() -> frozenset[ModelId]:
    return frozenset()


@dataclass(frozen=True)
class Setting:
    """What all companies of a trial are given.

    Args:
        tuner: Chooses, for one device, how models are executed.
        tell: Hears what was captured, as JSON values.
        observer: Sees every step.
        feeding: Compute stems on the first device for models on others, too.
        stopped: Models that are to end at the next step.
    """

    tuner: Callable[[torch.device], Tuner]
    tell: Callable[..., None]
    observer: Observer | None = None
    feeding: bool = False
    stopped: Callable[[], frozenset[ModelId]] = _nobody


class Company:
    """Models that see the same batches in the same steps, as one program on each device.

    Args:
        graph: The merged graph; other models may be part of it.
        members: The models; each has its state on a device of its own choice.
        constants: Tensors that the graph refers to by content.
        setting: Of the trial.
    """

    def __init__(
        self,
        graph: Graph,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        setting: Setting,
    ) -> None:
        self.graph, self.constants, self.setting = graph, constants, setting
        self.members = {member.id: member for member in members}
        self.joined_s: float | None = None  # spent on it while others waited; None: nobody had to
        self.made_s: float | None = None  # what making its program has taken, once it is there
        self.last_s = 0.0  # its last epoch
        self.turn = self.waited = 0  # see `cgo.runtime.cohort`
        self.inherited: list[StemStore] = []  # their stems are not computed again
        self._steps = 0  # planned
        self._loader: Loader | None = None
        self.stems: StemStore | None = None  # None: every step computes its stem
        self.lanes = self._made(graph)

    def _made(self, graph: Graph) -> list[DeviceLanes]:
        devices = dict.fromkeys(member.device for member in self.members.values())
        return [
            DeviceLanes(
                graph,
                [member for member in self.members.values() if member.device == device],
                self.constants,
                device,
                choose=self._chooser(device),
                observer=self.setting.observer,
                tell=self.setting.tell,
                tuning=self.setting.tuner(device).tuning,
            )
            for device in devices
        ]

    def _chooser(self, device: torch.device) -> Chooser:
        tuner = self.setting.tuner(device)

        def choose(graph: Graph, models: Sequence[ModelId]) -> Any:
            tuner.steps = self._steps  # companies share tuners, and train for different times
            return tuner(graph, models)

        return choose

    def running(self) -> list[Member]:
        """Models that still train."""
        return [member for member in self.members.values() if member.running]

    @property
    def behind(self) -> int:
        """The epoch of those that are furthest behind; others wait for them."""
        return min(len(member.history) for member in self.running())

    @property
    def left(self) -> int:
        """Epochs until the last of its models ends."""
        return max(m.entry.training.epochs - len(m.history) for m in self.running())

    def epoch(self, opened: Callable[[], Loader]) -> None:
        """One epoch of every running model that is furthest behind, then its evaluation.

        Args:
            opened: Gives the loader; may raise what its data source does.
        """
        behind, self.last_s = self.behind, 0.0
        members = [member for member in self.running() if len(member.history) == behind]
        started = time.perf_counter()
        for member in members:
            self._own(member, member.begin_epoch)
        members = [member for member in members if member.running]
        try:
            loader = opened()
            self._begin(loader)
            self._train(loader, behind, members)
            members = [member for member in members if member.running]
            rows = self._evaluate(loader, members) if members else {}
        except (DataError, ImportPathError) as error:
            self._fail_all(members, error)
            return
        self.last_s = seconds = time.perf_counter() - started
        for member in members:
            if member.running and self._own(member, member.updater.end_epoch):
                member.end_epoch(rows[member.id], seconds)
            if not member.running:
                self._forget(member.id)

    def _own(self, member: Member, action: Callable[[], None]) -> bool:
        """Do what concerns one model, which fails if that raises; whether it did not."""
        try:
            action()
        except Exception as error:
            self._fail(member, error)
            return False
        return True

    def _begin(self, loader: Loader) -> None:
        """Once, when the data are known."""
        if self._loader is not None:
            return
        self._loader = loader
        self._check_programs(loader.data)
        epochs = max(member.entry.training.epochs for member in self.members.values())
        self._steps = epochs * len(loader.data.train_sizes)
        self._take_stems(loader)
        self.inherited = []

    def _check_programs(self, data: DataSets) -> None:
        """Fail models whose part of the document has no program for some batch."""
        sizes = {"train": data.train_sizes, "validation": data.validation_sizes}
        wanted = {f"{split}/{size}" for split, found in sizes.items() for size in found}
        losses = {(o.model, o.program) for o in self.graph.outputs if o.role == "loss"}
        for member in self.running():
            missing = [name for name in sorted(wanted) if (member.id, name) not in losses]
            if missing and member.entry.opaque is None:
                self._fail(
                    member,
                    GraphDataError(
                        f"the document has no program {missing[0]} for it, which the batches of "
                        "its data need; were the data others when it was planned?"
                    ),
                )

    def _take_stems(self, loader: Loader) -> None:
        """Let the models read their stems' values, stored or fed, where that repays."""
        captured = {m.id: m for m in self.running() if m.entry.opaque is None}
        device = self.lanes[0].device
        try:
            self.stems = plan_stems(
                self.graph,
                captured,
                self.constants,
                loader.data,
                device,
                self.setting.tuner(device).tuning,
                feeding=self.setting.feeding,
                tell=self.setting.tell,
            )
            if self.stems is not None:
                self.stems.adopt(self.inherited)
        except Exception as error:
            self._compute_stems(error)
        if self.stems is not None:
            self.lanes = self._made(self.stems.rest)

    def _extended(self, leaves: Leaves, size: int) -> Leaves:
        """The batch with values of stems; without a store that works, the steps compute them."""
        if self.stems is None:
            return leaves
        try:
            return self.stems.extend(leaves, size)
        except Exception as error:
            self._compute_stems(error)
            return leaves

    def _compute_stems(self, error: Exception) -> None:
        """Go on without values: they only save time, so that no model fails for them."""
        log.warning("stems are not stored: %s: %s", type(error).__name__, error)
        self.setting.tell("stems", bytes=0, values=0, models=0, reason=str(error))
        self.settle()
        self.stems, self.lanes = None, self._made(self.graph)

    def settle(self) -> None:
        """Leave each model as it would be alone, for other lanes to go on with it."""
        self._end_training()
        self.sync()

    def _end_training(self) -> None:
        for lanes in self.lanes:
            for model, failure in lanes.end_training().items():
                self._fail(self.members[model], failure)

    def _fail_all(self, members: Sequence[Member], error: CgoError) -> None:
        for member in members:
            if member.running:
                self._fail(member, error)

    def _fail(self, member: Member, error: Exception) -> None:
        member.fail(str(error) if isinstance(error, CgoError) else told(error))
        self._forget(member.id)

    def _forget(self, model: ModelId) -> None:
        for lanes in self.lanes:
            lanes.forget(model)

    def _train(self, loader: Loader, epoch: int, members: Sequence[Member]) -> None:
        step = epoch * len(loader.data.train_sizes)
        running = self._unstopped([member.id for member in members if member.running])
        if not running:
            return
        if self.stems is not None:
            self.stems.begin("train", epoch)
        clock = _FirstSteps()
        for size, batch in loader.train(epoch):
            leaves = self._extended(batch, size)
            # Devices compute side by side: nothing here waits for one.
            failures = [lanes.train(running, leaves, size, step) for lanes in self.lanes]
            for model, failure in (item for found in failures for item in found.items()):
                self._fail(self.members[model], failure)
            step += 1
            clock.tick()
            if any(failures) or not self.setting.stopped().isdisjoint(running):
                running = self._unstopped([m for m in running if self.members[m].running])
                if not running:
                    break
        if self.made_s is None:
            self.made_s = clock.surplus_s
        self._end_training()

    def _unstopped(self, models: Sequence[ModelId]) -> list[ModelId]:
        """The models without those that somebody has cancelled, which end here."""
        stopped = self.setting.stopped()
        for model in stopped.intersection(models):
            self.cancel(model)
        return [model for model in models if model not in stopped]

    def cancel(self, model: ModelId) -> None:
        """End a model that runs; it keeps its history."""
        self.members[model].cancel()
        self._forget(model)

    def _evaluate(
        self, loader: Loader, members: Sequence[Member]
    ) -> dict[ModelId, dict[str, float]]:
        meters = {
            member.id: EvaluationMeter(
                member.entry.training, 0 if member.device.type == "cpu" else _KEPT_BYTES
            )
            for member in members
        }
        if self.stems is not None:
            self.stems.begin("validation", 0)
        for size, batch in loader.validation():
            leaves = self._extended(batch, size)
            running = [member.id for member in members if member.running]
            for lanes in self.lanes:
                there, outcomes = lanes.evaluate(running, leaves, size)
                for model, outcome in outcomes.items():
                    try:
                        if isinstance(outcome, Exception):
                            raise outcome
                        target = target_of(there)
                        with contained:
                            meters[model].add(outcome.loss, outcome.prediction, target, size)
                    except Exception as error:
                        self._fail(self.members[model], error)
        return self._values(meters)

    def _values(self, meters: Mapping[ModelId, EvaluationMeter]) -> dict[ModelId, dict[str, float]]:
        """The rows of running models, whose training losses are read as well: one transfer."""
        held: dict[tuple[ModelId, str], list[Tensor]] = {}
        rows: dict[ModelId, dict[str, float]] = {}

        def hold(id_: ModelId) -> None:
            held[id_, "train"] = self.members[id_].train_loss.held()
            held[id_, "validation"] = meters[id_].held()

        def read(id_: ModelId) -> None:
            self.members[id_].train_loss.settle(found[id_, "train"])
            meters[id_].settle(found[id_, "validation"])
            rows[id_] = meters[id_].values()

        self._contained(meters, hold)
        found = fetched(held)
        self._contained(meters, read)
        return rows

    def _contained(self, models: Iterable[ModelId], action: Callable[[ModelId], None]) -> None:
        """Do what may call user code for each running model; those for which it raises fail."""
        for id_ in models:
            if self.members[id_].running:
                try:
                    with contained:
                        action(id_)
                except Exception as error:
                    self._fail(self.members[id_], error)

    def sync(self) -> None:
        """Bring each model's own optimizer up to date, for a checkpoint."""
        for lanes in self.lanes:
            lanes.sync()


class _FirstSteps:
    """How much longer the first steps take than others: in them, programs are made and recorded."""

    def __init__(self) -> None:
        self._at = [time.perf_counter()]

    def tick(self) -> None:
        """A step is over."""
        if len(self._at) <= _LOOKED_AT:
            self._at.append(time.perf_counter())

    @property
    def surplus_s(self) -> float:
        """Seconds, of the first few steps together."""
        steps = [after - before for before, after in itertools.pairwise(self._at)]
        usual = statistics.median_low(steps) if steps else 0.0
        return sum(max(step - usual, 0.0) for step in steps[:_MAKING])


#: Steps of the first epoch that are looked at, and in how many of them a program is made.
_LOOKED_AT, _MAKING = 64, 8
