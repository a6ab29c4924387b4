"""Batches made and copied to the device ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from cgo.runtime.leaves import Leaves, moved

Item = TypeVar("Item")

#: Batches that are ready, or being made, before they are asked for.
DEPTH = 2


class Source(Protocol):
    """Where a split's batches come from."""

    def batches(self, epoch: int, order: Tensor, sizes: Sequence[int]) -> Iterator[Leaves]:
        """The samples of `order`, in batches of `sizes`, as the epoch draws them."""


class Prefetcher(Generic[Item]):
    """An iterator over another's items, which a thread makes up to `depth` ahead.

    What the other raises is raised in its place among the items. Use it as a context manager:
    leaving it ends the thread, after the item that it is making.

    The process's random streams belong to the thread that trains. So nothing that seeds them or
    draws from them may run here, such as reading samples in this process.

    Args:
        items: Read on the thread alone, from now on.
        depth: Items that are ready, or being made, before they are asked for; at least 1.
    """

    def __init__(self, items: Iterator[Item], depth: int = DEPTH) -> None:
        self._items = items
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = (
            queue.SimpleQueue()
        )
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="cgo-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while self._room.acquire() and not self._stopped:
                self._ready.put((next(self._items), None))
        except BaseException as error:  # StopIteration too: it is raised where it belongs
            self._ready.put((None, error))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._stopped:
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        self._room.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; no item comes any more."""
        self._stopped = True
        self._room.release()
        self._thread.join()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Copied:
    """Batches of a source on the host, copied to a device.

    Args:
        source: Gives batches on the host.
        device: Where they are to be.
        ahead: Whether they are made and copied on a thread, ahead of their use; only for sources
            that leave the process's random streams alone.
    """

    def __init__(self, source: Source, device: torch.device, *, ahead: bool) -> None:
        self._source, self._device, self._ahead = source, device, ahead
        # One stream for all epochs: torch keeps freed memory for the stream that it was taken on.
        self._copies = _SideStream(device) if device.type == "cuda" else _Direct(device)

    def batches(self, epoch: int, order: Tensor, sizes: Sequence[int]) -> Iterator[Leaves]:
        """The batches of the source, on the device."""
        found = self._source.batches(epoch, order, sizes)  # on this thread: it may start workers
        if not self._ahead:
            return (_moved(leaves, self._device) for leaves in found)
        return self._fetched(found)

    def _fetched(self, found: Iterator[Leaves]) -> Iterator[Leaves]:
        with Prefetcher(map(self._copies.start, found)) as ahead:
            for started in ahead:
                yield self._copies.finish(started)


def _moved(leaves: Leaves, device: torch.device) -> Leaves:
    return {name: moved(leaf, device) for name, leaf in leaves.items()}


class _Direct:
    """Copies that are done when `start` returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, leaves: Leaves) -> Any:
        return _moved(leaves, self._device)

    def finish(self, started: Any) -> Leaves:
        return started


class _SideStream:
    """Copies to a CUDA device on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, leaves: Leaves) -> Any:
        """Begin the copies; on any thread, whose current device and stream stay."""
        with torch.cuda.stream(self._stream):
            copies = _moved(leaves, self._stream.device)
            return copies, self._stream.record_event()

    def finish(self, started: Any) -> Leaves:
        """The copies, for use on this thread's stream, which waits for them; the host does not."""
        copies, copied = started
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(copied)
        for leaf in copies.values():
            # The memory belongs to the side stream: it may be filled anew only after what this
            # stream does with it.
            leaf.record_stream(current)
        return copies
