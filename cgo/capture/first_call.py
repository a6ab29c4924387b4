"""What a module sets up when it is called for the first time.

Lazy parameters get their shapes and values then, and some modules register buffers in their first
forward. Both belong to the state that a model starts with, so the first call is made when the model
is captured: of a copy for buffers, of the module itself for lazy parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cgo.capture.disturb import tensors_of
from cgo.model import TrainingSpec
from cgo.runtime.data import Leaves, call_arguments, preserved_random_state
from cgo.runtime.state import STREAM, RandomState, put_tensor
from cgo.runtime.step import Step, autocast


def lazy(module: nn.Module) -> list[str]:
    """Paths of parameters and buffers whose shapes are not known yet."""
    found: dict[str, Any] = dict(module.named_parameters()) | dict(module.named_buffers())
    return [path for path, tensor in found.items() if is_lazy(tensor)]


def materialise(
    module: nn.Module, training: TrainingSpec, leaves: Leaves, random: RandomState
) -> dict[str, Tensor]:
    """Call a lazy module once, as `with torch.no_grad(): net(inputs)` before its optimizer is made.

    Gives all its tensors by path, and, as `cgo.runtime.state.STREAM`, where torch's stream goes on.

    Args:
        module: Changed in place; in the modes that its factory left it in.
        training: Its precision.
        leaves: The first training batch.
        random: The streams after the factory.

    Raises:
        Exception: what the module raises.
    """
    double = training.precision == "float64"
    leaves = {k: v.double() if double and v.is_floating_point() else v for k, v in leaves.items()}
    positional, named = call_arguments(leaves)
    with preserved_random_state(), autocast(training, "cpu"), torch.no_grad():
        random.enter()
        module(*positional, **named)
        stream = torch.get_rng_state()
    own = {path: tensor.detach().clone() for path, tensor in tensors_of(module).items()}
    return {**own, STREAM: stream}


def registered(
    module: nn.Module, training: TrainingSpec, leaves: Leaves, seed: int
) -> dict[str, Tensor] | None:
    """Buffers that a first forward registers, by path; None where there are none.

    The module gets them, too, unless its first call is then another one.

    Args:
        module: Stays as it is but for these buffers.
        training: Its loss and precision.
        leaves: The first training batch.
        seed: Of the streams in this call.

    Raises:
        Exception: what the module raises.
    """
    called = copy.deepcopy(module)
    first = _call(called, training, leaves, seed)
    before, after = dict(module.named_buffers()), dict(called.named_buffers())
    fresh = {path: after[path].detach().clone() for path in after if path not in before}
    if not fresh:
        return None
    given = copy.deepcopy(module)
    kept = set(called.state_dict())
    for path, tensor in fresh.items():
        put_tensor(given, path, tensor.clone(), persistent=path in kept)
    if not _equal(first, _call(copy.deepcopy(given), training, leaves, seed)):
        return None
    for path, tensor in fresh.items():
        put_tensor(module, path, tensor.clone(), persistent=path in kept)
    return fresh


def _call(
    module: nn.Module, training: TrainingSpec, leaves: Leaves, seed: int
) -> tuple[Tensor, Tensor]:
    """The loss of a first step, and where it leaves the random stream."""
    step = Step(module, training, tuple(leaves))
    with preserved_random_state(), autocast(training, "cpu"):
        torch.manual_seed(seed)
        loss, _ = step(*(leaf.clone() for leaf in leaves.values()))
        return loss.detach(), torch.get_rng_state()


def _equal(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right))
