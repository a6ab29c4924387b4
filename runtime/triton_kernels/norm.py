"""Batch norm, an addition and an activation in one pass over memory, forward and backward.

A tile is of rows and columns. Of contiguous images a row is a sample's part of one channel, and a
program has one channel; with channels last a row is a pixel, and a program has as many channels as
a tile has columns. So a channel, and with it a model, never meets another in an operation.

A launch does it all where there are channels enough to fill the device. Else rows are divided: a
first launch collects each part's moments, a second puts them together and goes on.

Moments: Welford, "Note on a method for calculating corrected sums of squares and products",
Technometrics 4 (1962), one of each tile's elements; parts by Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows and columns of a tile: of channels that lie last, of large images and of small ones. Few, as
#: each is compiled anew.
_LAST, _LARGE, _SMALL = (128, 32), (4, 1024), (64, 64)
_LARGE_PIXELS = 512
_WARPS = 8

#: Programs that fill a device; with fewer channels, rows are divided, into so many parts at most.
_PROGRAMS = 512
_MOST_PARTS = 64

#: Sizes that say nothing about how values are best read.
_VARYING = ("rows", "per_part", "parts")

#: What a launch does: all of it, or one of two halves.
_ALL, _COLLECT, _FINISH = 0, 1, 2


@triton.jit
def _total(tile, LAST: tl.constexpr):
    """The sum over a channel's elements: of columns where channels lie last, else of all."""
    if LAST:  # noqa: SIM108
        total = tl.sum(tile, 0)
    else:
        total = tl.sum(tl.sum(tile, 1), 0)
    return total


@triton.jit
def _tile(row, last, column, start, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile's elements, and which of them are there."""
    rows = (row + tl.arange(0, ROWS))[:, None]
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    return rows.to(tl.int64) * stride + (start + columns), (rows < last) & (columns < width)


@triton.jit
def _range(rows, per_part, channels, pixels, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """A program's channels, where they begin in a row, how wide they are, and its rows."""
    block = tl.program_id(0)
    if LAST:
        start = block * COLUMNS
        channel = start + tl.arange(0, COLUMNS)
        width = tl.minimum(channels - start, COLUMNS)
    else:
        start = block * pixels
        channel = block
        width = pixels
    first = tl.program_id(1) * per_part
    return channel, start, width, first, tl.minimum(first + per_part, rows)


@triton.jit
def _moments(
    x, first, last, start, width, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean of some rows, and the sum of squared differences from it."""
    count = tl.zeros([ROWS, COLUMNS], ACC)
    mean = tl.zeros([ROWS, COLUMNS], ACC)
    squares = tl.zeros([ROWS, COLUMNS], ACC)
    for row in range(first, last, ROWS):
        for column in range(0, width, COLUMNS):
            at, there = _tile(row, last, column, start, width, stride, ROWS, COLUMNS)
            value = tl.load(x + at, there, 0.0).to(ACC)
            count += there.to(ACC)
            apart = value - mean
            mean += tl.where(there, apart / tl.maximum(count, 1.0), 0.0)
            squares += tl.where(there, apart * (value - mean), 0.0)
    whole = _total(count * mean, LAST) / tl.maximum(_total(count, LAST), 1.0)
    apart = mean - whole
    return whole, _total(squares + count * apart * apart, LAST)


@triton.jit
def _places(channel, channels, parts, PARTS: tl.constexpr, LAST: tl.constexpr):
    """Where the parts of a program's channels are, as a tile with a row a part."""
    part = tl.arange(0, PARTS)[:, None]
    if LAST:  # noqa: SIM108
        place = channel[None, :]
    else:
        place = channel + tl.arange(0, 1)[None, :]
    return part, part * channels + place, (part < parts) & (place < channels)


@triton.jit
def _together(
    held, channel, channels, parts, rows, per_part, pixels,
    PARTS: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The moments of all rows from those of each part."""
    part, at, there = _places(channel, channels, parts, PARTS, LAST)
    size = (tl.minimum((part + 1) * per_part, rows) - part * per_part) * pixels
    size = tl.where(there, size, 0).to(ACC)
    means = tl.load(held + at, there, 0.0)
    squares = tl.load(held + parts * channels + at, there, 0.0)
    mean = _total(size * means, LAST) / tl.maximum(_total(size, LAST), 1.0)
    apart = tl.where(there, means - mean, 0.0)
    return mean, _total(squares + size * apart * apart, LAST)


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """What torch's activations give."""
    if ACTIVATION == "relu":
        value = tl.where(value <= 0, 0.0, value)
    elif ACTIVATION == "relu6":
        value = tl.where(value <= 0, 0.0, tl.where(value >= 6, 6.0, value))
    elif ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        inside = tl.where(value <= -3, 0.0, tl.where(value >= 3, 6.0, value + 3.0))
        value = value * inside / 6.0
    return value


@triton.jit
def _slope(value, ACTIVATION: tl.constexpr):
    """The derivative of an activation that its result does not tell, at what it was given."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-value))
        slope = share * (1.0 + value * (1.0 - share))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        slope = below + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    else:
        slope = tl.where(value <= -3, 0.0, tl.where(value >= 3, 1.0, value / 3.0 + 0.5))
    return slope


@triton.jit
def _of_channel(given, channel, there, otherwise, ACC: tl.constexpr):
    """A parameter of each channel; `otherwise` where the norm has none."""
    value = (channel * 0).to(ACC) + otherwise
    if given is not None:
        value = tl.load(given + channel, there, 0.0).to(ACC)
    return value


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    x, weight, bias, residual, out, running_mean, running_var, saved_mean, saved_rstd, held,
    rows, per_part, parts, channels, pixels, stride,
    momentum, momentum_rest, eps, eps_rest,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    channel, start, width, first, last = _range(rows, per_part, channels, pixels, COLUMNS, LAST)
    known = channel < channels
    if TRAINING:
        if STAGE == 2:
            mean, squares = _together(
                held, channel, channels, parts, rows, per_part, pixels, PARTS, LAST, ACC
            )
        else:
            mean, squares = _moments(x, first, last, start, width, stride, ROWS, COLUMNS, LAST, ACC)
        if STAGE == 1:
            part = tl.program_id(1) * channels + channel
            tl.store(held + part, mean, known)
            tl.store(held + parts * channels + part, squares, known)
            return
        number = (rows * pixels).to(ACC)
        var = squares / number
    else:
        mean = tl.load(running_mean + channel, known, 0.0).to(ACC)
        var = tl.load(running_var + channel, known, 1.0).to(ACC)
    rstd = 1.0 / tl.sqrt(var + eps + eps_rest)
    once = channel < tl.where(tl.program_id(1) == 0, channels, 0)  # of all parts the first
    tl.store(saved_mean + channel, mean, once)
    tl.store(saved_rstd + channel, rstd, once)
    if TRAINING and running_mean is not None:
        before = tl.load(running_mean + channel, once, 0.0).to(ACC)
        way = mean - before
        tl.store(running_mean + channel, before + way * momentum + way * momentum_rest, once)
        before = tl.load(running_var + channel, once, 0.0).to(ACC)
        way = squares / (number - 1.0) - before
        tl.store(running_var + channel, before + way * momentum + way * momentum_rest, once)
    scale = rstd * _of_channel(weight, channel, known, 1.0, ACC)
    shift = _of_channel(bias, channel, known, 0.0, ACC)
    kept = x.dtype.element_ty  # each step rounds, as the operators one by one would
    for row in range(first, last, ROWS):
        for column in range(0, width, COLUMNS):
            at, there = _tile(row, last, column, start, width, stride, ROWS, COLUMNS)
            value = (tl.load(x + at, there, 0.0).to(ACC) - mean) * scale + shift
            value = value.to(kept).to(ACC)
            if residual is not None:
                value += tl.load(residual + at, there, 0.0).to(ACC)
                value = value.to(kept).to(ACC)
            tl.store(out + at, _activated(value, ACTIVATION).to(kept), there)


@triton.jit
def _arriving(
    gradient, x, out, at, there, mean, scale, shift,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient as the norm gets it, and of the input without its mean."""
    found = tl.load(gradient + at, there, 0.0).to(ACC)
    apart = tl.load(x + at, there, 0.0).to(ACC) - mean
    kept = x.dtype.element_ty
    if ACTIVATION == "relu":
        found = tl.where(tl.load(out + at, there, 0.0).to(ACC) <= 0, 0.0, found)
    elif ACTIVATION == "relu6":
        result = tl.load(out + at, there, 0.0).to(ACC)
        found = tl.where((result <= 0) | (result >= 6), 0.0, found)
    elif ACTIVATION != "none":
        value = (apart * scale + shift).to(kept).to(ACC)
        found = (found * _slope(value, ACTIVATION)).to(kept).to(ACC)
    return tl.where(there, found, 0.0), tl.where(there, apart, 0.0)


@triton.jit
def _sums(
    gradient, x, out, first, last, start, width, stride, mean, scale, shift,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Sums of some rows' gradients, and of these times the input without its mean."""
    plain = tl.zeros([ROWS, COLUMNS], ACC)
    product = tl.zeros([ROWS, COLUMNS], ACC)
    for row in range(first, last, ROWS):
        for column in range(0, width, COLUMNS):
            at, there = _tile(row, last, column, start, width, stride, ROWS, COLUMNS)
            found, apart = _arriving(
                gradient, x, out, at, there, mean, scale, shift, ACC, ACTIVATION
            )
            plain += found
            product += found * apart
    return _total(plain, LAST), _total(product, LAST)


@triton.jit(do_not_specialize=_VARYING)
def _backward(
    gradient, x, out, weight, bias, saved_mean, saved_rstd,
    to_x, to_weight, to_bias, to_residual, held,
    rows, per_part, parts, channels, pixels, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    channel, start, width, first, last = _range(rows, per_part, channels, pixels, COLUMNS, LAST)
    known = channel < channels
    mean = tl.load(saved_mean + channel, known, 0.0)
    rstd = tl.load(saved_rstd + channel, known, 0.0)
    scale = rstd * _of_channel(weight, channel, known, 1.0, ACC)
    shift = _of_channel(bias, channel, known, 0.0, ACC)
    if STAGE == 2:
        _, places, given = _places(channel, channels, parts, PARTS, LAST)
        plain = _total(tl.load(held + places, given, 0.0), LAST)
        product = _total(tl.load(held + parts * channels + places, given, 0.0), LAST)
    else:
        plain, product = _sums(
            gradient, x, out, first, last, start, width, stride, mean, scale, shift,
            ROWS, COLUMNS, LAST, ACC, ACTIVATION,
        )  # fmt: skip
    if STAGE == 1:
        part = tl.program_id(1) * channels + channel
        tl.store(held + part, plain, known)
        tl.store(held + parts * channels + part, product, known)
        return
    once = channel < tl.where(tl.program_id(1) == 0, channels, 0)  # of all parts the first
    tl.store(to_weight + channel, product * rstd, once)
    tl.store(to_bias + channel, plain, once)
    if TRAINING:
        number = (rows * pixels).to(ACC)
        middle = plain / number
        lean = product * rstd * rstd / number
    for row in range(first, last, ROWS):
        for column in range(0, width, COLUMNS):
            at, there = _tile(row, last, column, start, width, stride, ROWS, COLUMNS)
            found, apart = _arriving(
                gradient, x, out, at, there, mean, scale, shift, ACC, ACTIVATION
            )
            if to_residual is not None:
                tl.store(to_residual + at, found.to(x.dtype.element_ty), there)
            if TRAINING:
                found = found - middle - apart * lean
            tl.store(to_x + at, (found * scale).to(x.dtype.element_ty), there)


# --- launches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrangement:
    """How values lie in memory, and which part of them a program has."""

    last: bool  # channels lie last
    rows: int
    channels: int
    pixels: int  # of a row and channel
    tile: tuple[int, int]
    parts: int

    @property
    def per_part(self) -> int:
        """Rows of a part."""
        return triton.cdiv(self.rows, self.parts)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: by channels and parts."""
        return triton.cdiv(self.channels, self.tile[1]) if self.last else self.channels, self.parts

    @property
    def sizes(self) -> tuple[int, ...]:
        """What kernels are told."""
        stride = self.channels * self.pixels
        return self.rows, self.per_part, self.parts, self.channels, self.pixels, stride


def arrange(x: Tensor) -> Arrangement:
    """The arrangement of (N, C, ...), which is contiguous in a format of images."""
    samples, channels = x.shape[:2]
    pixels = x[0, 0].numel() if samples and channels else 0
    last = pixels == 1 or not x.is_contiguous()
    rows, pixels = (samples * pixels, 1) if last else (samples, pixels)
    tile = _LAST if last else _LARGE if pixels >= _LARGE_PIXELS else _SMALL
    programs = triton.cdiv(channels, tile[1]) if last else channels
    parts = min(_PROGRAMS // max(programs, 1), triton.cdiv(rows, tile[0]), _MOST_PARTS)
    # So many rows each that none is left without any.
    parts = triton.cdiv(rows, triton.cdiv(rows, max(parts, 1)))
    return Arrangement(last, rows, channels, pixels, tile, parts)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What moments and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and each channel's mean and the reciprocal of its standard deviation.

    All values of the size of `x` lie alike, and contiguous in a format of images.
    """
    found = arrange(x)
    out = torch.empty_like(x)
    mean = x.new_empty(found.channels, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    given = (x, weight, bias, residual, out, running_mean, running_var, mean, rstd)
    numbers = (*_halves(momentum), *_halves(eps))
    _launch(_forward, found, x, given, numbers, ACTIVATION=activation, TRAINING=training)
    return out, mean, rstd


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of input, weight, bias and, where there was one, of what was added."""
    found = arrange(x)
    to_x = torch.empty_like(x)
    to_residual = torch.empty_like(x) if added else None
    to_weight = mean.new_empty(found.channels, dtype=None if weight is None else weight.dtype)
    to_bias = mean.new_empty(found.channels, dtype=None if bias is None else bias.dtype)
    given = (gradient, x, out, weight, bias, mean, rstd, to_x, to_weight, to_bias, to_residual)
    _launch(_backward, found, x, given, (), ACTIVATION=activation, TRAINING=training)
    return to_x, to_weight, to_bias, to_residual


def _launch(
    kernel: Any,
    found: Arrangement,
    x: Tensor,
    given: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    **constants: Any,
) -> None:
    if not x.numel():
        return
    constants |= {
        "ROWS": found.tile[0],
        "COLUMNS": found.tile[1],
        "PARTS": _MOST_PARTS,
        "LAST": found.last,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    held = None
    # Without moments to collect, the forward knows all; the backward has its sums.
    divided = found.parts > 1 and (constants["TRAINING"] or kernel is _backward)
    if divided:
        size = (2, found.parts, found.channels)
        held = x.new_empty(size, dtype=accumulator(x.dtype))
    with torch.cuda.device_of(x):
        for stage in (_COLLECT, _FINISH) if divided else (_ALL,):
            arguments = (*given, held, *found.sizes, *numbers)
            kernel[found.grid](*arguments, STAGE=stage, num_warps=_WARPS, **constants)


def _halves(number: float) -> tuple[float, float]:
    """A number as two of float32, which is what kernels are handed."""
    first = float(torch.tensor(number, dtype=torch.float32))
    return first, number - first
