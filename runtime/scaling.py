"""Loss scaling for float16: each model has a scale of its own, as training alone has.

A gradient too small for float16 becomes zero. So losses are multiplied by a scale before the
backward, and gradients divided by it before anything else looks at them; where the scale was too
large and a gradient is infinite or NaN, its model leaves out the step. The rules are those of
`torch.amp.GradScaler`. One scale for all would let a model make its neighbours leave out steps.

The scales of models that are trained together are one tensor, which everything here reads and
writes in place and without a look at its values: a step can be recorded, on a GPU as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.model import TrainingSpec
from cgo.private import many_tensors

#: What `torch.amp.GradScaler` starts with, and multiplies by.
FIRST_SCALE, GROWTH, BACKOFF = 2.0**16, 2.0, 0.5


class LossScale:
    """One model's scale.

    Args:
        training: Says where it starts, and after how many steps it grows.
        device: Where the model is trained.

    Attributes:
        scale: float32, no dimensions.
        growth_tracker: int32, no dimensions: steps without overflow since the scale last changed.
        found_inf: float32, no dimensions: 1 where a gradient of the last step has overflowed.
        growth_interval: Steps without overflow after which the scale doubles.
    """

    def __init__(self, training: TrainingSpec, device: torch.device) -> None:
        first = FIRST_SCALE if training.loss_scale is None else training.loss_scale
        self.scale = torch.tensor(first, dtype=torch.float32, device=device)
        self.growth_tracker = torch.tensor(0, dtype=torch.int32, device=device)
        self.found_inf = torch.tensor(0.0, dtype=torch.float32, device=device)
        self.growth_interval = training.loss_scale_growth_interval

    @classmethod
    def of(cls, training: TrainingSpec, device: torch.device) -> LossScale | None:
        """The scale of a model that is trained so, or None where it needs none."""
        return cls(training, device) if training.precision == "float16" else None

    def overflowed(self) -> bool:
        """Whether the last step's gradients cannot be used; waits for a GPU."""
        return bool(self.found_inf)

    def dump(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"scale": float(self.scale), "growth_tracker": int(self.growth_tracker)}

    def load(self, values: Mapping[str, Any]) -> None:
        """Go back to what `dump` gave."""
        self.scale.fill_(values["scale"])
        self.growth_tracker.fill_(values["growth_tracker"])


class Scaling:
    """The scales of models that are trained together; they become views into this one's tensors.

    Args:
        scales: By model; at least one. All on one device.

    Attributes:
        scale: float32, shape (M,).
        growth_tracker: int32, shape (M,).
        found_inf: float32, shape (M,): 1 for models whose gradients have overflowed in this step.
    """

    def __init__(self, scales: Mapping[ModelId, LossScale]) -> None:
        self._position = {model: position for position, model in enumerate(scales)}
        own = list(scales.values())
        self.scale = torch.stack([one.scale for one in own])
        self.growth_tracker = torch.stack([one.growth_tracker for one in own])
        # One more, behind the last, stands for all models that have no scale.
        self._found = torch.stack(
            [*(one.found_inf for one in own), torch.zeros_like(self.scale[0])]
        )
        self.found_inf = self._found[:-1]
        intervals = [one.growth_interval for one in own]
        self._intervals = torch.tensor(intervals, dtype=torch.int32, device=self.scale.device)
        self._masks: dict[tuple[ModelId, ...], Tensor] = {}
        self._lanes: dict[tuple[ModelId, ...], Tensor] = {}
        for position, one in enumerate(own):
            one.scale, one.found_inf = self.scale[position], self.found_inf[position]
            one.growth_tracker = self.growth_tracker[position]

    @classmethod
    def of(cls, scales: Mapping[ModelId, LossScale | None]) -> Scaling | None:
        """Of the models that have a scale; None where none has."""
        found = {model: scale for model, scale in scales.items() if scale is not None}
        return cls(found) if found else None

    def covers(self, models: Iterable[ModelId]) -> bool:
        """Whether any of the models has a scale."""
        return any(model in self._position for model in models)

    def lanes(self, models: Sequence[ModelId]) -> Tensor:
        """The models' positions in `scale`, int64; those without a scale are behind the last."""
        known = self._lanes.get(tuple(models))
        if known is None:
            found = [self._position.get(model, len(self._position)) for model in models]
            known = torch.tensor(found, device=self.scale.device)
            self._lanes[tuple(models)] = known
        return known

    def overflow(self, models: Sequence[ModelId]) -> Tensor:
        """Which of the models must leave out this step: bool, one for each."""
        return self._found.index_select(0, self.lanes(models)) > 0

    def overflowed(self) -> frozenset[ModelId]:
        """The models that must leave out this step; waits for a GPU."""
        found = self.found_inf.tolist()
        return frozenset(model for model, at in self._position.items() if found[at])

    def unscale(
        self,
        packed: Sequence[tuple[Sequence[ModelId], Tensor]],
        own: Mapping[ModelId, Sequence[Tensor]],
    ) -> None:
        """Divide the gradients of a step by their models' scales in place, and note overflows.

        Args:
            packed: Gradients of shape (lanes, ...), each with its lanes' models. Those of models
                without a scale stay as they are.
            own: Gradients that are one model's alone, by model.
        """
        inverse = self.scale.double().reciprocal().float()  # as GradScaler rounds it
        scaled = [(models, gradient) for models, gradient in packed if self.covers(models)]
        with torch.no_grad():
            self.found_inf.zero_()
            if scaled:
                self._unscale_lanes(scaled, inverse)
            for model, gradients in own.items():
                if (at := self._position.get(model)) is not None:
                    _unscale_whole(gradients, self.found_inf[at], inverse[at])

    def _unscale_lanes(
        self, packed: Sequence[tuple[Sequence[ModelId], Tensor]], inverse: Tensor
    ) -> None:
        lanes = [self.lanes(models) for models, _ in packed]
        gradients = [gradient for _, gradient in packed]
        # Nothing times a finite number is nothing, and NaN otherwise, which no sum loses.
        zeros = many_tensors.mul(gradients, 0.0)
        marks = [zero.reshape(len(zero), -1).sum(1, dtype=torch.float32) for zero in zeros]
        poisoned = torch.zeros_like(self._found).index_add_(0, torch.cat(lanes), torch.cat(marks))
        self.found_inf.copy_(poisoned[:-1].isnan())
        factors = torch.cat([inverse, torch.ones_like(inverse[:1])])
        each = [
            factors.index_select(0, lane).reshape(-1, *[1] * (gradient.ndim - 1))
            for lane, gradient in zip(lanes, gradients)
        ]
        many_tensors.mul_(gradients, each)

    def update(self, models: Collection[ModelId]) -> None:
        """Adapt the scales of the given models to what their gradients were."""
        bad = self.found_inf > 0
        clean = self.growth_tracker + 1
        full = clean == self._intervals
        larger = self.scale * GROWTH
        larger = torch.where(full & larger.isfinite(), larger, self.scale)
        scale = torch.where(bad, self.scale * BACKOFF, larger)
        tracker = torch.where(bad | full, 0, clean)
        mask = self._mask(models)
        self.scale.copy_(torch.where(mask, scale, self.scale))
        self.growth_tracker.copy_(torch.where(mask, tracker, self.growth_tracker))

    def _mask(self, models: Collection[ModelId]) -> Tensor:
        key = tuple(sorted(models))
        known = self._masks.get(key)
        if known is None:
            given = [model in models for model in self._position]
            known = self._masks[key] = torch.tensor(given, device=self.scale.device)
        return known


def seeds(scale: Tensor, lanes: Tensor, loss: Tensor) -> Tensor:
    """What the backward of a loss starts with: as multiplying the loss by its scale would.

    Args:
        scale: float32, shape (M,).
        lanes: The positions in `scale` of the loss's models, int64, one for each of its elements.
        loss: One or more models' losses.
    """
    return scale.index_select(0, lanes).to(loss.dtype).reshape(loss.shape)


def _unscale_whole(gradients: Sequence[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        values = gradient._values() if gradient.is_sparse else gradient
        by_dtype.setdefault(values.dtype, []).append(values)
    for alike in by_dtype.values():
        many_tensors.unscale_(alike, found_inf, inverse)
