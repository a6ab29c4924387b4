"""What fusing different architectures gains: a training step, merged, against the serial loop.

    python benchmarks/fusion.py [--models 8] [--rounds 9] [--size 8] [--width 8]

Random NAS-Bench-201 networks, all different, one cell a stage. Steps of both sides, interleaved:
forward, backward and optimizer step of every model. Kernels are ATen operators that compute
something (no views), counted below autograd in one step.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import common
from torch.utils._python_dispatch import TorchDispatchMode

import cgo
from cgo.bench import methods
from cgo.bench.families import BATCHES
from cgo.bench.methods import Steps
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
    merged, serial = methods.merged(models), methods.serial(models)
    merged(_STEPS), serial(_STEPS)
    ours, plain = [], []
    for _ in range(options.rounds):
        ours.append(common.seconds(lambda: merged(_STEPS)) / _STEPS)
        plain.append(common.seconds(lambda: serial(_STEPS)) / _STEPS)
    common.write(
        "fusion",
        {
            "models": options.models,
            "image_size": options.size,
            "width": options.width,
            "serial_step_ms": statistics.median(plain) * 1e3,
            "merged_step_ms": statistics.median(ours) * 1e3,
            "serial_kernels": kernels(serial),
            "merged_kernels": kernels(merged),
            **common.summary([b / a for a, b in zip(ours, plain)]),
        },
    )


def candidates(count: int, size: int, width: int) -> list[cgo.Model]:
    """Networks whose cells all differ, each with its own learning rate."""
    images = {"samples": 32 * BATCHES, "validation": 32, "size": size}
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


def kernels(steps: Steps) -> int:
    """Operators that one step calls."""
    with Kernels() as counter:
        steps(_STEPS)
    return counter.count // _STEPS


if __name__ == "__main__":
    main()
