"""A random NNI search of 16 candidates on digits: merged, and on NNI's own engines.

Everything is counted: starts, capture, training, stops. The merged search and NNI's
training-service engine both run on NNI's local service, one trial at a time; NNI's sequential
engine trains one model after another in a process that is there already.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import summary, write
from nni.nas.strategy import Random

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import nni_search

MODELS, EPOCHS, ROUNDS = 16, 3, 3


def strategy() -> Random:
    return Random(seed=1)


def merged(folder: Path) -> None:
    engine = nni_search.merged(MODELS, EPOCHS, folder, "nni", strategy, merge_size=MODELS)
    trained = [model for model in engine.list_models() if model.metric is not None]
    engine.shutdown()
    assert len(trained) == MODELS, engine.errors


def sequential(folder: Path) -> None:
    nni_search.sequential(MODELS, EPOCHS, strategy)


def training_service(folder: Path) -> None:
    nni_search.training_service(MODELS, EPOCHS, folder, strategy)


def seconds(search: Callable[[Path], None]) -> float:
    with tempfile.TemporaryDirectory(prefix="cgo-bench-nni-") as temporary:
        started = time.perf_counter()
        search(Path(temporary))
        return time.perf_counter() - started


def main() -> None:
    """Measure and write."""
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for search in (merged, training_service, sequential):
            times.setdefault(search.__name__, []).append(seconds(search))
            print(search.__name__, round(times[search.__name__][-1], 1), flush=True)
    figures: dict[str, object] = {"models": MODELS, "epochs": EPOCHS, "rounds": ROUNDS}
    for name, found in times.items():
        figures[f"{name}_s"] = statistics.median(found)
        if name != "merged":
            figures[f"{name}_over_merged"] = summary(
                [a / b for a, b in zip(found, times["merged"])]
            )
    write("nni_search", figures)


if __name__ == "__main__":
    main()
