"""Other kernels for single operators, where torch's own are slow on a CPU.

Each takes what its ATen operator takes. They serve the members of groups that run one by one, and
nodes in no group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cgo.private.dispatch_modes import without_modes
from cgo.runtime.emitter import Column, Group


@dataclass(frozen=True)
class Kernel:
    """Another way of computing one operator.

    `applies` says whether it computes the same for a node (given as a group of one), `pays`
    whether measurements speak for it.
    """

    name: str
    operator: str
    applies: Callable[[Group], bool]
    pays: Callable[[Group], bool]
    function: Callable[..., Tensor]


def kernel_for(group: Group, device: torch.device) -> Kernel | None:
    """The kernel that a node is executed by on a device, or None for ATen's own.

    On a GPU that is ATen's own: linear layers lack the TF32 that convolutions have, depthwise
    convolutions are no faster than pooling, and attention is one kernel.
    """
    if device.type != "cpu":
        return None
    for kernel in KERNELS:
        if kernel.operator == group.operator and kernel.applies(group) and kernel.pays(group):
            return kernel
    return None


# --- convolution over one pixel -------------------------------------------------------------------


def is_pointwise(group: Group) -> bool:
    """Whether a convolution is a linear layer over the channels of each pixel."""
    given = group.arguments
    x, weight = given["input"], given["weight"]
    if x.ndim != 4 or weight.shape[2:] != (1, 1) or given["groups"] != 1:
        return False
    return given["padding"] in ((0, 0), (0,), "valid", "same") and set(given["stride"]) == {1}


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    """A 1x1 convolution as a matrix product; channels last in memory."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


# --- average pooling ------------------------------------------------------------------------------


def _is_same_pooling(group: Group) -> bool:
    """Whether each pixel becomes the mean of a square around it."""
    given = group.arguments
    sizes = {*given["kernel_size"]}
    if given["self"].ndim != 4 or len(sizes) > 1 or given["ceil_mode"]:
        return False
    (size,) = sizes
    stride = {*(given["stride"] or given["kernel_size"])}
    pads = {*given["padding"]}
    return (
        stride == {1}
        and size % 2 == 1
        and pads == {size // 2}
        and given["divisor_override"] is None
        and min(given["self"].shape[2:]) >= size
    )


def _few_channels(group: Group) -> bool:
    """Torch's own takes channels in vectors of sixteen; the rest one by one."""
    x: Column = group.arguments["self"]
    return x.shape[1] % 16 != 0 and x.shape[1] < 32 and math.prod(x.shape[2:]) >= 256


def pool_same(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling of stride 1 as a depthwise convolution; images keep their size."""
    result: Tensor = _PoolSame.apply(x, kernel_size[0], count_include_pad)
    return result


class _PoolSame(torch.autograd.Function):
    """Its backward is the same convolution: the square around a pixel is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, include_pad: bool) -> Tensor:
        ctx.size, ctx.include_pad = size, include_pad
        result = _box(x, size)
        return result if include_pad else result.mul_(_shares(x.shape[2:], size, x.dtype, x.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.include_pad:
            given = gradient.shape[2:], ctx.size, gradient.dtype, gradient.device
            gradient = gradient * _shares(*given)
        return _box(gradient, ctx.size), None, None


def _box(x: Tensor, size: int) -> Tensor:
    channels = x.shape[1]
    weight = _weights(channels, size, x.dtype, x.device)
    return F.conv2d(x, weight, padding=size // 2, groups=channels)


@cache
def _weights(channels: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with without_modes():  # what is kept has numbers, even if first wanted in a rehearsal
        return torch.full((channels, 1, size, size), 1 / size**2, dtype=dtype, device=device)


@cache
def _shares(shape: torch.Size, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H, W): what the sum over a full square is multiplied by, where part of it is padding."""
    with without_modes():
        ones = torch.ones(1, 1, *shape, dtype=dtype, device=device)
        return 1 / F.avg_pool2d(ones, size, 1, size // 2)[0, 0]


# --- attention ------------------------------------------------------------------------------------


def is_plain_attention(group: Group) -> bool:
    """Whether every token attends to every token, without dropout."""
    given = group.arguments
    return (
        given["attn_mask"] is None
        and given["dropout_p"] == 0
        and not given["is_causal"]
        and not given["enable_gqa"]
        and given["query"].ndim >= 3
    )


def _short(group: Group) -> bool:
    """The products of all pairs fit into the cache, and need not be made twice."""
    key: Column = group.arguments["key"]
    return key.shape[-2] <= 128


def attention(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None = None, **more: Any
) -> Tensor:
    """Attention as two products around a softmax."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), value)


KERNELS = (
    Kernel("product of pixels", "aten.conv2d", is_pointwise, lambda group: True, pointwise),
    Kernel("box filter", "aten.avg_pool2d", _is_same_pooling, _few_channels, pool_same),
    Kernel(
        "explicit attention",
        "aten.scaled_dot_product_attention",
        is_plain_attention,
        _short,
        attention,
    ),
)
