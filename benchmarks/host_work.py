"""What the host does in a replayed training step: the replay itself is a no-op.

    python benchmarks/host_work.py

Tiny models, planned and merged as in a trial, take captured steps on a CPU; the seam to the device
captures as ever and replays nothing. What is left is what a GPU waits for between two steps:
microseconds of a step, medians of rounds, on one thread. Of a schedule by steps, torch's own
schedulers take 1.8 a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

import cgo
from cgo.runtime import accelerator
from cgo.runtime.accelerator import Captured, Host
from cgo.runtime.data import Loader, open_data
from cgo.runtime.device_lanes import DeviceLanes
from cgo.runtime.member import Member
from cgo.runtime.tuning import make_tuner

COUNTS, ROUNDS, STEPS, PLANNED_STEPS = (32, 256), 15, 20, 1000

#: Steps until every program has been run, recorded and captured.
FIRST_STEPS = 12

FEATURES, BATCH = 8, 4

SGD = {"optimizer": "SGD", "optimizer_kwargs": {"momentum": 0.9}}
ADAM = {"optimizer": "Adam", "optimizer_kwargs": {}}
SCHEDULE = {"scheduler": "ExponentialLR", "scheduler_kwargs": {"gamma": 0.999}}
CASES: dict[str, dict[str, Any]] = {
    "sgd, constant rates": SGD,
    "adam, constant rates": ADAM,
    "adam, a schedule by epochs": ADAM | SCHEDULE,
    "adam, a schedule by steps": ADAM | SCHEDULE | {"scheduler_interval": "step"},
}


class NoReplay(Host):
    """Captures, so that all is arranged as it would be, and replays nothing."""

    def capture(self, body: Callable[[], Any], generators: Any = (), undone: Any = ()) -> Captured:
        """See `Accelerator`."""
        return Captured(super().capture(body, generators, undone).results, lambda: None)


def models(count: int, given: dict[str, Any]) -> list[cgo.Model]:
    """Linear layers that differ in their seed and rate."""
    source = {"shape": [FEATURES], "batch_size": BATCH}
    data = cgo.DataSpec("cgo.bench.families:random_data", source, batch_size=BATCH)
    layer = {"in_features": FEATURES, "out_features": 10}
    found = []
    for number in range(count):
        kwargs = {**given["optimizer_kwargs"], "lr": 0.01 / (number + 1)}
        training = cgo.TrainingSpec(metrics=(), **{**given, "optimizer_kwargs": kwargs})
        found.append(cgo.Model("torch.nn:Linear", layer, data=data, training=training, seed=number))
    return found


def step_us(count: int, given: dict[str, Any]) -> float:
    """Microseconds of host work of a replayed step."""
    cpu = torch.device("cpu")
    tuning = cgo.Tuning(measure=False, capture=True)
    data = common.plan(models(count, given), tuning)
    members = [Member(entry, data, cpu, Path(), lambda event: None) for entry in data.models]
    lanes = DeviceLanes(data.graph, members, {}, cpu, choose=make_tuner(tuning, cpu, PLANNED_STEPS))
    ids = [member.id for member in members]
    (spec,) = data.data.values()
    size, leaves = next(iter(Loader(open_data(spec), cpu).train(0)))
    take(lanes, ids, leaves, size, FIRST_STEPS)
    rounds = [take(lanes, ids, leaves, size, STEPS) for _ in range(ROUNDS)]
    return statistics.median(rounds) * 1e6


def take(
    lanes: DeviceLanes, ids: list[str], leaves: dict[str, Tensor], size: int, steps: int
) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    for step in range(1, steps + 1):  # 0 is one of those at which eager steps look at losses
        failures = lanes.train(ids, leaves, size, step)
        assert not failures, failures
    return (time.perf_counter() - started) / steps


def main() -> None:
    common.tuned_process()
    cpu = torch.device("cpu")
    accelerator._known[cpu] = NoReplay(cpu)
    figures = {
        name: {str(count): step_us(count, given) for count in COUNTS}
        for name, given in CASES.items()
    }
    common.write("host_work", {"target": "256 models, constant rates: 100", "step_us": figures})


if __name__ == "__main__":
    main()
