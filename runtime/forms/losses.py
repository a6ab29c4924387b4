"""Losses: element by element over all members, then reduced per lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cgo.operators import aten
from cgo.runtime.emitter import Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.runtime.kernels import summed_cross_entropy
from cgo.tuning import STACKED

#: Classes up to which rows are short.
_FEW = 32

#: ATen's numbers for a loss's `reduction`.
_NONE, _MEAN, _SUM = 0, 1, 2


@form("folded cross entropy", "cross_entropy_loss", layouts="stacked")
def cross_entropy(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """One cross entropy over M*N samples, reduced per member."""
    return _folded(emitter, group, cross_entropy_of, "ignore_index", "label_smoothing")


@form("folded negative log likelihood", "nll_loss_nd nll_loss nll_loss2d", layouts="stacked")
def nll(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """One negative log likelihood over M*N samples, reduced per member."""
    return _folded(emitter, group, nll_of, "ignore_index")


def _folded(
    emitter: Emitter, group: Group, function: Callable[..., Tensor], *literals: str
) -> list[Packed] | None:
    """A loss over classes without weights, of batches."""
    given = group.arguments
    x, target = given["self"], given["target"]
    if given["weight"] is not None or x.ndim < 2:
        return None
    values = [given[name] for name in ("reduction", *literals)]
    value = emitter.call(function, emitter.stacked(x), emitter.stacked(target), *values)
    return [Packed(value, STACKED)]


@form(
    "elementwise loss",
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy
    binary_cross_entropy_with_logits soft_margin_loss""",
    layouts="stacked",
)
def elementwise_loss(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """The loss of each element, reduced per member."""
    given = group.arguments
    columns = group.columns
    if len({column.type.dtype for column in columns}) > 1:
        return None
    if any(column.shape != columns[0].shape for column in columns):
        return None  # what broadcasts is left to the general rule
    overload = aten(group.nodes[0].op)
    assert overload is not None
    tensors = {
        name: emitter.stacked(value)
        for name, value in given.items()
        if any(value is column for column in columns)
    }
    literals = emitter.literals(group, "reduction")
    value = emitter.call(overload, **tensors, **literals, reduction=_NONE)
    return [Packed(emitter.call(reduce_lanes, value, given["reduction"]), STACKED)]


def reduce_lanes(value: Tensor, reduction: int) -> Tensor:
    """(M, ...) to (M,), or as it is without a reduction."""
    if reduction == _NONE:
        return value
    flat = value.flatten(1)
    return flat.mean(1) if reduction == _MEAN else flat.sum(1)


def cross_entropy_of(
    x: Tensor, target: Tensor, reduction: int, ignore: int, smoothing: float
) -> Tensor:
    """(M, N, C, ...) with classes (M, N, ...) or probabilities (M, N, C, ...) to (M,)."""
    # Half precision is left to torch, which under autocast computes losses in single.
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if exact and _short(x, target) and not smoothing and reduction != _NONE:
        total = summed_cross_entropy(x, target, ignore)
        return total if reduction == _SUM else total / _counted(target, ignore)
    rows, classes = x.flatten(0, 1), target.flatten(0, 1)
    if _short(x, target):
        # Torch's softmax takes rows one by one: short ones are faster the other way round.
        rows, classes = rows.t().contiguous().unsqueeze(0), classes.unsqueeze(0)
    single = F.cross_entropy(
        rows, classes, ignore_index=ignore, label_smoothing=smoothing, reduction="none"
    )
    single = single.reshape(*x.shape[:2], *single.shape[1:] if x.ndim > 3 else ())
    if target.is_floating_point():
        return reduce_lanes(single, reduction)
    return _over_counted(single, target, reduction, ignore)


def _short(x: Tensor, target: Tensor) -> bool:
    """Whether there are few classes, given by number, and one for each sample; on a CPU."""
    classes = x.ndim == 3 and target.ndim == 2 and not target.is_floating_point()
    return classes and x.shape[-1] <= _FEW and x.device.type == "cpu"


def nll_of(x: Tensor, target: Tensor, reduction: int, ignore: int) -> Tensor:
    """(M, N, C, ...) with classes (M, N, ...) to (M,)."""
    single = F.nll_loss(
        x.flatten(0, 1), target.flatten(0, 1), ignore_index=ignore, reduction="none"
    ).unflatten(0, x.shape[:2])
    return _over_counted(single, target, reduction, ignore)


def _over_counted(single: Tensor, target: Tensor, reduction: int, ignore: int) -> Tensor:
    """The mean is over what is not ignored; over nothing it is NaN, as alone."""
    if reduction != _MEAN:
        return reduce_lanes(single, reduction)
    return single.flatten(1).sum(1) / _counted(target, ignore)


def _counted(target: Tensor, ignore: int) -> Tensor:
    """How many samples are not ignored: of each member, or of all of them alike."""
    if target.stride(0) == 0:  # one target that all members share
        return (target[0] != ignore).sum()
    return (target != ignore).flatten(1).sum(1)
