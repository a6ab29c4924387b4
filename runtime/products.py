"""Gradients of weights as the two factors that they are the product of.

The gradient of a linear layer's weights is a product of matrices, and momentum adds it to what it
has. One call does both: it adds the product to the moment where that lies, and the gradient itself
is never written, nor read again. That pays where the factors are no larger than their product, so
that nothing more has to be kept until the optimizers' step.

A backward notes its factors here; who holds them may compute the product at any time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Types of numbers that `torch.baddbmm` computes as `torch.bmm` does.
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Product:
    """A gradient (M, O, I), as (M, O, R) times (M, R, I)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The gradient."""
        return torch.bmm(self.left, self.right)

    def lanes(self, own: slice) -> Product:
        """Of some of the members."""
        return Product(self.left[own], self.right[own])


class Products:
    """The gradients of this step that are held as factors, by the leaf that they are of."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, Product]] = {}

    def hold(self, leaf: Tensor, product: Product) -> None:
        """Keep a leaf's gradient; it is all of it."""
        self._found[id(leaf)] = leaf, product

    def of(self, leaf: Tensor) -> Product | None:
        """A leaf's gradient, where it is held here."""
        found = self._found.get(id(leaf))
        return None if found is None else found[1]

    def compute(self, leaf: Tensor) -> None:
        """Make a leaf's gradient readable as its `.grad`, too."""
        product = self.of(leaf)
        if product is not None and leaf.grad is None:
            leaf.grad = product.dense()

    def drop(self, leaf: Tensor) -> None:
        """Hold a leaf's gradient no more: its `.grad` is to become another."""
        self.compute(leaf)
        self._found.pop(id(leaf), None)

    def clear(self) -> None:
        """Forget all."""
        self._found = {}


class Noted:
    """The factors that backwards note, by `id` of the weight."""

    def __init__(self) -> None:
        self._found: dict[int, Product | None] = {}

    def add(self, weight: Tensor, product: Product) -> None:
        """Note a weight's gradient; a second one says that neither is all of it."""
        self._found[id(weight)] = None if id(weight) in self._found else product

    def found(self) -> dict[int, Product]:
        """What was noted once."""
        return {weight: product for weight, product in self._found.items() if product is not None}


_collecting = threading.local()


@contextlib.contextmanager
def collecting() -> Iterator[Noted]:
    """Collect what backwards of this thread note."""
    before = getattr(_collecting, "noted", None)
    _collecting.noted = noted = Noted()
    try:
        yield noted
    finally:
        _collecting.noted = before


def note(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Note what the gradient of a weight is the product of, where somebody collects."""
    noted: Noted | None = getattr(_collecting, "noted", None)
    if noted is None or weight.dtype not in _DTYPES or weight.device.type != "cpu":
        return
    if left.numel() + right.numel() <= weight.numel():
        noted.add(weight, Product(left.detach(), right.detach()))
