"""One launch for the optimizer step of all models of a kind, by a kernel of our own.

Everything that differs between models, or changes between steps, lies on the device: a captured
step stays what it is, whatever hyper-parameters become. The kernels are in
`cgo.runtime.triton_kernels.optimizers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cgo.runtime.accelerator import Accelerator
from cgo.runtime.triton_kernels import optimizers

#: Gradients of so many bytes are read where they are, by a launch of their own: copying them beside
#: the others would take longer.
_APART_BYTES = 2**22

#: What a family reads of a parameter group, in the kernels' order; betas are two.
_NAMES = {
    "sgd": ("lr", "weight_decay", "momentum"),
    "adam": ("lr", "weight_decay", "eps", "betas"),
    "rmsprop": ("lr", "weight_decay", "eps", "alpha", "momentum"),
    "adagrad": ("lr", "weight_decay", "eps", "lr_decay"),
}


class FusedUpdates:
    """Where models' elements lie, and their hyper-parameters.

    Args:
        family: A key of the kernels' table.
        pieces: Of each piece, where it begins in the flat tensors, and the lengths of its lanes.
        owners: Of each lane of all pieces, its model's position.
        like: The flat values.
        models: How many there are.
        accelerator: Uploads.
    """

    def __init__(
        self,
        family: str,
        pieces: Sequence[tuple[int, Sequence[int]]],
        owners: Sequence[int],
        like: Tensor,
        models: int,
        accelerator: Accelerator,
    ) -> None:
        self._family, self._accelerator = family, accelerator
        numbers = sum(2 if name == "betas" else 1 for name in _NAMES[family])
        self._numbers = torch.zeros(numbers, models, dtype=torch.float64, device=like.device)
        self.none = torch.zeros(models, device=like.device)  # nobody is left out
        self.idle = False  # launch nothing, where only memory is looked at
        rest = iter(owners)
        own = [[next(rest) for _ in lengths] for _, lengths in pieces]
        size = [sum(lengths) * like.element_size() for _, lengths in pieces]
        joined = [index for index in range(len(pieces)) if size[index] < _APART_BYTES]
        groups = [[index] for index in range(len(pieces)) if size[index] >= _APART_BYTES]
        groups += [joined] if joined else []
        self._launches = [(group, _table(pieces, own, group).to(like.device)) for group in groups]

    def read(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over hyper-parameters, each model's."""
        rows: list[float] = []
        for name in _NAMES[self._family]:
            values = [group[name] for group in groups]
            columns = zip(*values) if name == "betas" else [values]
            rows += [float(value) for column in columns for value in column]
        self._accelerator.upload(rows, self._numbers.view(-1))

    def step(
        self,
        values: Tensor,
        moments: Sequence[Tensor],
        gradients: Sequence[Tensor],
        counts: Tensor,
        skip: Tensor,
        flags: Sequence[bool],
    ) -> None:
        """Update in place.

        Args:
            values: Flat.
            moments: Flat, in the kernels' order.
            gradients: One a piece.
            counts: Of each model's steps, this one included.
            skip: Of each model, not 0 where it stays as it is.
            flags: Which formulas.
        """
        for group, table in self._launches:
            flat = [gradients[index].reshape(-1) for index in group]
            whole = torch.cat(flat) if len(flat) > 1 else flat[0]
            if not self.idle:
                given = values, list(moments), whole, table, self._numbers, counts, skip
                optimizers.fused_update(*given, self._family, list(flags))


def _table(
    pieces: Sequence[tuple[int, Sequence[int]]], owners: Sequence[Sequence[int]], group: list[int]
) -> Tensor:
    """The kernels' rows of some pieces, whose gradients lie end to end."""
    rows: list[tuple[int, int, int, int]] = []
    begin = 0
    for index in group:
        at, lengths = pieces[index]
        for length, owner in zip(lengths, owners[index]):
            for done in range(0, length, optimizers.BLOCK):
                size = min(length - done, optimizers.BLOCK)
                rows.append((at + done, begin + done, size, owner))
            at, begin = at + length, begin + length
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
