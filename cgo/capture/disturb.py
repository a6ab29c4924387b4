"""States of a module in which nothing is equal that only began so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: How far values move, relative to their own size; the next is tried where a module does not run,
#: or gives no numbers, at such a state.
AMOUNTS = (0.3, 0.03)

#: What zeros become at most, for an amount of one.
_UNIT = 0.3

#: Counters move by so much.
_STEPS = 7


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path, tied ones under each of their paths."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def disturb(module: nn.Module, amount: float, seed: int) -> None:
    """Move all parameters and buffers: weights and what was copied from them, gates of zero,
    averages and counters. Signs of buffers stay, as those of variances have to.

    The same module moves the same way; tied tensors move once. Whole numbers stay where they may be
    indices: only single ones move.

    Args:
        module: Changed in place.
        amount: Of `AMOUNTS`.
        seed: Another one gives another state.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.is_floating_point() and weight.numel():
                size = float(weight.square().mean().sqrt()) or _UNIT
                noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
                weight.add_((amount * size * noise).to(weight.dtype))
        for tensor in module.buffers():
            if tensor.is_floating_point() and tensor.numel():
                noise = torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
                shift = torch.where(tensor == 0, _UNIT * amount * noise, 0.0)
                tensor.mul_((1 + amount * noise).to(tensor.dtype)).add_(shift.to(tensor.dtype))
            elif tensor.numel() == 1 and tensor.dtype in (torch.int64, torch.int32):
                tensor.add_(_STEPS)


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back where a block raises."""
    before = {path: tensor.detach().clone() for path, tensor in tensors_of(module).items()}
    try:
        yield
    except BaseException:
        copy_tensors(before, tensors_of(module))
        raise


def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy by path, where both have one of the same shape."""
    with torch.no_grad():
        for path, tensor in source.items():
            if path in target and target[path].shape == tensor.shape:
                target[path].copy_(tensor)
