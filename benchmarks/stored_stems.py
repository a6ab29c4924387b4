"""Heads over one frozen residual network, its values stored after the first epoch.

    python benchmarks/stored_stems.py [--models 32] [--epochs 5] [--rounds 7]

Three ways of training all models for all epochs, in turn in each round: the plain serial loop, the
merged trial that computes the trunk once a batch, and the merged trial that computes it once a
sample and keeps the values. Times are of the epochs, training and evaluation, the first included:
in it the trial lowers its programs and fills the store. Data are small enough to take a minute or
two; ratios are of one thread.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import common
import frozen_stem

import cgo
from cgo import trial
from cgo.graph_data import GraphData


class Seconds:
    """What a trial's epochs take, and what it says of its stems."""

    def __init__(self, data: GraphData) -> None:
        self.epochs: dict[int, float] = {}
        self.stems: dict[str, Any] = {}
        trial.execute(data, report=self._note)

    def _note(self, event: Any) -> None:
        if event.kind == "epoch":
            self.epochs[event.epoch] = event.value["seconds"]  # all models share the epoch
        elif event.kind == "trial" and event.value["what"] == "stems":
            self.stems = {key: event.value[key] for key in ("bytes", "values", "models")}

    @property
    def total(self) -> float:
        """All epochs."""
        return sum(self.epochs.values())

    @property
    def later(self) -> float:
        """An epoch after the first."""
        return statistics.median(self.epochs[epoch] for epoch in self.epochs if epoch)


def submitted(options: argparse.Namespace) -> list[cgo.Model]:
    """The models, of different heads and learning rates."""
    images = {"samples": 512, "validation": 128, "channels": 3, "size": 16}
    data = cgo.DataSpec("workloads:images", images, batch_size=64)
    return [
        cgo.Model(
            "workloads:residual_headed",
            {"width": 16 + 4 * (n % 8)},
            data=data,
            training=cgo.TrainingSpec(
                epochs=options.epochs, optimizer_kwargs={"lr": 0.002 * (n + 1), "momentum": 0.9}
            ),
            seed=n,
        )
        for n in range(options.models)
    ]


def record(
    options: argparse.Namespace, ratio: float, rounds: list[tuple[float, Seconds, Seconds]]
) -> dict[str, Any]:
    """The figures of all rounds: serial seconds, trial without a store, trial with one."""

    def median(values: Any) -> float:
        return statistics.median(list(values))

    return {
        "models": options.models,
        "epochs": options.epochs,
        "trunk_forward_over_head_step": ratio,
        **{f"stored_{key}": value for key, value in rounds[0][2].stems.items()},
        "serial_s": median(serial for serial, _, _ in rounds),
        "merged_s": median(merged.total for _, merged, _ in rounds),
        "stored_s": median(stored.total for _, _, stored in rounds),
        "merged_later_epoch_s": median(merged.later for _, merged, _ in rounds),
        "stored_later_epoch_s": median(stored.later for _, _, stored in rounds),
        "serial_over_merged": common.summary([s / m.total for s, m, _ in rounds]),
        "merged_over_stored": common.summary([m.total / t.total for _, m, t in rounds]),
        "merged_over_stored_later_epoch": common.summary([m.later / t.later for _, m, t in rounds]),
        **common.summary([s / t.total for s, _, t in rounds]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    common.tuned_process()
    models = submitted(options)
    merged = common.plan(models, cgo.Tuning(store_stems=False))
    stored = common.plan(models)
    loops = common.plain_loops(models)
    ratio = frozen_stem.head_cost_ratio(loops[0])

    def serial() -> None:
        for loop in loops:
            for epoch in range(options.epochs):
                loop.epoch(epoch)

    for data in (merged, stored):
        trial.execute(data)  # costs that are not known yet are measured here
    rounds = [
        (common.seconds(serial), Seconds(merged), Seconds(stored)) for _ in range(options.rounds)
    ]
    common.write("stored_stems", record(options, ratio, rounds))


if __name__ == "__main__":
    main()
