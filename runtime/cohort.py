"""The models that share a loader: its batches go to all of them, epoch by epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cgo.errors import CgoError, DataError, GraphDataError, ImportPathError
from cgo.graph import Graph, ModelId
from cgo.graph_data import GraphData
from cgo.runtime.data import DataSets, Leaves, Loader, open_data, target_of
from cgo.runtime.device_lanes import DeviceLanes, Observer
from cgo.runtime.member import Member
from cgo.runtime.meters import EvaluationMeter, fetched
from cgo.runtime.stems import StemStore, plan_stems
from cgo.runtime.tuning import Tuner
from cgo.user_code import contained, told

log = logging.getLogger(__name__)

#: Predictions of a model that are kept on a GPU before its metrics are computed from them.
_KEPT_BYTES = 2**24


class Cohort:
    """The models that share a loader; they see the same batches in the same order.

    Args:
        data: The trial's document.
        key: The data spec's, in the document.
        members: The models; each has its state on a device of its own choice.
        constants: Tensors that the graph refers to by content.
        observer: Sees every step.
        tuner: Chooses, for one device, how models are executed.
        tell: Hears what was captured, as JSON values.
        feeding: Compute stems on the first device for models on others, too.
    """

    def __init__(
        self,
        data: GraphData,
        key: str,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        observer: Observer | None,
        tuner: Callable[[torch.device], Tuner],
        tell: Callable[..., None],
        feeding: bool = False,
    ) -> None:
        self.spec = data.data[key]
        self.members = {member.id: member for member in members}
        devices = dict.fromkeys(member.device for member in members)
        self._tuners = {device: tuner(device) for device in devices}
        self._graph, self._constants, self._feeding = data.graph, constants, feeding
        self._observer, self._tell = observer, tell
        self._stems: StemStore | None = None  # None: every step computes its stem
        self.lanes = self._made(data.graph)
        self._loader: Loader | None = None

    def _made(self, graph: Graph) -> list[DeviceLanes]:
        return [
            DeviceLanes(
                graph,
                [member for member in self.members.values() if member.device == device],
                self._constants,
                device,
                choose=choose,
                observer=self._observer,
                tell=self._tell,
                tuning=choose.tuning,
            )
            for device, choose in self._tuners.items()
        ]

    def close(self) -> None:
        """Close what is open: the tables of costs, and the loader, whose processes then end."""
        self._loader = None
        for tuner in self._tuners.values():
            tuner.close()

    def running(self) -> list[Member]:
        """Models that still train."""
        return [member for member in self.members.values() if member.running]

    def epoch(self) -> None:
        """One epoch of every running model that is furthest behind, then its evaluation."""
        behind = min(len(member.history) for member in self.running())
        members = [member for member in self.running() if len(member.history) == behind]
        started = time.perf_counter()
        for member in members:
            self._own(member, member.begin_epoch)
        members = [member for member in members if member.running]
        try:
            loader = self._open()
            self._train(loader, behind, members)
            members = [member for member in members if member.running]
            rows = self._evaluate(loader, members) if members else {}
        except (DataError, ImportPathError) as error:
            self._fail_all(members, error)
            return
        seconds = time.perf_counter() - started
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

    def _open(self) -> Loader:
        if self._loader is None:
            data = open_data(self.spec)
            self._check_programs(data)
            self._loader = Loader(data, self.lanes[0].device)
            epochs = max(member.entry.training.epochs for member in self.members.values())
            for tuner in self._tuners.values():
                tuner.steps = epochs * len(self._loader.data.train_sizes)
            self._take_stems(self._loader)
        return self._loader

    def _check_programs(self, data: DataSets) -> None:
        """Fail models whose part of the document has no program for some batch."""
        sizes = {"train": data.train_sizes, "validation": data.validation_sizes}
        wanted = {f"{split}/{size}" for split, found in sizes.items() for size in found}
        losses = {(o.model, o.program) for o in self._graph.outputs if o.role == "loss"}
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
        first = next(iter(self._tuners.values()))
        try:
            self._stems = plan_stems(
                self._graph,
                captured,
                self._constants,
                loader.data,
                self.lanes[0].device,
                first.tuning,
                feeding=self._feeding,
                tell=self._tell,
            )
        except Exception as error:
            self._compute_stems(error)
        if self._stems is not None:
            self.lanes = self._made(self._stems.rest)

    def _extended(self, leaves: Leaves, size: int) -> Leaves:
        """The batch with values of stems; without a store that works, the steps compute them."""
        if self._stems is None:
            return leaves
        try:
            return self._stems.extend(leaves, size)
        except Exception as error:
            self._compute_stems(error)
            return leaves

    def _compute_stems(self, error: Exception) -> None:
        """Go on without values: they only save time, so that no model fails for them."""
        log.warning("stems are not stored: %s: %s", type(error).__name__, error)
        self._tell("stems", bytes=0, values=0, models=0, reason=str(error))
        for lanes in self.lanes:
            for model, failure in lanes.end_training().items():
                self._fail(self.members[model], failure)
            lanes.sync()
        self._stems, self.lanes = None, self._made(self._graph)

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
        running = [member.id for member in members if member.running]
        if not running:
            return
        if self._stems is not None:
            self._stems.begin("train", epoch)
        for size, batch in loader.train(epoch):
            leaves = self._extended(batch, size)
            # Devices compute side by side: nothing here waits for one.
            failures = [lanes.train(running, leaves, size, step) for lanes in self.lanes]
            for model, failure in (item for found in failures for item in found.items()):
                self._fail(self.members[model], failure)
            step += 1
            if any(failures):
                running = [model for model in running if self.members[model].running]
                if not running:
                    break
        for lanes in self.lanes:
            for model, failure in lanes.end_training().items():
                self._fail(self.members[model], failure)

    def _evaluate(
        self, loader: Loader, members: Sequence[Member]
    ) -> dict[ModelId, dict[str, float]]:
        meters = {
            member.id: EvaluationMeter(
                member.entry.training, 0 if member.device.type == "cpu" else _KEPT_BYTES
            )
            for member in members
        }
        if self._stems is not None:
            self._stems.begin("validation", 0)
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
