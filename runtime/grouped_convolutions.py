"""Convolutions of many models side by side in a kernel of ours, as operators with a schema.

What computes them is `cgo.runtime.triton_kernels.convolution`; steps that call them are recorded,
captured, rehearsed on fake tensors and compiled as others are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cgo.runtime.precision import float32_products


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    members: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """A convolution of each member's own channels: (N, M*C, H, W) to (N, M*O, H', W').

    Args:
        x: Images.
        weight: (M*O, C, K, K).
        bias: (M*O), or None.
        members: M.
        stride: In both directions.
        padding: With zeros on each side.
        dtype: To compute in, as autocast would; that of the result.
    """
    # Read where torch's own convolutions would read it; a step keeps what it was recorded with.
    tf32 = float32_products(convolutions=True) == "tf32"
    given = (x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    result: Tensor = _Convolved.apply(*given, members, stride, padding, tf32)
    return result


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = rest
        return torch.ops.cgo.grouped_convolution(x, weight, bias, *rest)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        own, size = torch.ops.cgo, tuple(x.shape[2:])
        found = None
        if to_weight:
            kernel = weight.shape[-1]
            found = own.grouped_convolution_to_weight(gradient, x, kernel, *ctx.rest)
        return (
            own.grouped_convolution_to_input(gradient, weight, *size, *ctx.rest) if to_x else None,
            None if found is None else found.to(weight.dtype),
            gradient.sum((0, 2, 3)) if to_bias else None,
            *[None] * len(ctx.rest),
        )


# --- operators ------------------------------------------------------------------------------------

_DEVICES = ("CPU", "CUDA")
_REST = "int members, int stride, int padding, bool tf32"

torch.library.define(
    "cgo::grouped_convolution", f"(Tensor x, Tensor weight, Tensor? bias, {_REST}) -> Tensor"
)
torch.library.define(
    "cgo::grouped_convolution_to_input",
    f"(Tensor gradient, Tensor weight, int height, int width, {_REST}) -> Tensor",
)
torch.library.define(
    "cgo::grouped_convolution_to_weight",
    f"(Tensor gradient, Tensor x, int kernel, {_REST}) -> Tensor",
)


@torch.library.impl("cgo::grouped_convolution", _DEVICES)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    from cgo.runtime.triton_kernels import convolution  # where it is called, Triton is there

    return convolution.forward(x.contiguous(), weight.contiguous(), bias, *rest)


@torch.library.impl("cgo::grouped_convolution_to_input", _DEVICES)
def _to_input(gradient: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    from cgo.runtime.triton_kernels import convolution

    return convolution.to_input(gradient.contiguous(), weight.contiguous(), *rest)


@torch.library.impl("cgo::grouped_convolution_to_weight", _DEVICES)
def _to_weight(gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    from cgo.runtime.triton_kernels import convolution

    return convolution.to_weight(gradient.contiguous(), x.contiguous(), *rest)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, members: int, stride: int, padding: int,
    tf32: bool,
) -> Tensor:  # fmt: skip
    sizes = [(size + 2 * padding - weight.shape[-1]) // stride + 1 for size in x.shape[2:]]
    return x.new_empty((len(x), len(weight), *sizes))


def _fake_to_input(
    gradient: Tensor, weight: Tensor, height: int, width: int, members: int, *rest: Any
) -> Tensor:
    return gradient.new_empty((len(gradient), members * weight.shape[1], height, width))


def _fake_to_weight(gradient: Tensor, x: Tensor, kernel: int, members: int, *rest: Any) -> Tensor:
    shape = (gradient.shape[1], x.shape[1] // members, kernel, kernel)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(shape, dtype=dtype)


torch.library.register_fake("cgo::grouped_convolution", _fake_forward)
torch.library.register_fake("cgo::grouped_convolution_to_input", _fake_to_input)
torch.library.register_fake("cgo::grouped_convolution_to_weight", _fake_to_weight)
