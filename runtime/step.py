"""The step that is captured: a module with its loss, called with a batch's named leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cgo.model import TrainingSpec, loss_function
from cgo.runtime.data import call_arguments, target_of
from cgo.runtime.precision import autocasting


class Step(nn.Module):
    """Module and loss as one module: leaves in, (loss, prediction) out.

    `names` fixes the order of the leaves. Floating leaves are cast where the precision is float64.
    """

    def __init__(self, module: nn.Module, training: TrainingSpec, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._loss = loss_function(training.loss)
        self._names = tuple(names)
        self._double = training.precision == "float64"

    def forward(self, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and prediction for one batch."""
        return compute(self.module, self._loss, dict(zip(self._names, leaves)), double=self._double)


def compute(
    module: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    leaves: Mapping[str, Tensor],
    *,
    double: bool,
) -> tuple[Tensor, Tensor]:
    """Call a module and its loss as the plain loop does; returns (loss, prediction)."""
    if double:
        leaves = {
            name: leaf.to(torch.float64) if leaf.is_floating_point() else leaf
            for name, leaf in leaves.items()
        }
    positional, named = call_arguments(leaves)
    output = module(*positional, **named)
    return loss(output, target_of(leaves)), prediction_of(output)


def prediction_of(output: Any) -> Any:
    """The tensor that metrics see: the output, or its "logits", or its first element."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"] if "logits" in output else next(iter(output.values()))
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode; afterwards each submodule has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def autocast(training: TrainingSpec, device: torch.device | str) -> Any:
    """The autocast context that the training spec's precision asks for."""
    return autocasting(training.autocast_dtype, torch.device(device))
