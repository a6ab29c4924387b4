"""Kernels with a backward of their own, where the one that autograd derives copies or fills."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cgo.private.softmax import log_softmax_backward
from cgo.runtime.products import note

#: MKL computes products in columns of so many; with 10 it takes twice as long as with 16 (AVX-512),
#: with 24 a sixth longer than with 32, beyond which it makes no difference. Rows may be any number.
_COLUMNS, _WIDE = 16, 32


def batched_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, *, turned: bool = False
) -> Tensor:
    """(M, R, I) and (M, O, I) to (M, R, O), with a bias of (M, O).

    Args:
        rows: What the layers read.
        weight: Theirs.
        bias: Theirs, or None.
        turned: Whether the result may lie in memory as (M, O, R), where that is faster.
    """
    if torch.is_autocast_enabled(rows.device.type):  # casts what a backward would not see
        return _added(torch.bmm(rows, weight.transpose(1, 2)), bias)
    if turned and _narrow(rows, weight):
        columns: Tensor = _TurnedLinear.apply(rows, weight, bias)
        return columns.transpose(1, 2)
    result: Tensor = _BatchedLinear.apply(rows, weight, bias)
    return result


def _narrow(rows: Tensor, weight: Tensor) -> bool:
    outputs = weight.shape[1]
    incomplete = outputs < _WIDE and outputs % _COLUMNS != 0
    return incomplete and rows.shape[1] >= _COLUMNS and rows.device.type == "cpu"


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and rows.device.type == "cpu":
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
    return _added(torch.bmm(rows, weight.transpose(1, 2)), bias)


def _added(product: Tensor, bias: Tensor | None) -> Tensor:
    # The bias afterwards, where the result is: `baddbmm` copies it to where that will be.
    return product if bias is None else product.add_(bias.unsqueeze(1))


class _BatchedLinear(torch.autograd.Function):
    """The weight's gradient as the weight lies; autograd gives its transpose, to be copied."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        to_rows, to_weight, to_bias = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if to_rows else None,
            _to_weight(weight, gradient.transpose(1, 2), rows) if to_weight else None,
            gradient.sum(1) if to_bias else None,
        )


def _to_weight(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    note(weight, left, right)
    return torch.bmm(left, right)


class _TurnedLinear(torch.autograd.Function):
    """The same with the result as (M, O, R)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        if bias is None:
            return torch.bmm(weight, rows.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(2), weight, rows.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        to_rows, to_weight, to_bias = ctx.needs_input_grad
        return (
            torch.bmm(gradient.transpose(1, 2), weight) if to_rows else None,
            _to_weight(weight, gradient, rows) if to_weight else None,
            gradient.sum(2) if to_bias else None,
        )


def summed_cross_entropy(x: Tensor, target: Tensor, ignore: int) -> Tensor:
    """(M, N, C) and classes (M, N) to the sums (M,) over what is not ignored."""
    result: Tensor = _SummedCrossEntropy.apply(x, target, ignore)
    return result


class _SummedCrossEntropy(torch.autograd.Function):
    """Rows as columns, since torch's softmax takes rows one by one; a gradient for each member.

    Autograd would write that out for each sample, and turn the columns back in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, ignore: int) -> Tensor:
        columns = torch.log_softmax(x.transpose(1, 2).contiguous(), 1).unsqueeze(2)
        classes = target.unsqueeze(1)
        single, total = torch.ops.aten.nll_loss2d_forward(columns, classes, None, 0, ignore)
        ctx.save_for_backward(columns, classes, total)
        ctx.ignore = ignore
        return single.sum((1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, classes, total = ctx.saved_tensors
        each = gradient.view(-1, 1, 1).expand(classes.shape)
        found = torch.ops.aten.nll_loss2d_backward(
            each, columns, classes, None, 0, ctx.ignore, total
        )
        found = log_softmax_backward(found, columns, 1, columns.dtype)
        return found.squeeze(2).transpose(1, 2), None, None
