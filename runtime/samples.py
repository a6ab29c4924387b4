"""Reading a map-style data set sample by sample, each under its own seed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cgo.errors import DataError
from cgo.model import DataSpec
from cgo.runtime.leaves import Leaves, flatten
from cgo.runtime.randomness import mixed_seed, preserved_random_state, seed_all
from cgo.user_code import contained, told


class Samples:
    """One split of a data set, read and stacked by a DataLoader.

    What a data set draws comes from a stream keyed by (seed, epoch, sample), so it does not depend
    on the number of workers or of models.

    Args:
        data: The map-style data set.
        split: Its name in errors.
        spec: Its seed and its number of workers.
        pin: Whether batches come in pinned memory, from which CUDA copies asynchronously.
        keep_workers: Whether workers live on from epoch to epoch.
    """

    def __init__(
        self, data: Any, split: str, spec: DataSpec, *, pin: bool, keep_workers: bool = True
    ) -> None:
        self._split = split
        self._plan = _Plan()
        self._loader: DataLoader[Any] = DataLoader(
            _Sampled(data, spec.seed, split),
            batch_sampler=self._plan,
            num_workers=spec.num_workers,
            collate_fn=collate,
            pin_memory=pin,
            persistent_workers=keep_workers and spec.num_workers > 0,
            generator=torch.Generator().manual_seed(spec.seed),
        )

    def batches(self, epoch: int, order: Tensor, sizes: Sequence[int]) -> Iterator[Leaves]:
        """The samples of `order`, in batches of `sizes`, as the epoch draws them.

        Worker processes start in this call, not with the first batch: a thread that takes the
        batches is then not the one that forks, nor the one that must hear of a worker's death.
        """
        self._plan.set(epoch, order.split(list(sizes)))
        try:
            with _out_of_reach() if self._loader.num_workers else contextlib.nullcontext():
                return self._flat(iter(self._loader))
        except Exception as error:
            raise self._failed(error) from error

    def _flat(self, batches: Iterator[Any]) -> Iterator[Leaves]:
        """Batches as leaves; what befalls a loader's workers is an error of its data, too."""
        while True:
            try:
                with contained:
                    batch = next(batches, None)
                    leaves = None if batch is None else flatten(batch)
            except DataError:
                raise
            except Exception as error:
                raise self._failed(error) from error
            if leaves is None:
                return
            yield leaves

    def _failed(self, error: Exception) -> DataError:
        return DataError(f"loading the {self._split} data raised {told(error)}")


@contextlib.contextmanager
def _out_of_reach() -> Iterator[None]:
    """Keep what is there away from the garbage collectors of processes that fork off meanwhile.

    A worker that collected what its parent left of a device (events, graphs, pinned memory) would
    give it back to a driver that it does not have, and be aborted.
    """
    gc.collect()
    frozen = gc.get_freeze_count()  # by the program itself
    gc.freeze()
    Frozen.more |= bool(frozen)
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


class Frozen:
    """Whether more than the program itself has frozen is kept away from the garbage collector."""

    more = False


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
        seed_all(mixed_seed(self.seed, epoch, index))
        try:
            with contained:
                return self.data[index]
        except Exception as error:
            text = f"sample {index} of the {self.split} data raised {told(error)}"
            raise DataError(text) from error


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples into a batch.

    Raises:
        DataError: the samples cannot be stacked.
    """
    try:
        with contained:
            return default_collate(list(samples))
    except Exception as error:
        raise DataError(
            f"samples cannot be stacked into a batch: {told(error)}; every sample must be an "
            "(input, target) pair of tensors (or tuples or dicts of them) of equal shapes"
        ) from error
