"""The small seam between the runtime and a device: capture, streams, memory, copies.

On CUDA a step is captured as a CUDA graph. Elsewhere the same is done by writing down the operator
calls of a step and calling them again, by the same rules: what is a number of Python's when the
step is captured stays that number, tensors are read and written where they lay, and whoever looks
at a value while capturing is refused. So whatever replays right on a CPU has nothing baked in that
would be stale on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from cgo.errors import CgoError
from cgo.private.graph_pools import abandon
from cgo.runtime.bodies import record_body
from cgo.runtime.tape import TapeError

log = logging.getLogger(__name__)

#: Of a device's free memory, what models are planned to take.
FILLED = 0.9

#: Streams beside the main one.
SIDE_STREAMS = 3


class CaptureRefused(CgoError):
    """A body that cannot be captured; it runs eagerly."""


@dataclass(frozen=True)
class Captured:
    """A captured body: each `replay` computes anew, into the same `results`."""

    results: Sequence[Tensor]
    replay: Callable[[], None]


class Accelerator(Protocol):
    """A device as the runtime uses it."""

    device: torch.device
    #: Whether its kernels are known to keep the members of a group apart, whatever their values.
    separates: bool

    def capture(
        self,
        body: Callable[[], Sequence[Tensor]],
        generators: Sequence[torch.Generator] = (),
        undone: Sequence[Tensor] = (),
    ) -> Captured:
        """Capture a body without running it; what it writes stays as it was.

        Args:
            body: Works on tensors that stay where they are. Gives the tensors to keep.
            generators: Those that it draws from; each replay goes on in their streams.
            undone: What a replay that raises `Undone` puts back, beside the generators. On CUDA no
                replay does: there, errors of kernels end the process.

        Raises:
            CaptureRefused: it synchronises, or does what cannot be done again.
        """

    @property
    def capturing(self) -> bool:
        """Whether a body is being captured now."""

    def side_by_side(self, branches: Sequence[Callable[[], None]]) -> None:
        """Run branches that do not depend on each other; returns with all of them ordered."""

    def begin(self) -> None:
        """What runs `beside` from now on follows what is ordered until now, and nothing later."""

    def beside(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Run a block on a side stream; `join` waits for all of them."""

    def join(self) -> None:
        """Let what follows wait for the side streams."""

    def upload(self, values: Sequence[float], into: Tensor) -> None:
        """Write numbers into a device tensor, in stream order and without waiting."""

    def seconds(self, replay: Callable[[], None]) -> float:
        """How long one replay takes."""

    def free_bytes(self) -> int:
        """What can be allocated: other processes' memory is not counted in, our own cache is."""

    def peak_bytes(self) -> int | None:
        """The most that was allocated since the last call; None where nobody counts."""

    def release(self) -> None:
        """Give cached memory back."""


#: What errors say that have no type of their own: of the host, of CUDA, and of its libraries.
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device."""
    return accelerator_for(device).free_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def leaves_eager(error: BaseException) -> bool:
    """Whether an error of a capture says that the body has to run eagerly, and nothing worse."""
    return isinstance(error, CaptureRefused) or is_out_of_memory(error)


def without_frames(error: Exception) -> Exception:
    """The error without what its frames hold: tensors that nobody needs any more."""
    seen: BaseException | None = error
    while seen is not None:
        if seen.__traceback__ is not None:
            traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


class Host:
    """The CPU: bodies are written down call by call, branches run one after another."""

    separates = True  # every kernel that forms call has been tried with NaN in one lane

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capturing = False

    def capture(
        self,
        body: Callable[[], Sequence[Tensor]],
        generators: Sequence[torch.Generator] = (),
        undone: Sequence[Tensor] = (),
    ) -> Captured:
        """See `Accelerator`; the body is run twice, and what it wrote is undone."""
        self.capturing = True
        try:
            results, replay = record_body(body, undone, generators)
        except TapeError as error:
            raise CaptureRefused(str(error)) from error
        finally:
            self.capturing = False
        return Captured(results, replay)

    def side_by_side(self, branches: Sequence[Callable[[], None]]) -> None:
        """One after another."""
        for branch in branches:
            branch()

    def begin(self) -> None:
        """Nothing runs beside."""

    def beside(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Where everything else runs, too."""
        return contextlib.nullcontext()

    def join(self) -> None:
        """Nothing runs beside."""

    def upload(self, values: Sequence[float], into: Tensor) -> None:
        """Write numbers into a tensor."""
        into.copy_(torch.tensor(values, dtype=into.dtype))

    def seconds(self, replay: Callable[[], None]) -> float:
        """How long one replay takes."""
        started = time.perf_counter()
        replay()
        return time.perf_counter() - started

    def free_bytes(self) -> int:
        """Memory that is available without swapping."""
        return int(psutil.virtual_memory().available)

    def peak_bytes(self) -> int | None:
        """Nobody counts."""
        return None

    def release(self) -> None:
        """Nothing is cached."""


class Cuda:
    """One CUDA device. Graphs of one device share a memory pool: they never run at once."""

    separates = False  # cuDNN chooses among hundreds, by device and shape

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # of the graphs that are there now
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._capture_stream: Any = None
        self._forks: list[Any] = []  # inside graphs
        self._sides: list[Any] = []  # beside them: a stream's workspaces must not serve both
        self._used: set[int] = set()  # side streams that nobody has waited for
        self._begun: Any = None  # what they follow
        self._launch_s: float | None = None  # of a graph of next to nothing

    @property
    def capturing(self) -> bool:
        """See `Accelerator`."""
        return torch.cuda.is_current_stream_capturing()

    def capture(
        self,
        body: Callable[[], Sequence[Tensor]],
        generators: Sequence[torch.Generator] = (),
        undone: Sequence[Tensor] = (),
    ) -> Captured:
        """See `Accelerator`."""
        # Whatever happens, the stream that was current comes back: a capture that fails to end
        # would leave its own.
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(current):
            if not self._graphs:  # a pool does not outlive its last graph
                self._pool = torch.cuda.graph_pool_handle()
            if self._capture_stream is None:
                # Streams are handed out in turn, by priority: loaders' copies use the other one.
                self._capture_stream = torch.cuda.Stream(self.device, priority=-1)
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            try:
                results = self._captured(graph, body)
            except Exception as error:
                self._abandon(graph, generators)
                if is_out_of_memory(error):
                    raise
                text = str(error).partition("\n")[0]
                raise CaptureRefused(f"the step cannot be captured: {text}") from error
            self._graphs.add(graph)

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return Captured(results, replay)

    def _captured(self, graph: Any, body: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        collects = gc.isenabled()
        gc.disable()  # an old graph that is collected now would be destroyed inside the capture
        try:
            # Loader threads go on allocating pinned memory: only this thread is watched. And the
            # backward stays on it, as do the streams that it was told to use.
            with (
                torch.autograd.set_multithreading_enabled(False),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._capture_stream,
                    capture_error_mode="thread_local",
                ),
            ):
                return list(body())
        finally:
            if collects:
                gc.enable()

    def _abandon(self, graph: Any, generators: Sequence[torch.Generator]) -> None:
        """After a capture that failed: let the allocator forget it, and use another pool."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
        try:
            graph.pool()
        except RuntimeError:  # the capture has not ended: torch does this only where it has
            abandon(self.device.index, self._pool)
            self._release_generators(generators)
        self._graphs = weakref.WeakSet()

    def _release_generators(self, generators: Sequence[torch.Generator]) -> None:
        """Let generators draw outside of graphs again.

        A capture that does not end leaves them, and the default one, believing that it goes on
        (torch 2.11: `capture_end` raises before they are told); one that does end tells them.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        place = torch.zeros((), device=self.device)
        try:
            with torch.cuda.graph(
                graph, stream=self._capture_stream, capture_error_mode="thread_local"
            ):
                place.add_(1)
        except RuntimeError as error:  # a device that captures nothing has not told them anything
            log.warning("%s captures no graphs: %s", self.device, str(error).partition("\n")[0])

    def side_by_side(self, branches: Sequence[Callable[[], None]]) -> None:
        """Fork, one branch on the current stream and the others beside it, and join."""
        if not self._forks:
            self._forks = [torch.cuda.Stream(self.device, priority=-1) for _ in range(SIDE_STREAMS)]
        main = torch.cuda.current_stream(self.device)
        sides = self._forks[: len(branches) - 1]
        for side in sides:
            side.wait_stream(main)
        streams = [main, *sides]
        try:
            for index, branch in enumerate(branches):
                with torch.cuda.stream(streams[index % len(streams)]):
                    branch()
        finally:  # a capture that is left with unjoined streams hides what went wrong
            for side in sides:
                main.wait_stream(side)

    def begin(self) -> None:
        """See `Accelerator`."""
        if self._begun is None:
            self._begun = torch.cuda.Event()
        self._begun.record(torch.cuda.current_stream(self.device))

    @contextlib.contextmanager
    def beside(self, index: int) -> Iterator[None]:
        """See `Accelerator`."""
        chosen = index % SIDE_STREAMS
        if not self._sides:
            self._sides = [torch.cuda.Stream(self.device) for _ in range(SIDE_STREAMS)]
        side = self._sides[chosen]
        if chosen not in self._used:
            side.wait_event(self._begun)
            self._used.add(chosen)
        with torch.cuda.stream(side):
            yield

    def join(self) -> None:
        """See `Accelerator`."""
        main = torch.cuda.current_stream(self.device)
        for index in self._used:
            main.wait_stream(self._sides[index])
        self._used.clear()

    def upload(self, values: Sequence[float], into: Tensor) -> None:
        """From pinned memory, whose allocator keeps it until the copy is done."""
        host = torch.tensor(values, dtype=into.dtype, pin_memory=True)
        into.copy_(host, non_blocking=True)

    def seconds(self, replay: Callable[[], None]) -> float:
        """By events of the stream, without what launching a graph takes however small it is."""
        if self._launch_s is None:
            place = torch.zeros((), device=self.device)
            nothing = self.capture(lambda: [place.add_(1)])
            self._launch_s = statistics.median(self._between(nothing.replay) for _ in range(9))
        return max(0.0, self._between(replay) - self._launch_s)

    def _between(self, replay: Callable[[], None]) -> float:
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

    def free_bytes(self) -> int:
        """What the driver has left for anybody, and what this process holds for eager work."""
        free, _ = torch.cuda.mem_get_info(self.device)
        held = sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == (self.device.index or 0)
            and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
        )
        return int(free + held)

    def peak_bytes(self) -> int | None:
        """By torch's allocator."""
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(peak)

    def release(self) -> None:
        """Give cached memory back."""
        torch.cuda.empty_cache()


#: Rounds of timing a form of a step.
_ROUNDS = 5


def captured_seconds(
    accelerator: Accelerator,
    form: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    short: bool = False,
) -> float:
    """Median seconds of a step's form once it is captured.

    Args:
        accelerator: Captures and times.
        form: Called with `inputs`; what it writes is written several times.
        inputs: Of one step.
        short: It may take no longer than launching it. Then it is captured several times in a row,
            so that what a launch takes more or less than another counts little.

    Raises:
        CaptureRefused: it cannot be captured.
    """

    def seconds(times: int) -> float:
        captured = accelerator.capture(lambda: [form(*inputs) for _ in range(times)][-1])
        rounds = (accelerator.seconds(captured.replay) for _ in range(_ROUNDS))
        return statistics.median(rounds) / times

    found = seconds(1)
    return seconds(_REPEATED) if short and found < _SHORT_S else found


#: What takes less is timed so many times in a row: launches of graphs differ by some microseconds.
_SHORT_S = 5e-5
_REPEATED = 8


_known: dict[torch.device, Accelerator] = {}


def accelerator_for(device: torch.device) -> Accelerator:
    """The device's seam; one for each device of the process, however it is named."""
    device = numbered(device)
    if device not in _known:
        _known[device] = Cuda(device) if device.type == "cuda" else Host(device)
    return _known[device]


def forget_accelerators() -> None:
    """Let the devices' seams be made anew, as in a process that has used none."""
    _known.clear()


def numbered(device: torch.device) -> torch.device:
    """The device with its number: "cuda" is the current one, as torch takes it."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
