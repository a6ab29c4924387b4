"""A data set kept on the device and batched there: no host work and no copy in a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cgo.errors import DataError
from cgo.runtime.leaves import Leaves, moved


def bytes_of(leaves: Leaves) -> int:
    """Bytes that leaves take on a device, each by itself."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())


class Resident:
    """All samples of one split, on a device.

    Args:
        leaves: Whole tensors; their first dimension counts samples. Those on the device already
            are used as they are.
        device: Where batches are to be.
        limit_bytes: The most that they may take; None: whatever they take.

    Raises:
        DataError: they take more; names both sizes.
    """

    def __init__(
        self, leaves: Leaves, device: torch.device, limit_bytes: int | None = None
    ) -> None:
        _check_size(bytes_of(leaves), limit_bytes, device)
        self.device = device
        self.leaves: Leaves = {name: leaf.to(device) for name, leaf in leaves.items()}

    @classmethod
    def read(
        cls,
        chunks: Iterable[Leaves],
        samples: int,
        device: torch.device,
        limit_bytes: int | None = None,
    ) -> Resident:
        """Take `samples` samples that come in batches of the same shapes, in their own order.

        The first batch tells the size of all: what does not fit is refused before the rest is read.

        Raises:
            DataError: they take more than `limit_bytes`, or a batch is unlike the first.
        """
        whole: dict[str, Tensor] = {}
        start = 0
        for chunk in chunks:
            count = len(next(iter(chunk.values())))
            if not whole:
                _check_size(bytes_of(chunk) * samples // count, limit_bytes, device)
                whole = {name: _room(leaf, samples, device) for name, leaf in chunk.items()}
            _check_alike(chunk, whole, start)
            for name, leaf in chunk.items():
                whole[name][start : start + count] = leaf
            start += count
        assert start == samples
        return cls(whole, device)

    def batches(self, epoch: int, order: Tensor, sizes: Sequence[int]) -> Iterator[Leaves]:
        """The samples of `order`, in batches of `sizes`; the order is moved once, not by batches.

        Every epoch has the same samples: `epoch` is there because other sources draw by it.
        """
        for index in moved(order, self.device).split(list(sizes)):
            # As a data set's own indexing does it, which keeps the layout of the samples.
            yield {name: leaf[index] for name, leaf in self.leaves.items()}


def _room(leaf: Tensor, samples: int, device: torch.device) -> Tensor:
    """Space for `samples` samples that lie in memory as those of a stacked batch do."""
    sample = leaf[0]
    strides = (sample.numel(), *leaf.stride()[1:])
    return torch.empty_strided((samples, *sample.shape), strides, dtype=leaf.dtype, device=device)


def _check_size(needed: int, limit: int | None, device: torch.device) -> None:
    if limit is not None and needed > limit:
        raise DataError(
            f"resident: the data set takes {_mib(needed)} and may take {_mib(limit)} on {device}; "
            "leave `resident` unset to have it loaded batch by batch"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.3f} MiB"


def _check_alike(chunk: Leaves, whole: Leaves, start: int) -> None:
    # Copying would convert and broadcast in silence.
    found = {name: (leaf.dtype, leaf.shape[1:]) for name, leaf in chunk.items()}
    first = {name: (leaf.dtype, leaf.shape[1:]) for name, leaf in whole.items()}
    if found != first:
        raise DataError(
            f"resident: samples from {start} on are {_kinds(found)}, those before are "
            f"{_kinds(first)}; a data set that is kept must have samples of one kind"
        )


def _kinds(leaves: dict[str, tuple[torch.dtype, torch.Size]]) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in leaves.items())
