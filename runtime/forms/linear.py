"""Linear layers and matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cgo.runtime.emitter import Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.runtime.kernels import batched_linear
from cgo.tuning import CHANNELS, STACKED


@form("wide linear", "linear", layouts="channels")
def wide_linear(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """A shared input and separate weights: one linear layer with M*O outputs."""
    given = group.arguments
    x, weight = given["input"], given["weight"]
    if not x.shared or weight.shared or weight.ndim != 2:
        return None
    value = emitter.call(
        F.linear, emitter.value(x.refs[0]), emitter.joined(weight), emitter.optional(given["bias"])
    )
    if x.ndim == 2:
        return [Packed(value, CHANNELS)]
    return [Packed(emitter.call(last_to_lanes, value, group.size), STACKED)]


@form("batched linear", "linear", layouts="stacked")
def batched(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Separate weights: one `baddbmm` over the members (`bmm` without bias)."""
    given = group.arguments
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if weight.shared or weight.ndim != 2:
        return None
    shift = None if bias is None else emitter.stacked(bias)
    value = emitter.call(turned_linear_of, emitter.stacked(x), emitter.stacked(weight), shift)
    return [Packed(value, STACKED)]


@form("folded linear", "linear", layouts="stacked")
def folded_linear(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Shared weights: the layer takes any leading axes, so the members' as well."""
    given = group.arguments
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not weight.shared or (bias is not None and not bias.shared):
        return None
    shift = None if bias is None else emitter.value(bias.refs[0])
    value = emitter.call(F.linear, emitter.stacked(x), emitter.value(weight.refs[0]), shift)
    return [Packed(value, STACKED)]


@form("batched product", "mm bmm matmul", layouts="stacked")
def product(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Matrix products as one `matmul` with the members as a leading axis."""
    left, right = group.columns
    if min(left.ndim, right.ndim) < 2:
        return None
    ndim = max(left.ndim, right.ndim)
    value = emitter.call(torch.matmul, emitter.leading(left, ndim), emitter.leading(right, ndim))
    return [Packed(value, STACKED)]


@form("batched addmm", "addmm", layouts="stacked")
def addmm(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """`addmm` as `baddbmm`; what is added broadcasts to (N, O) first."""
    given = group.arguments
    added, left, right = group.columns
    value = emitter.call(
        torch.baddbmm,
        emitter.leading(added, 2),
        emitter.stacked(left),
        emitter.stacked(right),
        beta=given["beta"],
        alpha=given["alpha"],
    )
    return [Packed(value, STACKED)]


def batched_linear_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, ..., I) and (M, O, I) to (M, ..., O)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    return batched_linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[1])


def turned_linear_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `batched_linear_of`; the result may lie in memory with its last axis before the rows."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    result = batched_linear(rows, weight, bias, turned=True)
    return result.view(*x.shape[:-1], weight.shape[1])


def last_to_lanes(value: Tensor, size: int) -> Tensor:
    """(..., M*O) to (M, ..., O); a view."""
    return value.unflatten(-1, (size, -1)).movedim(-2, 0)
