"""The models of one loader on one device: merged, replayed where captured, or opaque."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cgo.graph import Graph, ModelId
from cgo.runtime.accelerator import accelerator_for
from cgo.runtime.bound import Outcome, Result
from cgo.runtime.captured import CapturedLanes
from cgo.runtime.data import Leaves
from cgo.runtime.lanes import MergedLanes
from cgo.runtime.member import Member
from cgo.runtime.opaque import OpaqueLane
from cgo.runtime.resident import bytes_of
from cgo.runtime.tuning import Chooser
from cgo.tuning import Tuning

#: Steps between two looks at the losses on a GPU, where steps are eager.
_LOOK_EVERY = 64

#: Batches, and bytes of them, that opaque lanes on a CPU see in one go.
_MOST_HELD, _HELD_BYTES = 32, 2**26


class Observer(Protocol):
    """Sees every step, for tests and measurements; each call may cost a synchronisation."""

    def on_loss(self, model: ModelId, step: int, loss: Tensor) -> None:
        """A model's training loss in its step `step` (from 0, over all epochs)."""

    def on_gradients(
        self, model: ModelId, step: int, gradients: Mapping[str, Tensor | None]
    ) -> None:
        """Its gradients before clipping, by parameter name."""


class DeviceLanes:
    """Trains and evaluates a loader's models on one device.

    Args:
        graph: The merged graph; models of other devices may be part of it.
        members: The models on this device.
        constants: Tensors that the graph refers to by content.
        device: Where the models' state is.
        choose: Chooses how they are executed.
        observer: Sees every step.
        tell: Hears what was captured, as JSON values.
        tuning: Where random tensors come from, and by which kernels.
    """

    def __init__(
        self,
        graph: Graph,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        device: torch.device,
        *,
        choose: Chooser | None = None,
        observer: Observer | None = None,
        tell: Callable[..., None] = lambda what, **figures: None,
        tuning: Tuning | None = None,
    ) -> None:
        self.device, self.members = device, {member.id: member for member in members}
        merged = [member for member in members if member.entry.opaque is None]
        on_device = {content: value.to(device) for content, value in constants.items()}
        self.merged = MergedLanes(graph, merged, on_device, device, choose, tell, tuning)
        self._accelerator = accelerator_for(device)
        shown = observer is not None
        self._captured = CapturedLanes(self.merged, self._accelerator, tell, gradients=shown)
        self._opaque = {m.id: OpaqueLane(m) for m in members if m.entry.opaque is not None}
        self._observer, self._tell = observer, tell
        self._held: list[tuple[Leaves, int, int]] = []  # batches that opaque lanes have yet to see
        self._behind: list[ModelId] = []  # the models that have to
        # On a GPU they compute beside merged ones; what is watched is shown step by step.
        self._most_held = 1 if shown or device.type != "cpu" else _MOST_HELD

    def train(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, step: int
    ) -> dict[ModelId, Exception]:
        """One step of the given models; gives what failed.

        Args:
            models: Of this device; others are ignored.
            leaves: The batch, on any device.
            size: Its samples.
            step: Its number, from 0, over all epochs.
        """
        merged, opaque = self._divided(models)
        leaves = self._here(leaves)
        failures: dict[ModelId, Exception] = {}
        self._accelerator.begin()
        replayed = bool(merged) and self._captured.train(merged, leaves, size)
        if replayed and self._observer is not None:
            self._show_replayed(merged, size, step)
        if opaque:
            failures |= self._train_opaques(opaque, leaves, size, step)
        self._accelerator.join()
        if replayed:
            return failures | self._captured.finish(merged, size)
        return failures | (self._train_eagerly(merged, leaves, size, step) if merged else {})

    def _divided(self, models: Sequence[ModelId]) -> tuple[list[ModelId], list[ModelId]]:
        own = [model for model in models if model in self.members]
        merged = [model for model in own if model not in self._opaque]
        return merged, [model for model in own if model in self._opaque]

    def _here(self, leaves: Leaves) -> Leaves:
        if all(leaf.device == self.device for leaf in leaves.values()):
            return leaves
        return {name: leaf.to(self.device, non_blocking=True) for name, leaf in leaves.items()}

    def _train_eagerly(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, step: int
    ) -> dict[ModelId, Exception]:
        for model in models:
            self.members[model].updater.zero_grad()
        failures: dict[ModelId, Exception] = {}
        learned: list[ModelId] = []
        for model, outcome in self.merged.train(models, leaves, size).items():
            if isinstance(outcome, Result):
                self._count(model, outcome, size, step)
                learned.append(model)
            else:
                failures[model] = outcome
        return failures | (self.merged.update(learned) if learned else {})

    def _train_opaques(
        self, models: list[ModelId], leaves: Leaves, size: int, step: int
    ) -> dict[ModelId, Exception]:
        """Hold a batch until there are several, which a model then sees one after another."""
        failures = {} if models == self._behind else self._catch_up()
        self._behind = models
        self._held.append((leaves, size, step))
        few = len(self._held) < self._most_held
        if few and sum(bytes_of(held) for held, _, _ in self._held) < _HELD_BYTES:
            return failures
        return failures | self._catch_up()

    def _catch_up(self) -> dict[ModelId, Exception]:
        """Train opaque lanes on the batches that are held."""
        held, self._held = self._held, []
        if not held:
            return {}
        failures: dict[ModelId, Exception] = {}
        for index, model in enumerate(self._behind):
            with self._accelerator.beside(index), self._opaque[model].entered():
                for batch in held:
                    if model not in failures and self.members[model].running:
                        failures |= self._train_opaque(model, *batch)
        return failures

    def _train_opaque(
        self, model: ModelId, leaves: Leaves, size: int, step: int
    ) -> dict[ModelId, Exception]:
        member = self.members[model]
        member.updater.zero_grad()
        outcome = self._opaque[model].train(leaves)
        if not isinstance(outcome, Result):
            return {model: outcome}
        self._count(model, outcome, size, step)
        if member.diverged:
            return {}
        try:
            self._opaque[model].update()
        except Exception as error:
            return {model: error}
        return {}

    def _count(self, model: ModelId, result: Result, size: int, step: int) -> None:
        member = self.members[model]
        if self._observer is not None:
            self.merged.hand_out_gradients()
            self._show(model, step, result.loss.detach())
        member.train_loss.add(result.loss, size)
        # Looking at a loss waits for a GPU, so there it is done now and then.
        looks = self.device.type == "cpu" or step % _LOOK_EVERY == 0
        if looks and member.entry.training.stop_on_nan and not math.isfinite(result.loss.detach()):
            member.diverged = True

    def _show_replayed(self, models: Sequence[ModelId], size: int, step: int) -> None:
        self._captured.hand_out(models, size)
        for model, loss in self._captured.losses(models, size).items():
            self._show(model, step, loss)

    def _show(self, model: ModelId, step: int, loss: Tensor) -> None:
        assert self._observer is not None
        self._observer.on_loss(model, step, loss)
        self._observer.on_gradients(model, step, self.members[model].state.named_gradients())

    def end_training(self) -> dict[ModelId, Exception]:
        """After an epoch's training: hand each model its sum of losses, and tell of memory.

        Gives what failed in steps that had been put off.
        """
        failures = self._catch_up()
        for model, (total, samples) in self._captured.take_sums().items():
            self.members[model].train_loss.add_sum(total, samples)
        expected, peak = self.merged.expected, self._accelerator.peak_bytes()
        if expected and peak is not None:
            self.merged.expected = {}  # once for each packing
            self._tell("memory", device=str(self.device), **expected, measured_bytes=peak)
        return failures

    def evaluate(
        self, models: Sequence[ModelId], leaves: Leaves, size: int
    ) -> tuple[Leaves, dict[ModelId, Outcome]]:
        """The batch on this device, and losses and predictions without gradients."""
        merged, opaque = self._divided(models)
        leaves = self._here(leaves)
        outcomes: dict[ModelId, Outcome] = {}
        self._accelerator.begin()
        if merged:
            found = self._captured.evaluate(merged, leaves, size)
            outcomes |= self.merged.evaluate(merged, leaves, size) if found is None else found
        for index, model in enumerate(opaque):
            with self._accelerator.beside(index):
                outcomes[model] = self._opaque[model].evaluate(leaves)
        self._accelerator.join()
        return leaves, outcomes

    def sync(self) -> None:
        """Bring each model's own optimizer up to date, for a checkpoint."""
        self.merged.sync()

    def forget(self, model: ModelId) -> None:
        """Drop the programs that an ended model was part of."""
        self.merged.forget(model)
