"""Random numbers of keyed streams: each is a function of its model, operator, step and place.

A stream has a key, which follows from the model's seed, the operator's number among those of the
model that draw, and the kind of program. What is drawn for element `e` of a tensor at step `s` is a
function of the key, `s` and `e` alone: of no other model, no earlier draw, no memory layout and no
division of the work. So one kernel can draw for all models, a captured step needs nothing but a
counter, and a model draws in company what it draws alone.

Here the numbers are defined, by torch operators that any device has; `cgo.runtime.triton_kernels`
draws the same in one kernel. docs/random.md says the same in words, for loops elsewhere.

Source of the generator: Philox4x32-10, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cgo.errors import GraphError

#: An integer, or an int64 tensor of them; words are below 2**32.
Word = TypeVar("Word", int, Tensor)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

#: The number of each kind of program in the keys: streams of training and evaluation are others.
DOMAINS = {"train": 0, "validation": 1}

#: Elements that are drawn at once: an element takes up to 100 bytes for a moment.
_CHUNK = 2**22


def philox(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int]
) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four words from a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products below 2**64 wrap around in int64, which loses none of their bits.
        one, other = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((other >> 32) & _MASK) ^ c1 ^ k0, other & _MASK
        c2, c3 = ((one >> 32) & _MASK) ^ c3 ^ k1, one & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream_key(seed: int, order: int, domain: int) -> int:
    """The key of a stream, 64 bits.

    Args:
        seed: The model's.
        order: Of the operator, among those of the model's program that draw, from 0.
        domain: Of `DOMAINS`.
    """
    k0, k1, _, _ = philox((order & _MASK, domain, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return k0 | k1 << 32


@dataclass(frozen=True)
class Draw:
    """What is drawn into one tensor."""

    distribution: str
    parameters: Mapping[str, Any]
    key: int


def check(draw: Draw) -> None:
    """See that a distribution is known.

    Raises:
        GraphError: it is not.
    """
    if draw.distribution not in _VALUES and draw.distribution != "randperm":
        raise GraphError(f"unknown distribution {draw.distribution!r}")


def fill(out: Tensor, draw: Draw, step: Tensor) -> None:
    """Draw numbers.

    Args:
        out: Where they go, (elements,), in the logical order of the tensor that they are of.
        draw: Which.
        step: The step that they are of, an int64 tensor without dimensions on the same device.
    """
    if draw.distribution == "randperm":
        numbers = _Numbers(draw.key, step, 0, len(out), out.dtype)
        out.copy_(torch.argsort(numbers.integers(), stable=True))
        return
    if out.is_complex() and draw.distribution == "normal":
        _fill_complex(out, draw, step)
        return
    values = _VALUES[draw.distribution]
    for first in range(0, len(out), _CHUNK):
        part = out[first : first + _CHUNK]
        numbers = _Numbers(draw.key, step, first, len(part), out.dtype)
        part.copy_(values(numbers, **draw.parameters))


def _fill_complex(out: Tensor, draw: Draw, step: Tensor) -> None:
    """Real and imaginary parts are neighbouring elements, of half the variance each."""
    std = draw.parameters.get("std", 1.0) / math.sqrt(2)
    fill(torch.view_as_real(out).view(-1), replace(draw, parameters={"std": std}), step)
    out.add_(draw.parameters.get("mean", 0.0))


@dataclass(frozen=True)
class _Numbers:
    """The raw numbers of some elements in a row, from which distributions are made."""

    key: int
    step: Tensor
    first: int  # element; divisible by four
    count: int
    dtype: torch.dtype  # of the values

    def _blocks(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block = torch.arange(first, first + count, device=self.step.device)
        step = self.step
        counter = block & _MASK, block >> 32, step & _MASK, (step >> 32) & _MASK
        return philox(counter, (self.key & _MASK, self.key >> 32))

    def words(self) -> Tensor:
        """One word an element: word e mod 4 of block e div 4."""
        blocks = self._blocks(self.first // 4, -(-self.count // 4))
        return torch.stack(blocks, dim=1).flatten()[: self.count]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Two numbers of [0, 1) an element, of 53 bits each, from block e."""
        w0, w1, w2, w3 = self._blocks(self.first, self.count)
        return _fraction(w0, w1), _fraction(w2, w3)

    def integers(self) -> Tensor:
        """One of 63 bits an element, from block e."""
        w0, w1, _, _ = self._blocks(self.first, self.count)
        return ((w0 & 0x7FFFFFFF) << 32) | w1


def _fraction(high: Tensor, low: Tensor) -> Tensor:
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) * 2.0**-53


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 value in another dtype; by way of float32 into those of two bytes."""
    return value.to(torch.float32).to(dtype) if dtype.itemsize == 2 else value.to(dtype)


def round_number(value: float, dtype: torch.dtype) -> float:
    """The same for a number of Python's."""
    return float(rounded(torch.tensor(value, dtype=torch.float64), dtype))


def is_wide(dtype: torch.dtype) -> bool:
    """Whether uniform numbers of a dtype have 53 bits; others have 24."""
    return dtype is torch.float64


def limit_of(p: float) -> int:
    """A word below this is an event of probability `p`."""
    return math.ceil(p * 2.0**32)


# --- distributions --------------------------------------------------------------------------------


def _mask(numbers: _Numbers, p: float, value: float) -> Tensor:
    """`value` with probability `p`, else 0."""
    hit = numbers.words() < limit_of(p)
    return rounded(torch.where(hit, value, torch.zeros((), dtype=torch.float64, device=hit.device)),
                   numbers.dtype)  # fmt: skip


def _dropout(numbers: _Numbers, p: float) -> Tensor:
    return _mask(numbers, 1 - p, scale_of(p))


def scale_of(p: float) -> float:
    """What dropout multiplies the values by that it keeps."""
    return 0.0 if p == 1 else 1 / (1 - p)


def _bernoulli(numbers: _Numbers, p: float) -> Tensor:
    return _mask(numbers, p, 1.0)


def _uniform(numbers: _Numbers, low: float = 0.0, high: float = 1.0) -> Tensor:
    if is_wide(numbers.dtype):
        u, _ = numbers.pair()
    else:
        u = (numbers.words() >> 8).double() * 2.0**-24
    value = rounded(low + u * (high - low), numbers.dtype)
    begin, end = round_number(low, numbers.dtype), round_number(high, numbers.dtype)
    return torch.where(value >= end, torch.full_like(value, begin), value)


def _standard_normal(numbers: _Numbers, dtype: torch.dtype) -> Tensor:
    """By the method of Box and Muller, computed in `dtype`."""
    u, v = numbers.pair()
    radius = torch.sqrt(-2 * torch.log((1 - u).to(dtype)))
    return radius * torch.cos(v.to(dtype) * (2 * math.pi))


def _normal(numbers: _Numbers, mean: float = 0.0, std: float = 1.0) -> Tensor:
    dtype = torch.float64 if is_wide(numbers.dtype) else torch.float32
    return mean + std * _standard_normal(numbers, dtype)


def _log_normal(numbers: _Numbers, mean: float, std: float) -> Tensor:
    normal = mean + std * _standard_normal(numbers, torch.float64)
    return rounded(torch.exp(normal), numbers.dtype)


def _exponential(numbers: _Numbers, rate: float) -> Tensor:
    u = numbers.pair()[0].clamp_min(2.0**-53)  # never 0, of which others take the logarithm
    return rounded(-torch.log1p(-u) / rate, numbers.dtype)


def _cauchy(numbers: _Numbers, median: float, scale: float) -> Tensor:
    u, _ = numbers.pair()
    return rounded(median + scale * torch.tan(math.pi * (u - 0.5)), numbers.dtype)


def _geometric(numbers: _Numbers, p: float) -> Tensor:
    u, _ = numbers.pair()
    rate = -math.inf if p == 1 else math.log1p(-p)
    return rounded(torch.ceil(torch.log1p(-u) / rate).clamp_min(1), numbers.dtype)


def _randint(numbers: _Numbers, low: int, high: int) -> Tensor:
    size = high - low
    drawn = numbers.integers()
    return low + (drawn if size >= 2**63 else drawn % size)


#: By the name of a distribution, called with its parameters.
_VALUES: dict[str, Callable[..., Tensor]] = {
    "dropout": _dropout, "bernoulli": _bernoulli, "uniform": _uniform, "normal": _normal,
    "exponential": _exponential, "log_normal": _log_normal, "cauchy": _cauchy,
    "geometric": _geometric, "randint": _randint,
}  # fmt: skip
