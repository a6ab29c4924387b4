"""NNI searches on digits: merged, and on NNI's own engines.

    taskset -c 0 python benchmarks/nni_search.py [random] [evolution]

Everything is counted: starts, capture, training, stops. `random`: 16 candidates; the merged search
and NNI's training-service engine both run on NNI's local service, one trial at a time. `evolution`:
64 candidates of regularized evolution, merged on this machine by itself. NNI's sequential engine
trains one model after another in a process that is there already.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import summary, write_sections
from nni.nas.strategy import Random, RegularizedEvolution
from nni.nas.strategy.base import Strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import nni_search

EPOCHS, ROUNDS = 3, 3

#: A search, in a folder of its own.
Search = Callable[[Path], None]


def random() -> Strategy:
    return Random(seed=1)


def evolution() -> Strategy:
    return RegularizedEvolution(population_size=16, sample_size=8, mutation_prob=0.3, seed=1)


def merged(models: int, platform: str, strategy: Callable[[], Strategy], folder: Path) -> None:
    engine = nni_search.merged(models, EPOCHS, folder, platform, strategy, merge_size=16)
    trained = [model for model in engine.list_models() if model.metric is not None]
    engine.shutdown()
    assert len(trained) == models, engine.errors


def sequential(models: int, strategy: Callable[[], Strategy], folder: Path) -> None:
    nni_search.sequential(models, EPOCHS, strategy)


def training_service(models: int, strategy: Callable[[], Strategy], folder: Path) -> None:
    nni_search.training_service(models, EPOCHS, folder, strategy)


SECTIONS: dict[str, tuple[int, dict[str, Search]]] = {
    "random": (
        16,
        {
            "merged": partial(merged, 16, "nni", random),
            "training_service": partial(training_service, 16, random),
            "sequential": partial(sequential, 16, random),
        },
    ),
    "evolution": (
        64,
        {
            "merged": partial(merged, 64, "local", evolution),
            "sequential": partial(sequential, 64, evolution),
        },
    ),
}


def seconds(search: Search) -> float:
    with tempfile.TemporaryDirectory(prefix="cgo-bench-nni-") as temporary:
        started = time.perf_counter()
        search(Path(temporary))
        return time.perf_counter() - started


def compared(models: int, searches: Mapping[str, Search]) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, search in searches.items():
            times.setdefault(name, []).append(seconds(search))
            print(name, round(times[name][-1], 1), flush=True)
    figures: dict[str, Any] = {"models": models, "epochs": EPOCHS, "rounds": ROUNDS}
    for name, found in times.items():
        figures[f"{name}_s"] = statistics.median(found)
        if name != "merged":
            ratios = [a / b for a, b in zip(found, times["merged"])]
            figures[f"{name}_over_merged"] = summary(ratios)
    return figures


if __name__ == "__main__":
    sections = {name: partial(compared, *given) for name, given in SECTIONS.items()}
    write_sections("nni_search", sections, sys.argv[1:])
