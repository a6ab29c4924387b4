"""Whole steps of merged models, captured once and replayed.

A captured training step holds all that a step does on its device: random numbers, forward, losses,
backward, clipping, optimizer step, and the sums of losses. What changes between replays lies in
tensors that are written before each: the batch, learning rates, counts of steps. Nothing is read
back, so an epoch goes by without a synchronisation. On what this is done for, see
`cgo.runtime.accelerator`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.runtime.accelerator import Accelerator, Captured, CaptureRefused, leaves_eager
from cgo.runtime.bodies import Undone
from cgo.runtime.bound import Bound, Outcome, expected_leaf
from cgo.runtime.data import Leaves
from cgo.runtime.lanes import MergedLanes
from cgo.runtime.updates import Updates

#: A step that has been captured so often is left eager: each takes as long as many steps.
_MOST_CAPTURES = 4

#: Split, samples of the batch, models.
_Key = tuple[str, int, tuple[ModelId, ...]]


@dataclass
class _Step:
    """A captured step: where it reads its batch."""

    captured: Captured
    batch: dict[str, Tensor]

    def fill(self, leaves: Leaves) -> None:
        """Write a batch there.

        Raises:
            DataError: it is another batch than was captured. A copy would cast and broadcast it.
        """
        for name, place in self.batch.items():
            place.copy_(expected_leaf(leaves, name, place.dtype, place.shape), non_blocking=True)


@dataclass
class _Training(_Step):
    models: list[ModelId]  # in the order of these:
    losses: Tensor | None  # of the last replay, one for each model, where anybody reads them
    sums: Tensor  # of the losses times samples since they were last taken, float64
    gradients: list[tuple[Tensor, Tensor]]  # of the last replay, of leaves and parameters
    signature: tuple[int, ...]  # of the optimizer step
    apart: list[ModelId]  # whose own optimizers step beside it
    waiting: list[Bound]  # programs that may take another form
    over: bool = False  # as one of them is to take it
    samples: int = 0  # that the sums are of


@dataclass
class _Evaluation(_Step):
    bounds: Sequence[Bound]


class CapturedLanes:
    """Merged lanes whose steps are replayed where they have been captured.

    A step is captured once it has been run eagerly, by the lanes themselves, until its form is
    settled. Steps that cannot be captured stay eager, and are reported.

    Args:
        lanes: What is captured.
        accelerator: How.
        tell: Hears what was captured or refused, as JSON values.
        gradients: Keep them, so that `hand_out` gives them after each step.
    """

    def __init__(
        self,
        lanes: MergedLanes,
        accelerator: Accelerator,
        tell: Callable[..., None] = lambda what, **figures: None,
        *,
        gradients: bool = False,
    ) -> None:
        self.lanes, self._accelerator, self._tell = lanes, accelerator, tell
        self._gradients = gradients
        self._arranged: object = None  # what the steps are of
        self._captures: Counter[_Key] = Counter()
        self._training: dict[_Key, _Training] = {}
        self._evaluation: dict[_Key, _Evaluation] = {}
        self._sums: dict[ModelId, tuple[Tensor, int]] = {}  # taken from steps, for `take_sums`
        self.refused: dict[_Key, str] = {}
        self._broken: Exception | None = None  # of a step that was replayed in part

    def train(self, models: Sequence[ModelId], leaves: Leaves, size: int) -> bool:
        """Take one whole training step, if it is captured; else it has to be taken eagerly."""
        key = "train", size, tuple(models)
        updates = self._ready(key)
        step = self._training.get(key)
        if step is not None and step.over:  # once eagerly, in the other form; then captured anew
            self._count(self._training.pop(key))
            self._captures[key] -= 1
            return False
        if updates is None or (step is None and not self._capturable(key)):
            return False
        if not updates.prepare_again():
            return False
        if step is not None and step.signature != updates.signature:
            self._count(self._training.pop(key))
            step = None
        if step is None:
            step = self._capture_training(key, leaves, updates)
            if step is None:
                updates.unprepare()
                return False
        step.fill(leaves)
        try:
            step.captured.replay()
        except Undone as error:  # an eager step finds out whose value an operator refuses
            self._count(self._training.pop(key))
            self._refuse(key, str(error))
            updates.unprepare()
            return False
        except Exception as error:
            if self.lanes.device.type != "cpu":  # a GPU is lost with its context
                raise
            self._broken = error  # some of it may be written
            return True
        step.samples += size
        if step.waiting:
            step.over = any([bound.passed() for bound in step.waiting])
        return True

    def finish(self, models: Sequence[ModelId], size: int) -> dict[ModelId, Exception]:
        """What follows a replayed training step on the host; gives what failed.

        Schedulers that go by steps, and the optimizers that step by themselves.
        """
        if self._broken is not None:
            error, self._broken = self._broken, None
            return dict.fromkeys(models, error)
        updates = self.lanes.updates
        assert updates is not None
        failures = updates.finish()
        apart = self._training["train", size, tuple(models)].apart
        if apart:
            self.hand_out(models, size)
            failures |= self.lanes.step_alone(apart)
        return failures

    def losses(self, models: Sequence[ModelId], size: int) -> dict[ModelId, Tensor]:
        """Of the last replayed training step, where gradients are kept as well."""
        step = self._training["train", size, tuple(models)]
        assert step.losses is not None
        return dict(zip(step.models, step.losses.clone().unbind(0)))

    def hand_out(self, models: Sequence[ModelId], size: int) -> None:
        """Make the gradients of the last replayed step readable as `.grad`."""
        for leaf, gradient in self._training["train", size, tuple(models)].gradients:
            leaf.grad = gradient
        self.lanes.hand_out_gradients(anew=True)

    def take_sums(self) -> dict[ModelId, tuple[Tensor, int]]:
        """Losses times samples, and samples, of each model since the last call."""
        for step in self._training.values():
            self._count(step)
        found, self._sums = self._sums, {}
        return found

    def _count(self, step: _Training) -> None:
        """Move a step's sums to those of its models."""
        if not step.samples:
            return
        for model, total in zip(step.models, step.sums.clone().unbind(0)):
            before, samples = self._sums.get(model, (0.0, 0))
            self._sums[model] = total + before, samples + step.samples
        step.sums.zero_()
        step.samples = 0

    def evaluate(
        self, models: Sequence[ModelId], leaves: Leaves, size: int
    ) -> dict[ModelId, Outcome] | None:
        """Losses and predictions, if the step is captured; else None."""
        key = "validation", size, tuple(models)
        if self._ready(key) is None:
            return None
        step = self._evaluation.get(key) or self._capture_evaluation(key, leaves)
        if step is None:
            return None
        step.fill(leaves)
        try:
            step.captured.replay()
        except Undone as error:
            self._refuse(key, str(error))
            return None
        pending = [result.clone() for result in step.captured.results]
        outcomes: dict[ModelId, Outcome] = {}
        for bound in step.bounds:
            results, pending = pending[: bound.count], pending[bound.count :]
            outcomes |= bound.outcomes(results)
        return outcomes

    def _ready(self, key: _Key) -> Updates | None:
        """The optimizer step, where the lanes are packed for these models, and may be captured."""
        if not self.lanes.wants_capture(key[2], key[0]):
            if not self.lanes.wants_capture(key[2], "train"):
                self._clear()  # before anything is packed anew: graphs hold their memory
            return None
        updates = self.lanes.updates
        arranged = self.lanes.packing, None if updates is None else updates.version
        if self._arranged != arranged:
            self._clear()
            self._arranged = arranged
        return None if key in self.refused else updates

    def _clear(self) -> None:
        for step in self._training.values():
            self._count(step)
        self._training, self._evaluation, self._captures, self.refused = {}, {}, Counter(), {}

    def _capturable(self, key: _Key) -> bool:
        """Whether a training step has the form that it will keep, and can be captured in it."""
        bounds = self.lanes.settled("train", key[1], key[2])
        if bounds is not None and not self.lanes.fits_tape(bounds):
            self.refused[key] = "it would be no faster from a tape"
        return bounds is not None and key not in self.refused

    def _capture_training(self, key: _Key, leaves: Leaves, updates: Updates) -> _Training | None:
        models = key[2]
        bounds = self.lanes.settled("train", key[1], models)
        if bounds is None:
            return None
        batch = {name: leaf.clone() for name, leaf in leaves.items()}
        order: list[ModelId] = []
        sums = torch.zeros(len(models), dtype=torch.float64, device=self.lanes.device)
        learning: list[Tensor] = []
        apart = [model for model in models if not updates.covers(model)]
        kept = self._gradients or bool(apart)

        def body() -> list[Tensor]:
            order[:], losses = self.lanes.whole_step(bounds, batch)
            learning[:] = self.lanes.with_gradient(models) if kept else []
            updates.apply()
            if self.lanes.scaling is not None:
                self.lanes.scaling.update(models)
            joined = (losses[0] if len(losses) == 1 else torch.cat(losses)).detach()
            sums.add_(joined, alpha=key[1])
            gradients = [leaf.grad for leaf in learning if leaf.grad is not None]
            return [joined, *gradients] if kept else []

        captured = self._captured(key, body, bounds, self.lanes.buffers(bounds))
        self.lanes.forget_gradients(models)
        if captured is None:
            return None
        losses = captured.results[0] if kept else None
        pairs = list(zip(learning, captured.results[1:]))
        waiting = [bound for bound in bounds if bound.waiting]
        signature = updates.signature
        step = _Training(captured, batch, order, losses, sums, pairs, signature, apart, waiting)
        self._training[key] = step
        return step

    def _capture_evaluation(self, key: _Key, leaves: Leaves) -> _Evaluation | None:
        bounds = self.lanes.settled("validation", key[1], key[2])
        if bounds is None:
            return None
        batch = {name: leaf.clone() for name, leaf in leaves.items()}

        def body() -> list[Tensor]:
            found: list[Tensor] = []
            for bound in bounds:
                results = bound.evaluate(batch, bound.draw(), undo=False)
                bound.commit(results)
                found += results
            return found

        captured = self._captured(key, body, bounds)
        if captured is None:
            return None
        self._evaluation[key] = step = _Evaluation(captured, batch, bounds)
        return step

    def _refuse(self, key: _Key, reason: str) -> None:
        """Leave a step eager, until other models run."""
        self.refused[key] = reason
        self._tell("eager", program=f"{key[0]}/{key[1]}", models=len(key[2]), reason=reason)

    def _captured(
        self,
        key: _Key,
        body: Callable[[], list[Tensor]],
        bounds: Sequence[Bound],
        undone: Sequence[Tensor] = (),
    ) -> Captured | None:
        started = time.perf_counter()
        program = f"{key[0]}/{key[1]}"
        self._captures[key] += 1
        try:
            if self._captures[key] > _MOST_CAPTURES:
                raise CaptureRefused("hyper-parameters that are no learning rates keep changing")
            generators = [g for bound in bounds for g in bound.generators]
            captured = self._accelerator.capture(body, generators, undone)
        except Exception as error:
            if leaves_eager(error):
                self._refuse(key, str(error))
            elif self.lanes.device.type != "cpu":
                raise
            # Else an operator refuses this batch: an eager step finds out whose.
            return None
        spent = time.perf_counter() - started
        self._tell("captured", program=program, models=len(key[2]), seconds=spent)
        return captured
