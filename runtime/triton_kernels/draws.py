"""The draws of keyed streams for all models of a program, one launch for each kind and dtype.

The numbers are those of `cgo.runtime.keyed_draws`; normal ones are within rounding. Kernels are
called by an operator of torch's, so that whoever writes calls down sees them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cgo.runtime.keyed_draws import Draw, is_wide, limit_of, round_number, scale_of

#: Blocks of four words that one program of a kernel draws.
_BLOCKS = 256

#: Columns of a table's integers: first element, elements, key, counter, first tile, limit.
_COLUMNS = 6


@triton.jit
def _store(out, fields, elements, values, ALIGNED: tl.constexpr):
    """Write a tile's values; by several at once where all lanes begin and end at multiples of 4."""
    start = tl.load(fields)
    end = tl.load(fields + 1)
    if ALIGNED:
        start = tl.multiple_of(start, 4)
        end = tl.multiple_of(end, 4)
    tl.store(out + start + elements, values.to(out.dtype.element_ty), mask=elements < end)


@triton.jit
def _drawn(tiles, segments, counts, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """This program's row of the tables, its fields and tile; its blocks, and four words of each."""
    program = tl.program_id(0)
    row = tl.load(tiles + program).to(tl.int64)
    fields = segments + row * COLUMNS
    tile = program - tl.load(fields + 4)
    blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
    key = tl.load(fields + 2)
    step = tl.load(counts + tl.load(fields + 3))
    low = blocks.to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    none = low * 0
    w0, w1, w2, w3 = tl.philox(
        key, low, high, none + step.to(tl.uint32), none + (step >> 32).to(tl.uint32)
    )
    return row, fields, tile, blocks, w0, w1, w2, w3


@triton.jit
def _in_order(w0, w1, w2, w3):
    """One word an element, of four elements a block."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _fraction(high, low):
    return ((high >> 5).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64)) * (
        1.0 / 9007199254740992.0
    )


@triton.jit
def _masks(
    out, tiles, segments, numbers, counts, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, fields, tile, _, w0, w1, w2, w3 = _drawn(tiles, segments, counts, COLUMNS, BLOCKS)
    words = _in_order(w0, w1, w2, w3)
    elements = tile * BLOCKS * 4 + tl.arange(0, 4 * BLOCKS)
    value = tl.load(numbers + row * 3)
    if not WIDE:
        value = value.to(tl.float32)
    drawn = tl.where(words.to(tl.int64) < tl.load(fields + 5), value, value * 0.0)
    _store(out, fields, elements, drawn, ALIGNED)


@triton.jit
def _uniforms(
    out, tiles, segments, numbers, counts, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, fields, tile, blocks, w0, w1, w2, w3 = _drawn(tiles, segments, counts, COLUMNS, BLOCKS)
    if WIDE:
        elements = blocks
        u = _fraction(w0, w1)
    else:
        elements = tile * BLOCKS * 4 + tl.arange(0, 4 * BLOCKS)
        u = (_in_order(w0, w1, w2, w3) >> 8).to(tl.float64) * (1.0 / 16777216.0)
    low = tl.load(numbers + row * 3)
    end = tl.load(numbers + row * 3 + 2)
    value = low + u * tl.load(numbers + row * 3 + 1)
    if not WIDE:
        value = value.to(tl.float32).to(out.dtype.element_ty).to(tl.float32)
        low = low.to(tl.float32)
        end = end.to(tl.float32)
    value = tl.where(value >= end, low, value)
    _store(out, fields, elements, value, ALIGNED)


@triton.jit
def _normals(
    out, tiles, segments, numbers, counts, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, fields, _, elements, w0, w1, w2, w3 = _drawn(tiles, segments, counts, COLUMNS, BLOCKS)
    u = 1.0 - _fraction(w0, w1)
    v = _fraction(w2, w3)
    mean = tl.load(numbers + row * 3)
    std = tl.load(numbers + row * 3 + 1)
    turn = tl.load(numbers + row * 3 + 2)
    if not WIDE:
        u = u.to(tl.float32)
        v = v.to(tl.float32)
        mean = mean.to(tl.float32)
        std = std.to(tl.float32)
        turn = turn.to(tl.float32)
    value = mean + std * (tl.sqrt(-2.0 * tl.log(u)) * tl.cos(v * turn))
    _store(out, fields, elements, value, ALIGNED)


_KERNELS = {"masks": _masks, "uniforms": _uniforms, "normals": _normals}
_KINDS = {"dropout": "masks", "bernoulli": "masks", "uniform": "uniforms", "normal": "normals"}


def kind_of(draw: Draw, dtype: torch.dtype) -> str | None:
    """Which kernel draws it; None where there is none."""
    kind = _KINDS.get(draw.distribution) if dtype.is_floating_point else None
    # The end of a range depends on rounding, which Triton's interpreter does not do in bfloat16:
    # what it cannot test is drawn by torch.
    return None if kind == "uniforms" and dtype is torch.bfloat16 else kind


@dataclass(frozen=True)
class Segment:
    """Where one draw goes, and whose steps it counts."""

    start: int  # its first element in the tensor that is filled
    elements: int
    draw: Draw
    slot: int  # among the counters


class Table:
    """Draws of one kind that are filled into one tensor by one launch.

    Args:
        kind: Of `kind_of` for all of them.
        segments: The draws; they do not overlap.
        dtype: Of the tensor.
        device: Where it is.
    """

    def __init__(
        self, kind: str, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind = kind
        size = _elements_a_tile(kind, dtype)
        tiles: list[int] = []
        rows: list[list[int]] = []
        for row, segment in enumerate(segments):
            key = segment.draw.key
            signed = key - (1 << 64 if key >> 63 else 0)
            place = segment.start, segment.elements, signed, segment.slot, len(tiles)
            rows.append([*place, _limit(segment.draw)])
            tiles += [row] * -(-segment.elements // size)
        numbers = [_numbers(segment.draw, dtype) for segment in segments]
        self._aligned = all(s.start % 4 == s.elements % 4 == 0 for s in segments)
        self._tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self._segments = torch.tensor(rows, dtype=torch.int64, device=device)
        self._numbers = torch.tensor(numbers, dtype=torch.float64, device=device)

    def fill(self, out: Tensor, counts: Tensor) -> None:
        """Draw.

        Args:
            out: Where the numbers go; what is of no segment stays as it is.
            counts: The steps, int64, by slot.
        """
        tables = self._tiles, self._segments, self._numbers
        torch.ops.cgo.keyed_draws(out, *tables, counts, self.kind, self._aligned)


def _elements_a_tile(kind: str, dtype: torch.dtype) -> int:
    one = kind == "normals" or (kind == "uniforms" and is_wide(dtype))
    return _BLOCKS if one else 4 * _BLOCKS


def _limit(draw: Draw) -> int:
    p = draw.parameters.get("p", 0.0)
    return limit_of(1 - p if draw.distribution == "dropout" else p)


def _numbers(draw: Draw, dtype: torch.dtype) -> tuple[float, float, float]:
    given = draw.parameters
    match draw.distribution:
        case "dropout":
            return round_number(scale_of(given["p"]), dtype), 0.0, 0.0
        case "bernoulli":
            return 1.0, 0.0, 0.0
        case "uniform":
            low, high = given.get("low", 0.0), given.get("high", 1.0)
            return low, high - low, round_number(high, dtype)
        case _:
            return given.get("mean", 0.0), given.get("std", 1.0), 2 * math.pi


def _launch(
    out: Tensor,
    tiles: Tensor,
    segments: Tensor,
    numbers: Tensor,
    counts: Tensor,
    kind: str,
    aligned: bool,
) -> None:
    with torch.cuda.device_of(out):
        _KERNELS[kind][(len(tiles),)](
            out,
            tiles,
            segments,
            numbers,
            counts,
            COLUMNS=_COLUMNS,
            BLOCKS=_BLOCKS,
            WIDE=is_wide(out.dtype),
            ALIGNED=aligned,
            enable_fp_fusion=False,  # the numbers would depend on what the compiler contracts
        )


_LIBRARY = torch.library.Library("cgo", "FRAGMENT")
_LIBRARY.define(
    "keyed_draws(Tensor(a!) out, Tensor tiles, Tensor segments, Tensor numbers, Tensor counts, "
    "str kind, bool aligned) -> ()"
)
_LIBRARY.impl("keyed_draws", _launch, "CompositeExplicitAutograd")
