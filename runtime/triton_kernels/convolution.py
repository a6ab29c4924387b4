"""Convolutions of many models side by side, as products of what each output reads (implicit GEMM).

Images are contiguous, (N, M*C, H, W); a model's channels read the same model's alone, so a program
has one model. Products are accumulated in float32, in TF32 where that is allowed for convolutions:
the precision is a kernel's own, not a setting of the process.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Pixels of a tile; the least that a product of tiles has along any side, and the most: nothing
#: between, as each size is compiled anew.
_PIXELS = 128
_LEAST, _MOST = 16, 64

#: Programs that fill a device, and pixels that are worth a part of their own.
_PROGRAMS = 1024
_PART = 1024

#: Sizes that say nothing about how values are best read, which are all but the stride.
_SIZES = (
    "samples", "members", "channels", "outputs", "height", "width", "y_height", "y_width",
    "padding",
)  # fmt: skip


@triton.jit
def _sources(
    row, column, k, height, width, stride, padding, KERNEL: tl.constexpr, BACK: tl.constexpr
):
    """What outputs read under one element of the kernel, and whether that is inside the image.

    Backwards: which outputs an input was read by.
    """
    if BACK:
        row = row + padding - k // KERNEL
        column = column + padding - k % KERNEL
        inside = (row % stride == 0) & (column % stride == 0)
        row = row // stride
        column = column // stride
        inside = inside & (row >= 0) & (column >= 0)
    else:
        row = row * stride + k // KERNEL - padding
        column = column * stride + k % KERNEL - padding
        inside = (row >= 0) & (column >= 0)
    return row * width + column, inside & (row < height) & (column < width)


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    x, weight, bias, y,
    samples, members, channels, outputs, height, width, y_height, y_width, stride, padding,
    KERNEL: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(N, M*C, H, W) to (N, M*O, H', W'); backwards with a weight of (M*C, O, K, K)."""
    member = tl.program_id(1)
    output = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    size = y_height * y_width
    index = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sample = index // size
    pixel = index % size
    image = (sample.to(tl.int64) * members + member) * channels * (height * width)
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for k in range(0, KERNEL * KERNEL):
        source, inside = _sources(
            pixel // y_width, pixel % y_width, k, height, width, stride, padding, KERNEL, BACK
        )
        inside = inside & (sample < samples)
        for first in range(0, channels, DEPTH):
            channel = first + tl.arange(0, DEPTH)
            at = image[None, :] + (channel[:, None] * (height * width) + source[None, :])
            value = tl.load(x + at, (channel < channels)[:, None] & inside[None, :], 0.0)
            if BACK:
                own = (member * channels + channel)[None, :] * outputs + output[:, None]
            else:
                own = (member * outputs + output)[:, None] * channels + channel[None, :]
            known = (output < outputs)[:, None] & (channel < channels)[None, :]
            factor = tl.load(weight + own * (KERNEL * KERNEL) + k, known, 0.0)
            total = tl.dot(factor, value, total, input_precision=PRECISION)
    if bias is not None:
        shift = tl.load(bias + member * outputs + output, output < outputs, 0.0)
        total += shift.to(ACC)[:, None]
    place = (sample.to(tl.int64) * members + member) * outputs * size + pixel
    known = (output < outputs)[:, None] & (sample < samples)[None, :]
    tl.store(y + place[None, :] + output[:, None] * size, total.to(y.dtype.element_ty), known)


@triton.jit(do_not_specialize=(*_SIZES, "pixels_of_part"))
def _weigh(
    x, gradient, held,
    samples, members, channels, outputs, height, width, y_height, y_width, stride, padding,
    pixels_of_part,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part's share in the gradient of the weight, under one element of the kernel."""
    blocks = tl.cdiv(channels, COLUMNS)
    k = tl.program_id(0) % (KERNEL * KERNEL)
    block = tl.program_id(0) // (KERNEL * KERNEL)
    member = tl.program_id(1)
    output = (block // blocks) * ROWS + tl.arange(0, ROWS)
    channel = (block % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    size = y_height * y_width
    begin = tl.program_id(2) * pixels_of_part
    end = tl.minimum(begin + pixels_of_part, samples * size)
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for first in range(begin, end, DEPTH):
        index = first + tl.arange(0, DEPTH)
        sample = index // size
        pixel = index % size
        lane = sample.to(tl.int64) * members + member
        at = (lane * outputs * size + pixel)[None, :] + output[:, None] * size
        left = tl.load(gradient + at, (output < outputs)[:, None] & (index < end)[None, :], 0.0)
        source, inside = _sources(
            pixel // y_width, pixel % y_width, k, height, width, stride, padding, KERNEL, False
        )
        inside = inside & (index < end)
        at = (lane * channels * (height * width) + source)[:, None]
        at = at + channel[None, :] * (height * width)
        right = tl.load(x + at, inside[:, None] & (channel < channels)[None, :], 0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    place = (member * outputs + output)[:, None] * channels + channel[None, :]
    known = (output < outputs)[:, None] & (channel < channels)[None, :]
    whole = tl.program_id(2).to(tl.int64) * members * outputs * channels * (KERNEL * KERNEL)
    tl.store(held + whole + place * (KERNEL * KERNEL) + k, total, known)


# --- launches -------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    members: int,
    stride: int,
    padding: int,
    tf32: bool,
) -> Tensor:
    """A convolution of each member's channels: (N, M*C, H, W) by (M*O, C, K, K)."""
    kernel = weight.shape[-1]
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    y = x.new_empty((len(x), len(weight), height, width))
    shape = (weight.shape[1], len(weight) // members)
    _convolved(x, weight, bias, y, shape, members, (stride, padding), tf32, back=False)
    return y


def to_input(
    gradient: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    members: int,
    stride: int,
    padding: int,
    tf32: bool,
) -> Tensor:
    """The gradient of the input, so high and wide."""
    channels = weight.shape[1]
    found = gradient.new_empty((len(gradient), members * channels, height, width))
    shape = (len(weight) // members, channels)
    _convolved(gradient, weight, None, found, shape, members, (stride, padding), tf32, back=True)
    return found


def to_weight(
    gradient: Tensor,
    x: Tensor,
    kernel: int,
    members: int,
    stride: int,
    padding: int,
    tf32: bool,
) -> Tensor:
    """The gradient of the weight, (M*O, C, K, K), in what products are accumulated in."""
    channels, outputs = x.shape[1] // members, gradient.shape[1] // members
    rows, columns = _side(outputs), _side(channels)
    pixels = gradient[:, 0].numel()
    blocks = kernel**2 * triton.cdiv(outputs, rows) * triton.cdiv(channels, columns)
    parts = max(1, min(_PROGRAMS // (blocks * members), triton.cdiv(pixels, _PART)))
    of_part = triton.cdiv(triton.cdiv(pixels, parts), _LEAST) * _LEAST
    parts = triton.cdiv(pixels, of_part)
    size = (parts, members * outputs, channels, kernel, kernel)
    held = x.new_empty(size, dtype=_accumulator(x.dtype))
    sizes = (len(x), members, channels, outputs, *x.shape[2:], *gradient.shape[2:])
    with torch.cuda.device_of(x):
        _weigh[(blocks, members, parts)](
            x, gradient, held, *sizes, stride, padding, of_part,
            KERNEL=kernel, ROWS=rows, DEPTH=_MOST, COLUMNS=columns, **_products(x.dtype, tf32),
        )  # fmt: skip
    return held[0] if parts == 1 else held.sum(0)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    shape: tuple[int, int],
    members: int,
    geometry: tuple[int, int],
    tf32: bool,
    *,
    back: bool,
) -> None:
    channels, outputs = shape
    rows, pixels = _side(outputs), y[:, 0].numel()
    grid = (triton.cdiv(pixels, _PIXELS), members, triton.cdiv(outputs, rows))
    sizes = (len(x), members, channels, outputs, *x.shape[2:], *y.shape[2:])
    with torch.cuda.device_of(x):
        _convolve[grid](
            x, weight, bias, y, *sizes, *geometry,
            KERNEL=weight.shape[-1], BACK=back, ROWS=rows, DEPTH=_LEAST,
            COLUMNS=_PIXELS, **_products(x.dtype, tf32),
        )  # fmt: skip


def _side(size: int) -> int:
    return _LEAST if size <= _LEAST else _MOST


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    double = dtype == torch.float64
    precision = "tf32" if tf32 and dtype == torch.float32 else "ieee"
    return {"ACC": tl.float64 if double else tl.float32, "PRECISION": precision}
