"""Optimizers, schedulers and clipping, one set a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cgo.errors import ModelError
from cgo.model import TrainingSpec, optimizer_class, scheduler_class
from cgo.user_code import contained, told

log = logging.getLogger(__name__)


class Updater:
    """Turns one model's gradients into new weights, as its training spec says."""

    def __init__(self, training: TrainingSpec, parameters: Sequence[Tensor]) -> None:
        """Raises `ModelError` when the optimizer or scheduler refuses what it is given."""
        self.training = training
        self.moves = 0  # how often the scheduler may have changed hyper-parameters
        self.parameters = list(parameters)
        _check_dtypes(training, self.parameters)
        try:
            with contained:
                self.optimizer = optimizer_class(training.optimizer)(
                    self.parameters, **training.optimizer_kwargs
                )
                self.scheduler = None
                if training.scheduler is not None:
                    self.scheduler = scheduler_class(training.scheduler)(
                        self.optimizer, **training.scheduler_kwargs
                    )
        except Exception as error:
            raise ModelError(
                f"optimizer {training.optimizer} or scheduler {training.scheduler} raised "
                f"{told(error)}"
            ) from error

        self._check_numbers()
        self._failed: Exception | None = None  # what zero_grad raised, until the step
        self._plain_zero_grad = type(self.optimizer).zero_grad is torch.optim.Optimizer.zero_grad

    @property
    def lr(self) -> float:
        """The first parameter group's learning rate; NaN for an optimizer that has none."""
        rate = self.optimizer.param_groups[0].get("lr")
        return float("nan") if rate is None else float(rate)

    def _check_numbers(self) -> None:
        """Torch's optimizers check some of their numbers, and compute with the others as given."""
        if not type(self.optimizer).__module__.startswith("torch.optim"):
            return
        for key, value in self.optimizer.param_groups[0].items():
            parts = value if isinstance(value, (tuple, list)) else (value,)
            # Muon's rule for rates has a name.
            if key not in ("params", "adjust_lr_fn") and not all(map(_is_number, parts)):
                raise ModelError(
                    f"optimizer {self.training.optimizer}: {key} {value!r:.60} is no number that "
                    "it can compute with"
                )

    def zero_grad(self) -> None:
        """Forget the last step's gradients; what the optimizer's own way raises, `step` raises."""
        if not self._plain_zero_grad:
            try:
                with contained:
                    self.optimizer.zero_grad()
                return
            except Exception as error:
                self._failed = error
        for parameter in self.parameters:  # the same effect, without a profiler record a step
            parameter.grad = None

    def step(self, *, skip: bool = False) -> None:
        """Clip this model's own gradients, update, and step the scheduler.

        Args:
            skip: Leave out all but the scheduler, for a step whose gradients have overflowed.

        Raises:
            Exception: whatever the optimizer or the scheduler raised.
        """
        if self._failed is not None:
            raise self._failed
        if skip:
            # What schedulers look at to warn of a missing optimizer step.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            if self.training.grad_clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.training.grad_clip_norm)
            with contained:
                self.optimizer.step()
        self.step_scheduler()

    def step_scheduler(self) -> None:
        """Step a scheduler that goes by steps; raises what it raises."""
        if self.training.scheduler_interval == "step":
            self._schedule()

    def end_epoch(self) -> None:
        """Step a scheduler that goes by epochs; raises what it raises."""
        if self.training.scheduler_interval == "epoch":
            self._schedule()

    def _schedule(self) -> None:
        if self.scheduler is None:
            return
        self.moves += 1
        with contained:
            self.scheduler.step()
        if not _is_number(rate := self.optimizer.param_groups[0]["lr"]):
            raise ModelError(
                f"scheduler {self.training.scheduler} gave the learning rate {rate!r:.60}"
            )


def _is_number(value: Any) -> bool:
    """What an optimizer's setting may be: a flag, None, or a number that a tensor can hold."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, (float, Tensor))


#: What an optimizer is taken to keep that cannot be tried: as much as Adam.
_UNKNOWN_MOMENTS = 2.0


def moments_of(training: TrainingSpec) -> float:
    """Elements that a spec's optimizer keeps for each one of a parameter: 2 for Adam."""
    return _moments(training.optimizer, json.dumps(training.optimizer_kwargs, sort_keys=True))


#: Tensors of a parameter's size that torch's usual optimizers keep, by settings; to try one takes
#: a step, for which torch imports its compiler.
_MOMENTS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "SGD": lambda given: 1.0 if given.get("momentum") else 0.0,
    "Adam": lambda given: 3.0 if given.get("amsgrad") else 2.0,
    "AdamW": lambda given: 3.0 if given.get("amsgrad") else 2.0,
    "RMSprop": lambda given: 1.0 + bool(given.get("momentum")) + bool(given.get("centered")),
    "Adagrad": lambda given: 1.0,
}

#: Those whose steps merged models take by `cgo.runtime.steps`, and not by torch's optimizers.
FUSED_OPTIMIZERS = frozenset(_MOMENTS)


@cache
def _moments(optimizer: str, kwargs: str) -> float:
    if (known := _MOMENTS.get(optimizer)) is not None:
        return known(json.loads(kwargs))
    return moments_seen(optimizer, kwargs)


def moments_seen(optimizer: str, kwargs: str) -> float:
    """Of a true optimizer of a small parameter; of one that refuses it, what Adam keeps.

    Args:
        optimizer: Its name.
        kwargs: Its arguments, as JSON.
    """
    parameter = torch.nn.Parameter(torch.zeros(16, 16))
    parameter.grad = torch.zeros_like(parameter)
    try:
        with contained:
            small = optimizer_class(optimizer)([parameter], **json.loads(kwargs))
            small.step()
            kept = [value for value in small.state[parameter].values() if isinstance(value, Tensor)]
    except Exception as error:
        log.debug("what %s keeps of a parameter is not known: %s", optimizer, told(error))
        return _UNKNOWN_MOMENTS
    return sum(value.numel() for value in kept if value.ndim) / parameter.numel()


def _check_dtypes(training: TrainingSpec, parameters: Sequence[Tensor]) -> None:
    if training.precision == "float16" and any(p.dtype is torch.float16 for p in parameters):
        raise ModelError(
            "precision 'float16' casts float32 parameters as it goes, and cannot scale the "
            "gradients of parameters that are float16 themselves: build the module in float32"
        )
