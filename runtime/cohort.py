"""The models that share a loader: its batches go to all of them, epoch by epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cgo.errors import CgoError, DataError
from cgo.graph import ModelId
from cgo.graph_data import GraphData
from cgo.runtime.data import Loader, open_data, target_of
from cgo.runtime.device_lanes import DeviceLanes, Observer
from cgo.runtime.member import Member
from cgo.runtime.meters import EvaluationMeter
from cgo.runtime.tuning import Tuner

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
    ) -> None:
        self.spec = data.data[key]
        self.members = {member.id: member for member in members}
        devices = list(dict.fromkeys(member.device for member in members))
        self._tuners = [tuner(device) for device in devices]
        self.lanes = [
            DeviceLanes(
                data.graph,
                [member for member in members if member.device == device],
                constants,
                device,
                choose=choose,
                observer=observer,
                tell=tell,
            )
            for device, choose in zip(devices, self._tuners)
        ]
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
                self._forget(member.id)

    def _open(self) -> Loader:
        if self._loader is None:
            self._loader = Loader(open_data(self.spec), self.lanes[0].device)
            epochs = max(member.entry.training.epochs for member in self.members.values())
            for tuner in self._tuners:
                tuner.steps = epochs * len(self._loader.data.train_sizes)
        return self._loader

    def _fail_all(self, members: Sequence[Member], error: DataError) -> None:
        for member in members:
            if member.running:
                self._fail(member, error)

    def _fail(self, member: Member, error: Exception) -> None:
        text = str(error) if isinstance(error, CgoError) else f"{type(error).__name__}: {error}"
        member.fail(text)
        self._forget(member.id)

    def _forget(self, model: ModelId) -> None:
        for lanes in self.lanes:
            lanes.forget(model)

    def _train(self, loader: Loader, epoch: int, members: Sequence[Member]) -> None:
        step = epoch * len(loader.data.train_sizes)
        running = [member.id for member in members if member.running]
        for size, leaves in loader.train(epoch):
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
            lanes.end_training()

    def _evaluate(
        self, loader: Loader, members: Sequence[Member]
    ) -> dict[ModelId, dict[str, float]]:
        meters = {
            member.id: EvaluationMeter(
                member.entry.training, 0 if member.device.type == "cpu" else _KEPT_BYTES
            )
            for member in members
        }
        for size, leaves in loader.validation():
            running = [member.id for member in members if member.running]
            for lanes in self.lanes:
                there, outcomes = lanes.evaluate(running, leaves, size)
                for model, outcome in outcomes.items():
                    try:
                        if isinstance(outcome, Exception):
                            raise outcome
                        target = target_of(there)
                        meters[model].add(outcome.loss, outcome.prediction, target, size)
                    except Exception as error:
                        self._fail(self.members[model], error)
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

    def sync(self) -> None:
        """Bring each model's own optimizer up to date, for a checkpoint."""
        for lanes in self.lanes:
            lanes.sync()
