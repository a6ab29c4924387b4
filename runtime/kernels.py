"""Kernels with a backward of their own, where the one that autograd derives copies or fills."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def batched_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, R, I) and (M, O, I) to (M, R, O), with a bias of (M, O)."""
    if torch.is_autocast_enabled(rows.device.type):  # casts what a backward would not see
        return _product(rows, weight, bias)
    result: Tensor = _BatchedLinear.apply(rows, weight, bias)
    return result


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    # The bias afterwards, where the result is: `baddbmm` copies it to where that will be.
    return torch.bmm(rows, weight.transpose(1, 2)).add_(bias.unsqueeze(1))


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
            torch.bmm(gradient.transpose(1, 2), rows) if to_weight else None,
            gradient.sum(1) if to_bias else None,
        )
