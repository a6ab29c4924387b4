"""A whole search, merged against serial: everything counted, from a process's start to its end.

Merged: capture, merging, trials' processes, tuning, training, evaluation, journal. Serial: the
plain loop over the same models. Each side runs in a fresh process; rounds are interleaved.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cgo.bench import summary
from cgo.cli import serial
from cgo.cli.demo import training_seconds
from cgo.engine import CGOEngine
from cgo.errors import TrialError
from cgo.model import DataSpec, Model, TrainingSpec
from cgo.platforms.local import LocalPlatform, trial_environment
from cgo.zoo import random_cells


@dataclass(frozen=True)
class Search:
    """What a whole search took; times in seconds, the ratio is serial over merged."""

    models: int
    epochs: int
    workers: int
    merged_s: float
    serial_s: float
    ratio: float
    low: float  # 95% interval
    high: float
    phases: dict[str, float]  # of the merged search's median round

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"family": "end-to-end", "method": "cgo", **asdict(self)}


def candidates(count: int, epochs: int) -> list[Model]:
    """Different small CNNs and NAS-Bench-201 cell networks over scikit-learn's digits."""
    data = DataSpec("cgo.zoo:digits", batch_size=16)
    edges = random_cells(count)
    found = []
    for number in range(count):
        cnn = {"width": 8 + 2 * (number // 6), "depth": 2 + number // 2 % 3}
        cell = {"edges": edges[number], "width": 8, "inputs": 1}
        training = TrainingSpec(
            metrics=("accuracy",),
            optimizer_kwargs={"lr": 0.02 + 0.001 * number, "momentum": 0.9},
            epochs=epochs,
        )
        factory, kwargs = ("nas_bench_201", cell) if number % 2 else ("cnn", cnn)
        found.append(
            Model(f"cgo.zoo:{factory}", kwargs, data=data, training=training, seed=number,
                  model_id=f"{factory}-{number:03}")
        )  # fmt: skip
    return found


def measure(
    count: int,
    *,
    epochs: int = 10,
    workers: int = 1,
    rounds: int = 3,
    heard: Callable[[str], None] = lambda line: None,
) -> Search:
    """Run the search both ways, several times.

    Args:
        count: Number of models.
        epochs: Passes over the data.
        workers: Trials side by side.
        rounds: Of each side, in turn.
        heard: Hears of each round.

    Raises:
        TrialError: a side failed.
    """
    merged: list[tuple[float, dict[str, float]]] = []
    alone: list[float] = []
    for number in range(rounds):
        alone.append(_serial(candidates(count, epochs)))
        merged.append(_merged(count, epochs, workers))
        heard(f"round {number + 1}: serial {alone[-1]:.1f} s, merged {merged[-1][0]:.1f} s")
    ratio, low, high = summary([a / b for a, (b, _) in zip(alone, merged)])
    middle = statistics.median_low(seconds for seconds, _ in merged)
    phases = next(found for seconds, found in merged if seconds == middle)
    return Search(
        count, epochs, workers, middle, statistics.median(alone), ratio, low, high, phases
    )


def _serial(models: Sequence[Model]) -> float:
    started = time.perf_counter()
    serial.measure(models)  # in a process of its own
    return time.perf_counter() - started


def _merged(count: int, epochs: int, workers: int) -> tuple[float, dict[str, float]]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cgo.bench.end_to_end"],
        input=json.dumps([count, epochs, workers]),
        capture_output=True,
        text=True,
        env=trial_environment([], {}),
    )
    if done.returncode:
        raise TrialError(f"the merged search failed: {done.stderr.strip()[-2000:]}")
    return time.perf_counter() - started, json.loads(done.stdout)


def search(count: int, epochs: int, workers: int) -> dict[str, float]:
    """Run the merged search; returns the seconds of its phases.

    Raises:
        TrialError: a model was not trained.
    """
    models = candidates(count, epochs)
    with (
        tempfile.TemporaryDirectory(prefix="cgo-bench-") as folder,
        CGOEngine(Path(folder), platform=LocalPlatform(workers)) as engine,
    ):
        engine.submit_models(*models)
        engine.wait_models(*models)
        reports = engine.reports
    failed = [model.model_id for model in models if model.metric is None]
    if failed:
        raise TrialError(f"not trained: {', '.join(failed)}")
    return {
        "capture_s": sum(report.capture_s for report in reports),
        "merge_s": sum(report.merge_s for report in reports),
        "training_s": training_seconds(models),
    }


if __name__ == "__main__":
    print(json.dumps(search(*json.load(sys.stdin))))
