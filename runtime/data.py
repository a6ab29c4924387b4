"""Data sets, their order, and one loader for all models that share a spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cgo.errors import DataError
from cgo.imports import resolve
from cgo.model import DataSpec
from cgo.runtime.accelerator import free_memory
from cgo.runtime.augment import Augmentation
from cgo.runtime.leaves import Leaves, call_arguments, flatten, moved, target_of
from cgo.runtime.prefetch import Copied, Source
from cgo.runtime.randomness import preserved_random_state, seed_all
from cgo.runtime.resident import Resident, bytes_of
from cgo.runtime.samples import Samples
from cgo.user_code import contained, told

__all__ = [
    "DataSets",
    "Leaves",
    "Loader",
    "call_arguments",
    "epoch_order",
    "flatten",
    "open_data",
    "preserved_random_state",
    "seed_all",
    "target_of",
]


@dataclass(frozen=True)
class DataSets:
    """What a data source returned, checked against its spec."""

    spec: DataSpec
    train: Any  # map-style, with __len__ and __getitem__
    validation: Any

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Samples in each training batch of an epoch."""
        return _batch_sizes(self.train_samples, self.spec.batch_size, self.spec.drop_last)

    @property
    def validation_sizes(self) -> tuple[int, ...]:
        """Samples in each validation batch."""
        return _batch_sizes(self.validation_samples, self.spec.batch_size, False)

    @property
    def train_samples(self) -> int:
        """How many samples there are to train on."""
        return _length(self.spec, "training", self.train)

    @property
    def validation_samples(self) -> int:
        """How many samples there are to evaluate on."""
        return _length(self.spec, "validation", self.validation)


def _length(spec: DataSpec, name: str, data: Any) -> int:
    try:
        with contained:
            return len(data)
    except Exception as error:
        raise DataError(
            f"source {spec.source}: the length of the {name} data set raised {told(error)}"
        ) from error


def _batch_sizes(samples: int, batch_size: int, drop_last: bool) -> tuple[int, ...]:
    whole, rest = divmod(samples, batch_size)
    return (batch_size,) * whole + ((rest,) if rest and not drop_last else ())


def open_data(spec: DataSpec) -> DataSets:
    """Call the data source, once, under `torch.manual_seed(spec.seed)`.

    Raises:
        DataError: the source raised, returned something else than two map-style data sets, or
            the batch is larger than the training data.
    """
    source = resolve(spec.source, field="source")
    try:
        with preserved_random_state(), contained:
            seed_all(spec.seed)
            found = source(**spec.kwargs)
    except Exception as error:
        raise DataError(f"source {spec.source} raised {told(error)}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise DataError(
            f"source {spec.source} returned {type(found).__name__}; "
            "expected two data sets, (train, validation)"
        )
    for name, data in zip(("training", "validation"), found):
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise DataError(
                f"source {spec.source}: the {name} data set is a {type(data).__name__} without "
                "__len__ and __getitem__; give a map-style data set"
            )
        if _length(spec, name, data) == 0:
            raise DataError(f"source {spec.source}: the {name} data set is empty")
    data_sets = DataSets(spec, found[0], found[1])
    if spec.batch_size > (samples := data_sets.train_samples):
        raise DataError(
            f"source {spec.source}: batch_size {spec.batch_size} is larger than the training data "
            f"({samples} samples); use at most {samples}"
        )
    return data_sets


_CPU = torch.device("cpu")

#: Shares of a device's free memory that resident data may take: the rest is for the models.
_UNASKED, _ASKED = 1 / 4, 1 / 2


def epoch_order(spec: DataSpec, samples: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` (from 0) visits the training samples, int64 (samples,)."""
    if not spec.shuffle:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(spec.seed + epoch))


class Loader:
    """Batches of one data spec, made once for all models that use it.

    Where the data are kept is a matter of speed alone: the batches are the same, bit for bit; but
    for data sets that augment by themselves and are said to be resident (see `DataSpec`).

    - On the device, once for all epochs: a `TensorDataset` of at most a quarter of what is free
      there, and what the spec says is resident. A step then copies nothing.
    - On the host, copied batch by batch. Batches of a `TensorDataset`, and what worker processes
      load, are made and copied ahead on a thread. What is read in this process is not: its
      augmentation draws from the process's random streams, under seeds of its own, while the
      models that train draw from them too.

    Args:
        data: What the source returned.
        device: Where batches are to be.
        free_bytes: What is free on a device.
    """

    def __init__(
        self,
        data: DataSets,
        device: torch.device,
        *,
        free_bytes: Callable[[torch.device], int] = free_memory,
    ) -> None:
        self.data = data
        self.device = device
        self._free_bytes = free_bytes
        self._host: dict[str, Source] = {}
        self._sources: dict[str, Source] = {}
        self._augmentation: Augmentation | None = None

    def train(self, epoch: int) -> Iterator[tuple[int, Leaves]]:
        """The epoch's batches as (samples, leaves), on the device, augmented."""
        sizes = self.data.train_sizes
        order = epoch_order(self.data.spec, self.data.train_samples, epoch)[: sum(sizes)]
        batches = self._source("train").batches(epoch, order, sizes)
        for number, (leaves, size) in enumerate(zip(batches, sizes)):
            yield size, self._augmented(leaves, epoch, number)

    def validation(self) -> Iterator[tuple[int, Leaves]]:
        """All validation samples, in order."""
        sizes = self.data.validation_sizes
        order = torch.arange(self.data.validation_samples)
        for leaves, size in zip(self._source("validation").batches(0, order, sizes), sizes):
            yield size, leaves

    def example(self, split: str, size: int) -> Leaves:
        """The first batch of epoch 0, cut to `size` samples; no other sample is read."""
        order = torch.arange(size)
        if split == "train":
            order = epoch_order(self.data.spec, self.data.train_samples, 0)[:size]
        found = next(self._on_host(split).batches(0, order, (size,)))
        leaves = {name: moved(leaf, self.device) for name, leaf in found.items()}
        return self._augmented(leaves, 0, 0) if split == "train" else leaves

    def _augmented(self, leaves: Leaves, epoch: int, batch: int) -> Leaves:
        if self.data.spec.augment is None:
            return leaves
        if self._augmentation is None:
            self._augmentation = Augmentation(self.data.spec, self.device)
        return self._augmentation(leaves, epoch, batch)

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            self._sources[split] = self._opened(split)
        return self._sources[split]

    def _opened(self, split: str) -> Source:
        resident, data = self.data.spec.resident, self._set(split)
        if resident and type(data) is not TensorDataset:
            return self._read(split, self._limit(_ASKED))
        host = self._on_host(split)
        if self.device.type == "cpu":
            return host
        if isinstance(host, Resident):
            if resident:
                return Resident(host.leaves, self.device, self._limit(_ASKED))
            if resident is None and bytes_of(host.leaves) <= self._limit(_UNASKED):
                return Resident(host.leaves, self.device)
        ahead = isinstance(host, Resident) or self.data.spec.num_workers > 0
        return Copied(host, self.device, ahead=ahead)

    def _limit(self, share: float) -> int:
        return int(share * self._free_bytes(self.device))

    def _read(self, split: str, limit_bytes: int) -> Resident:
        """Every sample once, as epoch 0 reads it."""
        data, spec = self._set(split), self.data.spec
        count = self.data.train_samples if split == "train" else self.data.validation_samples
        sizes = _batch_sizes(count, spec.batch_size, False)
        samples = Samples(data, split, spec, pin=False, keep_workers=False)
        chunks = samples.batches(0, torch.arange(count), sizes)
        return Resident.read(chunks, count, self.device, limit_bytes)

    def _on_host(self, split: str) -> Source:
        if split not in self._host:
            data, pin = self._set(split), self.device.type == "cuda"
            self._host[split] = (
                Resident(flatten(data.tensors), _CPU)
                if type(data) is TensorDataset
                else Samples(data, split, self.data.spec, pin=pin)
            )
        return self._host[split]

    def _set(self, split: str) -> Any:
        return self.data.train if split == "train" else self.data.validation
