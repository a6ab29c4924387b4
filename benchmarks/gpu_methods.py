"""Ways of training the suite's models, merged and each alone, on one device; and their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from gpu_counting import Work, forward_work, step_work, synchronize
from gpu_workloads import Workload
from torch import Tensor

from cgo.bench.methods import NotApplicable, Solo, Steps, batches_of, loop, merged
from cgo.graph_data import GraphData
from cgo.model import Model

#: Steps before anything is timed: what is built lazily is built, records are made and checked.
WARM_STEPS = 5

#: A round of one method takes as many steps as fill this time.
ROUND_S = 0.1


def merged_steps(
    models: list[Model],
    device: torch.device,
    data: GraphData | None = None,
    tell: Callable[..., None] = lambda what, **figures: None,
) -> Steps:
    """The merged step that is measured; this function alone says how it is taken.

    Args:
        models: What to train.
        device: Where.
        data: Their document, where they were planned before.
        tell: Hears what was chosen and captured.
    """
    return merged(models, device=device, data=data, tell=tell)


def solos_of(models: list[Model], device: torch.device) -> list[Solo]:
    """Each model by hand; the optimizer has its defaults (`foreach` on CUDA)."""
    batches = batches_of(models, device)
    return [Solo(model, batches[model.data.digest]) for model in models]


def eager(models: list[Model], device: torch.device) -> Steps:
    """The plain serial loop."""
    return loop(solos_of(models, device))


def captured(models: list[Model], device: torch.device) -> Steps:
    """The serial loop over steps that were captured, each whole, as a CUDA graph."""
    return _replayed(solos_of(models, device), device)


def compiled(models: list[Model], device: torch.device) -> Steps:
    """The same with forward, loss and backward compiled by Inductor; on a CPU nothing is captured.

    CUDA graphs are captured by hand around the whole step, the optimizer's included: at least as
    fast as `mode="reduce-overhead"`, which leaves the optimizer's step outside.
    """
    solos = solos_of(models, device)
    for solo in solos:
        solo.objective = torch.compile(solo.objective)  # type: ignore[method-assign]
    return _replayed(solos, device) if device.type == "cuda" else loop(solos)


def _replayed(solos: Sequence[Solo], device: torch.device) -> Steps:
    if device.type != "cuda":
        raise NotApplicable("CUDA graphs need a CUDA device")
    replays = [_capture(solo) for solo in solos]

    def steps(count: int) -> None:
        for replay in replays:
            for _ in range(count):
                replay()

    return steps


def _capture(solo: Solo) -> Callable[[], None]:
    """A model's step as a CUDA graph over fixed input tensors, into which batches are copied."""
    x, y = (tensor.clone() for tensor in next(solo.batches))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as PyTorch's documentation asks for
        for _ in range(3):
            solo.learn(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    solo.optimizer.zero_grad(set_to_none=True)  # so that gradients lie in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solo.learn(x, y)

    def replay() -> None:
        given: tuple[Tensor, Tensor] = next(solo.batches)
        x.copy_(given[0])
        y.copy_(given[1])
        graph.replay()

    return replay


def sampled(models: list[Model], count: int) -> list[Model]:
    """That many of the models, evenly spaced, first and last among them; all if there are fewer."""
    if len(models) <= count:
        return models
    last = len(models) - 1
    return [models[round(i * last / max(count - 1, 1))] for i in range(count)]


def times(
    methods: Mapping[str, Steps],
    device: torch.device,
    rounds: int = 5,
    heard: Callable[[dict[str, list[float]]], None] = lambda rows: None,
) -> dict[str, list[float]]:
    """Wall seconds of a step, by method, one for each interleaved round.

    The device is waited for before and after each round.

    Args:
        methods: What to time.
        device: What they run on.
        rounds: How often each is timed.
        heard: Called after each round with what there is so far.
    """
    counts = {}
    for name, steps in methods.items():
        steps(WARM_STEPS)
        counts[name] = max(1, round(ROUND_S / _seconds(steps, 1, device)))
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, steps in methods.items():
            found[name].append(_seconds(steps, counts[name], device) / counts[name])
        heard(found)
    return found


def _seconds(steps: Steps, count: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    steps(count)
    synchronize(device)
    return time.perf_counter() - started


def median(rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(row) for name, row in rows.items()}


@dataclass(frozen=True)
class Counted:
    """What a step of all models does, and how much more that is than a step of the sampled ones."""

    total: Work  # a trunk that all share counts once
    trunk: Work  # of its forward
    scale: float  # calls of operators of all models alone, over those of the sampled ones


def counted(workload: Workload, models: list[Model], sample: list[Model]) -> Counted:
    """Count one of each architecture, without a GPU.

    Images need no memory for it (the meta device); attention is another operator there.
    """
    device = torch.device("meta" if workload.images else "cpu")
    alike: dict[str, list[Model]] = {}
    for model in models:
        alike.setdefault(_architecture(model), []).append(model)
    alone, trunk = {}, Work(0, 0)
    for kind, group in alike.items():
        (solo,) = solos_of(group[:1], device)
        alone[kind] = step_work(solo)
        if workload.trunk is not None:
            trunk = forward_work(solo.net.get_submodule(workload.trunk), next(solo.batches)[0])
    total = sum((alone[_architecture(model)] for model in models), Work(0, 0))
    chosen = sum((alone[_architecture(model)] for model in sample), Work(0, 0))
    return Counted(total + trunk * (1 - len(models)), trunk, total.calls / chosen.calls)


def _architecture(model: Model) -> str:
    return f"{model.module} {sorted(model.kwargs.items())}"
