"""What fusing different architectures gains: a training step, merged, against the serial loop.

    python benchmarks/fusion.py [--models 8] [--rounds 9] [--size 8] [--width 8]

Random NAS-Bench-201 networks, all different, one cell a stage. Steps of both sides, interleaved:
forward, backward and optimizer step of every model. Kernels are ATen operators that compute
something (no views), counted below autograd in one step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cgo
from cgo.graph_data import GraphData
from cgo.runtime.data import open_data
from cgo.runtime.member import Member
from cgo.runtime.training import Cohort
from cgo.zoo import random_cells

_STEPS = 10


class Kernels(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args()
    common.tuned_process()
    models = candidates(options.models, options.size, options.width)
    data = common.plan(models)
    folder = Path(tempfile.mkdtemp(prefix="cgo-benchmark-"))
    members = [
        Member(e, data, torch.device("cpu"), folder, lambda event: None) for e in data.models
    ]
    merged, serial = merged_steps(data, members), serial_steps(models)
    merged(), serial()
    ours, plain = [], []
    for _ in range(options.rounds):
        ours.append(common.seconds(merged) / _STEPS)
        plain.append(common.seconds(serial) / _STEPS)
    common.write(
        "fusion",
        {
            "models": options.models,
            "image_size": options.size,
            "width": options.width,
            "serial_step_ms": statistics.median(plain) * 1e3,
            "merged_step_ms": statistics.median(ours) * 1e3,
            "serial_kernels": kernels(serial) // _STEPS,
            "merged_kernels": kernels(merged) // _STEPS,
            **common.summary([b / a for a, b in zip(ours, plain)]),
        },
    )


def candidates(count: int, size: int, width: int) -> list[cgo.Model]:
    """Networks whose cells all differ, each with its own learning rate."""
    images = {"samples": 32 * _STEPS, "validation": 32, "size": size}
    data = cgo.DataSpec("workloads:images", images, batch_size=32)
    return [
        cgo.Model(
            "cgo.zoo:nas_bench_201",
            {"edges": edges, "width": width},
            data=data,
            training=cgo.TrainingSpec(
                optimizer_kwargs={"lr": 0.01 + index / 1000, "momentum": 0.9}, epochs=10**9
            ),
            model_id=f"m{index:02}",
        )
        for index, edges in enumerate(random_cells(count))
    ]


def merged_steps(data: GraphData, members: list[Member]) -> Callable[[], None]:
    """Ten training steps of all models in the merged runtime."""
    (key,) = data.data
    cohort = Cohort(data, key, members, {}, torch.device("cpu"), None)
    batches = list(cohort._open().train(0))

    def steps() -> None:
        for size, leaves in batches:
            outcomes = cohort.merged.train([m.id for m in members], leaves, size)
            assert not any(isinstance(outcome, Exception) for outcome in outcomes.values())
            assert not cohort.merged.update(list(outcomes))

    return steps


def serial_steps(models: list[cgo.Model]) -> Callable[[], None]:
    """Ten training steps of each model in turn."""
    loops = common.plain_loops(models)
    inputs, targets = open_data(models[0].data).train.tensors
    batches = [(inputs[i : i + 32], targets[i : i + 32]) for i in range(0, 32 * _STEPS, 32)]

    def steps() -> None:
        for loop in loops:
            for x, y in batches:
                loop.optimizer.zero_grad()
                loop.loss(loop.net(x), y).backward()
                loop.optimizer.step()

    return steps


def kernels(steps: Callable[[], None]) -> int:
    """Operators that the steps call."""
    with Kernels() as counter:
        steps()
    return counter.count


if __name__ == "__main__":
    main()
