"""Batch norm with what follows it, as operators of ours: an addition and an activation.

The operators `cgo::batch_norm_activation` and its backward have a schema, so steps that call them
are recorded, captured, rehearsed on fake tensors and compiled as others are; what computes them is
`cgo.runtime.triton_kernels.norm`. Statistics are of each channel, so of each model alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Activations that may follow, by our name for them.
ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")

#: Those whose result tells their derivative; others are given their argument anew, for which what
#: was added would have to be kept, too.
TOLD_BY_RESULT = frozenset({"none", "relu", "relu6"})

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    added: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`activation(batch_norm(x) + added)`, of (N, C, ...).

    Args:
        x: Its dtype is that of the result. The result has its memory format.
        weight: Of each channel, or None.
        bias: Likewise.
        mean: Running statistics. In training they are updated in place; None: none are kept.
        var: Likewise.
        training: Normalise by the batch's own statistics.
        momentum: The batch's share in the running statistics.
        eps: Is added to variances.
        added: Of x's shape and dtype; not with an activation beyond `TOLD_BY_RESULT`.
        activation: One of `ACTIVATIONS`.

    Raises:
        ValueError: as `torch.nn.functional.batch_norm`, where a channel has a single value.
    """
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )
    result: Tensor = _Normalised.apply(
        x, weight, bias, mean, var, training, momentum, eps, added, activation
    )
    return result


def trained(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """`normalised` in training mode; running statistics are updated in place."""
    return normalised(x, weight, bias, mean, var, True, *rest, **named)


def trained_copying(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """The same, leaving the running statistics as they are."""
    return trained(x, weight, bias, mean.clone(), var.clone(), *rest, **named)


def evaluated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """`normalised` by running statistics."""
    return normalised(x, weight, bias, mean, var, False, *rest, **named)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, _, _, training, _, _, added, activation = given
        out, mean, rstd = torch.ops.cgo.batch_norm_activation(*given)
        kept = out if activation in ("relu", "relu6") else None
        ctx.save_for_backward(x, kept, weight, bias, mean, rstd)
        ctx.rest = training, activation, added is not None and activation != "none"
        ctx.added = added is not None
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.cgo.batch_norm_activation_backward(
            gradient, *ctx.saved_tensors, *ctx.rest
        )
        to_x, to_weight, to_bias, to_added = found
        if ctx.added and not ctx.rest[-1]:
            to_added = gradient
        given = (to_x, to_weight, to_bias, None, None, None, None, None, to_added, None)
        return tuple(v if needed else None for v, needed in zip(given, ctx.needs_input_grad))


# --- operators ------------------------------------------------------------------------------------

_DEVICES = ("CPU", "CUDA")

torch.library.define(
    "cgo::batch_norm_activation",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "bool training, float momentum, float eps, Tensor? added, str activation) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "cgo::batch_norm_activation_backward",
    "(Tensor gradient, Tensor x, Tensor? out, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, bool training, str activation, bool added) -> (Tensor, Tensor, Tensor, Tensor)",
)


def arranged(value: Tensor) -> Tensor:
    """A tensor that is contiguous in one of the formats of images: itself, where it is."""
    last = _LAST.get(value.ndim)
    if last is not None and value.is_contiguous(memory_format=last):
        return value
    return value.contiguous()


def _alike(value: Tensor | None, x: Tensor) -> Tensor | None:
    """A tensor that lies in memory as `x`."""
    if value is None or value.stride() == x.stride():
        return value
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


@torch.library.impl("cgo::batch_norm_activation", _DEVICES)
def _forward(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    from cgo.runtime.triton_kernels import norm  # where it is called, Triton is there

    x = arranged(x)
    *rest, added, activation = given
    whole: list[Any] = [*rest, _alike(added, x), activation]
    return norm.forward(x, *whole)


@torch.library.impl("cgo::batch_norm_activation_backward", _DEVICES)
def _backward(
    gradient: Tensor, x: Tensor, out: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cgo.runtime.triton_kernels import norm

    x = arranged(x)
    given = _alike(gradient, x)
    assert given is not None
    to_x, to_weight, to_bias, to_added = norm.backward(given, x, _alike(out, x), *rest)
    return to_x, to_weight, to_bias, x.new_empty(0) if to_added is None else to_added


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(arranged(x))
    mean = x.new_empty(x.shape[1], dtype=_moments_dtype(x))
    return out, mean, torch.empty_like(mean)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: str,
    added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_x = torch.empty_like(arranged(x))
    to_added = torch.empty_like(to_x) if added else x.new_empty(0)
    to_weight, to_bias = (torch.empty_like(mean if p is None else p) for p in (weight, bias))
    return to_x, to_weight, to_bias, to_added


torch.library.register_fake("cgo::batch_norm_activation", _fake_forward)
torch.library.register_fake("cgo::batch_norm_activation_backward", _fake_backward)


def _moments_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
