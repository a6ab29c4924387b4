"""Data sets, their order, and one loader for all models that share a spec."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from cgo.errors import DataError
from cgo.imports import resolve
from cgo.model import DataSpec

#: A batch as named tensors: "input" or "input.0" or "input.mask", and "target".
Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class DataSets:
    """What a data source returned, checked against its spec."""

    spec: DataSpec
    train: Any  # map-style, with __len__ and __getitem__
    validation: Any

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Samples in each training batch of an epoch."""
        return _batch_sizes(len(self.train), self.spec.batch_size, self.spec.drop_last)

    @property
    def validation_sizes(self) -> tuple[int, ...]:
        """Samples in each validation batch."""
        return _batch_sizes(len(self.validation), self.spec.batch_size, False)


def _batch_sizes(samples: int, batch_size: int, drop_last: bool) -> tuple[int, ...]:
    whole, rest = divmod(samples, batch_size)
    return (batch_size,) * whole + ((rest,) if rest and not drop_last else ())


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global random streams (torch, numpy, random) back afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_all(seed: int) -> None:
    """Seed torch, numpy and random.

    As `torch.manual_seed`, which takes a millisecond where CUDA is not in use yet: for each device
    it keeps a note of who asked.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def open_data(spec: DataSpec) -> DataSets:
    """Call the data source, once, under `torch.manual_seed(spec.seed)`.

    Raises:
        DataError: the source raised, returned something else than two map-style data sets, or
            the batch is larger than the training data.
    """
    source = resolve(spec.source, field="source")
    try:
        with preserved_random_state():
            seed_all(spec.seed)
            found = source(**spec.kwargs)
    except Exception as error:
        raise DataError(f"source {spec.source} raised {type(error).__name__}: {error}") from error
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
        if len(data) == 0:
            raise DataError(f"source {spec.source}: the {name} data set is empty")
    if spec.batch_size > len(found[0]):
        raise DataError(
            f"source {spec.source}: batch_size {spec.batch_size} is larger than the training data "
            f"({len(found[0])} samples); use at most {len(found[0])}"
        )
    return DataSets(spec, found[0], found[1])


def epoch_order(spec: DataSpec, samples: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` (from 0) visits the training samples, int64 (samples,)."""
    if not spec.shuffle:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(spec.seed + epoch))


class Loader:
    """Batches of one data spec, made once for all models that use it.

    Augmentation inside a data set draws from a stream keyed by (seed, epoch, sample), so it does
    not depend on the number of workers or of models.
    """

    def __init__(self, data: DataSets, device: torch.device) -> None:
        self.data = data
        self.device = device
        self._loaders: dict[str, tuple[_Plan, DataLoader[Any]]] = {}

    def train(self, epoch: int) -> Iterator[tuple[int, Leaves]]:
        """The epoch's batches as (samples, leaves), on the device."""
        order = epoch_order(self.data.spec, len(self.data.train), epoch)
        return self._batches("train", self.data.train, epoch, order, self.data.train_sizes)

    def validation(self) -> Iterator[tuple[int, Leaves]]:
        """All validation samples, in order."""
        order = torch.arange(len(self.data.validation))
        sizes = self.data.validation_sizes
        return self._batches("validation", self.data.validation, 0, order, sizes)

    def example(self, split: str, size: int) -> Leaves:
        """The first batch of epoch 0, cut to `size` samples."""
        data = self.data.train if split == "train" else self.data.validation
        order = epoch_order(self.data.spec, len(data), 0) if split == "train" else None
        order = torch.arange(size) if order is None else order[:size]
        return next(self._batches(split, data, 0, order, (size,)))[1]

    def _batches(
        self, split: str, data: Any, epoch: int, order: Tensor, sizes: Sequence[int]
    ) -> Iterator[tuple[int, Leaves]]:
        indices = order[: sum(sizes)].split(list(sizes))
        if type(data) is TensorDataset:
            batches: Iterator[Any] = (
                tuple(tensor[index] for tensor in data.tensors) for index in indices
            )
        else:
            plan, loader = self._loader(split, data)
            plan.set(epoch, indices)
            batches = iter(loader)
        for size, batch in zip(sizes, batches):
            leaves = flatten(batch)
            if self.device.type != "cpu":
                # From pinned memory the copy runs beside the computation.
                leaves = {
                    name: leaf.pin_memory().to(self.device, non_blocking=True)
                    for name, leaf in leaves.items()
                }
            yield size, leaves

    def _loader(self, split: str, data: Any) -> tuple[_Plan, DataLoader[Any]]:
        if split not in self._loaders:
            spec, plan = self.data.spec, _Plan()
            workers = spec.num_workers
            loader: DataLoader[Any] = DataLoader(
                _Sampled(data, spec.seed, split),
                batch_sampler=plan,
                num_workers=workers,
                collate_fn=collate,
                pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
                generator=torch.Generator().manual_seed(spec.seed),
            )
            self._loaders[split] = plan, loader
        return self._loaders[split]


class _Plan:
    """A batch sampler whose batches are set epoch by epoch; a key is (epoch, sample)."""

    def __init__(self) -> None:
        self._keys: list[list[tuple[int, int]]] = []

    def set(self, epoch: int, indices: Sequence[Tensor]) -> None:
        self._keys = [[(epoch, index) for index in batch.tolist()] for batch in indices]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Sampled(Dataset[Any]):
    """A data set read by (epoch, sample), each read under its own seed."""

    def __init__(self, data: Any, seed: int, split: str) -> None:
        self.data, self.seed, self.split = data, seed, split

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch's samples; what a loader asks for where it is there."""
        with preserved_random_state():
            return [self._read(epoch, index) for epoch, index in keys]

    def _read(self, epoch: int, index: int) -> Any:
        # One stream a sample: SeedSequence mixes the three numbers so that no two collide by sum.
        mixed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
        seed_all(int(mixed[0]) >> 1)
        try:
            return self.data[index]
        except Exception as error:
            raise DataError(
                f"sample {index} of the {self.split} data raised {type(error).__name__}: {error}"
            ) from error


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples into a batch.

    Raises:
        DataError: the samples cannot be stacked.
    """
    try:
        return default_collate(list(samples))
    except Exception as error:
        raise DataError(
            f"samples cannot be stacked into a batch: {error}; every sample must be an "
            "(input, target) pair of tensors (or tuples or dicts of them) of equal shapes"
        ) from error


def flatten(batch: Any) -> dict[str, Tensor]:
    """A batch `(input, target)` as named leaves.

    Raises:
        DataError: it is not a pair, or has leaves that are not tensors.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise DataError("a sample must be an (input, target) pair")
    if type(batch[0]) is Tensor and type(batch[1]) is Tensor:
        return {"input": batch[0], "target": batch[1]}
    leaves: dict[str, Tensor] = {}
    for name, value in zip(("input", "target"), batch):
        if isinstance(value, Mapping):
            leaves |= {f"{name}.{key}": leaf for key, leaf in value.items()}
        elif isinstance(value, (tuple, list)):
            leaves |= {f"{name}.{index}": leaf for index, leaf in enumerate(value)}
        else:
            leaves[name] = value
    for name, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise DataError(f"{name} is a {type(leaf).__name__}, not a tensor")
    return leaves


def call_arguments(
    leaves: Leaves, name: str = "input"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """How a module is called with the leaves called `name`: positional and keyword arguments."""
    if name in leaves:
        return (leaves[name],), {}
    parts = {
        key.removeprefix(f"{name}."): leaf
        for key, leaf in leaves.items()
        if key.startswith(f"{name}.")
    }
    if all(key.isdigit() for key in parts):
        return tuple(parts[key] for key in sorted(parts, key=int)), {}
    return (), parts


def target_of(leaves: Leaves) -> Any:
    """The target as the loss receives it: a tensor, a tuple or a dict."""
    positional, named = call_arguments(leaves, "target")
    if named:
        return named
    return positional[0] if "target" in leaves else positional
