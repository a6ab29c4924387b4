"""SGD of all lanes at once on a CPU: over packed leaves, a row a lane, each with its own numbers.

Torch's fused kernel has one learning rate a call, so that it is called lane by lane: of small
models the calls, and a view of each gradient, take longer than the arithmetic. Here it is a few
operators for all lanes. They pass over memory more often, so they go block by block: what one has
read is in the cache for the next.

Every operator rounds each element by itself, in the same way wherever in a tensor it lies: a lane's
bits do not depend on its neighbours, nor on the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgo.private import many_tensors
from cgo.runtime.products import Product

#: Elements of a block: three tensors of so many lie in the cache that cores share. With fewer,
#: calls take longer than what a core's own cache gains.
_BLOCK = 2**18

#: Elements of a lane from which each leaf has calls of its own, which pass over memory less often.
_LONG = 1024


@dataclass(frozen=True)
class _Part:
    """Rows of one leaf: which, and of these which columns; None: all of them."""

    leaf: int
    lanes: slice | None = None
    columns: slice | None = None

    def of(self, rows: Tensor) -> Tensor:
        """A leaf's rows, or what is its part."""
        if self.lanes is None:
            return rows
        return rows[self.lanes] if self.columns is None else rows[self.lanes, self.columns]

    def owners(self, models: Sequence[int]) -> Sequence[int]:
        """Of a leaf's rows, those whose models these are, the part's."""
        return models if self.lanes is None else models[self.lanes]


@dataclass(frozen=True)
class _Block:
    """What lies in one stretch of the flat tensors."""

    parts: list[_Part]
    values: list[Tensor]
    moments: list[Tensor]  # empty without momentum
    models: list[int]  # of each row, the position of its model
    long: bool  # it is of one leaf, whose lanes are long
    numbers: dict[str, list[Tensor]]  # of each part, a number a row


class RowSteps:
    """The step of one kind of SGD.

    Args:
        values: All parameters, leaf by leaf, each leaf's lanes one after another.
        moment: Their momentum, or None.
        shapes: Lanes and elements a lane of each leaf.
        models: Of each leaf's lanes, leaf by leaf, the positions of their models.
        flags: Whether weights decay, there is momentum, and it is Nesterov's.
    """

    def __init__(
        self,
        values: Tensor,
        moment: Tensor | None,
        shapes: Sequence[tuple[int, int]],
        models: Sequence[int],
        flags: tuple[bool, ...],
    ) -> None:
        decays, moves, self._nesterov = flags
        self._names = ["lr", *["weight_decay"] * decays, *["momentum"] * moves]
        self._models = torch.tensor(models)
        self._known: dict[str, list[float]] = {}
        self._momentum: float | None = None  # of all models, where they agree
        self._numbers = {
            name: torch.zeros(len(models), 1, dtype=values.dtype) for name in self._names
        }
        lanes = [count for count, _ in shapes]
        numbers = {name: rows.split(lanes) for name, rows in self._numbers.items()}
        rest = iter(models)
        self._owners = [[next(rest) for _ in range(count)] for count in lanes]
        self._values = _rows(values, shapes)
        self._moments = [] if moment is None else _rows(moment, shapes)
        self._blocks = [
            self._block(parts, numbers, long=shapes[parts[0].leaf][1] >= _LONG)
            for parts, _, _ in _stretches(shapes)
        ]
        # Leaves whose gradient may stay the product that it is: momentum alone reads it, by lanes.
        alone = moves and not decays and not self._nesterov
        self._adding = [alone] * len(shapes)
        for block in self._blocks:
            for part in block.parts:
                self._adding[part.leaf] &= block.long and part.columns is None

    def _block(
        self,
        parts: list[_Part],
        numbers: dict[str, Sequence[Tensor]],
        *,
        long: bool,
    ) -> _Block:
        own = {
            name: [rows[p.leaf] if p.lanes is None else rows[p.leaf][p.lanes] for p in parts]
            for name, rows in numbers.items()
        }
        values = [part.of(self._values[part.leaf]) for part in parts]
        moments = [part.of(self._moments[part.leaf]) for part in parts] if self._moments else []
        owners = [owner for part in parts for owner in part.owners(self._owners[part.leaf])]
        return _Block(parts, values, moments, owners, long, own)

    def __call__(
        self,
        gradients: Sequence[Tensor | Product],
        groups: Sequence[Mapping[str, Any]],
        without: frozenset[int] = frozenset(),
    ) -> None:
        """Take a step.

        Args:
            gradients: Of each leaf, a row a lane, or the product that it is.
            groups: Of each model, its hyper-parameters.
            without: Positions of models that stay as they are.
        """
        self.read(groups)
        kept = self._kept(without) if without else []
        dense = {
            leaf: found.dense().flatten(1) if isinstance(found, Product) else found
            for leaf, found in enumerate(gradients)
            if not (isinstance(found, Product) and self._adding[leaf])
        }
        for block in self._blocks:
            product = gradients[block.parts[0].leaf]
            if isinstance(product, Product) and self._adding[block.parts[0].leaf]:
                lanes = block.parts[0].lanes
                self._add(block, product if lanes is None else product.lanes(lanes))
            else:
                self._step(block, [part.of(dense[part.leaf]) for part in block.parts])
        for row, value in kept:  # put back: nothing times NaN is nothing
            row.copy_(value)

    def _step(self, block: _Block, update: list[Tensor]) -> None:
        numbers = block.numbers
        if "weight_decay" in numbers:
            update = [*many_tensors.addcmul(update, block.values, numbers["weight_decay"])]
        if block.moments:
            self._move(block, update)
            if self._nesterov:
                update = [*many_tensors.addcmul(update, block.moments, numbers["momentum"])]
            else:
                update = block.moments
        many_tensors.addcmul_(block.values, update, numbers["lr"])

    def _add(self, block: _Block, product: Product) -> None:
        """The step where the gradient is a product: one call computes it and adds it to momentum.

        With one number and with several it is the same arithmetic, lane by lane.
        """
        (moment,) = block.moments
        left, right = product.left, product.right
        into = moment.view(len(moment), left.shape[1], right.shape[2])
        if self._momentum is not None:
            into.baddbmm_(left, right, beta=self._momentum)
        else:
            for lane, model in enumerate(block.models):
                own, momentum = slice(lane, lane + 1), self._known["momentum"][model]
                into[own].baddbmm_(left[own], right[own], beta=momentum)
        many_tensors.addcmul_(block.values, block.moments, block.numbers["lr"])

    def _move(self, block: _Block, update: list[Tensor]) -> None:
        """Momentum times the moment, plus the update; with one number and several, rounded once."""
        for moment, given, momentum in zip(block.moments, update, block.numbers["momentum"]):
            if self._momentum is None:
                torch.addcmul(given, moment, momentum, out=moment)
            else:
                torch.add(given, moment, alpha=self._momentum, out=moment)

    def read(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Read the models' hyper-parameters, for the next step."""
        for name in self._names:
            found = [float(group[name]) for group in groups]
            if found == self._known.get(name):
                continue
            self._known[name] = found
            each = torch.tensor(found, dtype=torch.float64)
            each = -each if name == "lr" else each
            self._numbers[name].copy_(each[self._models].unsqueeze(1))
            if name == "momentum":
                self._momentum = found[0] if len(set(found)) == 1 else None

    def _kept(self, without: frozenset[int]) -> list[tuple[Tensor, Tensor]]:
        """The rows of some models, and what they hold now."""
        found = [
            tensor[lane]
            for tensors in (self._values, self._moments)
            for tensor, own in zip(tensors, self._owners)
            for lane, model in enumerate(own)
            if model in without
        ]
        return [(row, row.clone()) for row in found]


def _rows(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Each leaf, a row a lane."""
    parts = flat.split([lanes * length for lanes, length in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def _stretches(shapes: Sequence[tuple[int, int]]) -> list[tuple[list[_Part], int, int]]:
    """Blocks: several leaves, one with long lanes, or part of one; where they begin and end."""
    found: list[tuple[list[_Part], int, int]] = []
    start, open_ = 0, False  # whether the last block takes more leaves
    for leaf, (lanes, length) in enumerate(shapes):
        size = lanes * length
        end, alone = start + size, length >= _LONG or size > _BLOCK
        if size > _BLOCK:
            found += _divided(leaf, lanes, length, start)
        elif open_ and not alone and end - found[-1][1] <= _BLOCK:
            found[-1] = [*found[-1][0], _Part(leaf)], found[-1][1], end
        else:
            found.append(([_Part(leaf)], start, end))
        start, open_ = end, not alone
    return found


def _divided(leaf: int, lanes: int, length: int, start: int) -> list[tuple[list[_Part], int, int]]:
    """A large leaf's blocks: several whole lanes, or parts of one."""
    several = max(1, _BLOCK // length)
    found: list[tuple[list[_Part], int, int]] = []
    for lane in range(0, lanes, several):
        own = slice(lane, min(lanes, lane + several))
        begin = start + lane * length
        if length <= _BLOCK:
            found.append(([_Part(leaf, own)], begin, start + own.stop * length))
            continue
        for column in range(0, length, _BLOCK):
            end = min(length, column + _BLOCK)
            part = _Part(leaf, own, slice(column, end))
            found.append(([part], begin + column, begin + end))
    return found
