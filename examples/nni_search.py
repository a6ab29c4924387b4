"""An NNI search run three ways: one by one, on NNI's training service, and merged.

Regularized evolution over a NAS-Bench-201 space on scikit-learn's digits. Needs the extra
`cgo-engine[nni]`.

    python examples/nni_search.py --models 16
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from nni.nas.execution import SequentialExecutionEngine
from nni.nas.experiment import NasExperiment
from nni.nas.space import SimplifiedModelSpace
from nni.nas.strategy import RegularizedEvolution
from nni.nas.strategy.base import Strategy
from nni_search_space import digits_evaluator, digits_space

from cgo.nni import CGOExecutionEngine, NniPlatform

warnings.simplefilter("ignore")


def strategy() -> RegularizedEvolution:
    """The same search each time."""
    return RegularizedEvolution(population_size=8, sample_size=4, mutation_prob=0.3, seed=1)


def merged(
    models: int,
    epochs: int,
    folder: Path,
    platform: str,
    strategy: Callable[[], Strategy] = strategy,
    merge_size: int = 8,
) -> CGOExecutionEngine:
    """The one line that changes: another engine."""
    space = SimplifiedModelSpace.from_model(digits_space(), digits_evaluator(epochs))
    engine = CGOExecutionEngine(
        folder,
        merge_size=merge_size,
        max_models=models,
        platform=NniPlatform(working_directory=folder / "nni") if platform == "nni" else None,
    )
    strategy()(space, engine)
    engine.wait_models()
    return engine


def sequential(models: int, epochs: int, strategy: Callable[[], Strategy] = strategy) -> None:
    """NNI's sequential engine: one model after another, in this process."""
    space = SimplifiedModelSpace.from_model(digits_space(), digits_evaluator(epochs))
    strategy()(space, SequentialExecutionEngine(max_model_count=models))


def training_service(
    models: int, epochs: int, folder: Path, strategy: Callable[[], Strategy] = strategy
) -> None:
    """NNI's own engine on its local training service: a trial for each model."""
    experiment = NasExperiment(digits_space(), digits_evaluator(epochs), strategy())
    experiment.config.max_trial_number = models
    experiment.config.trial_concurrency = 1
    experiment.config.experiment_working_directory = str(folder)
    experiment.config.training_service.use_active_gpu = False
    experiment.run(port=_port())
    experiment.stop()


def _port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def leaderboard(engine: CGOExecutionEngine, count: int = 5) -> None:
    """The best candidates."""
    trained = [model for model in engine.list_models() if model.metric is not None]
    print(f"\n{len(trained)} models trained; the best:")
    for model in sorted(trained, key=lambda model: -model.metric)[:count]:
        edges = [value for key, value in sorted(model.sample.items()) if key != "lr"]
        print(f"  {model.metric:.3f}  lr {model.sample['lr']:<5}  {' '.join(map(str, edges))}")


def main() -> None:
    """Search, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--platform", choices=("local", "nni"), default="nni")
    parser.add_argument("--alone", action="store_true", help="merged only, nothing to compare with")
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cgo-nni-search-") as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        engine = merged(options.models, options.epochs, folder / "merged", options.platform)
        seconds["merged"] = time.perf_counter() - started
        leaderboard(engine)
        print("\n".join(engine.explain()))
        engine.shutdown()
        if not options.alone:
            started = time.perf_counter()
            sequential(options.models, options.epochs)
            seconds["NNI, sequential engine"] = time.perf_counter() - started
            started = time.perf_counter()
            training_service(options.models, options.epochs, folder / "service")
            seconds["NNI, training-service engine"] = time.perf_counter() - started
    print("\nthroughput, everything counted:")
    for name, spent in seconds.items():
        rate = 60 * options.models / spent
        print(f"  {name:<29} {spent:6.1f} s  {rate:6.1f} models a minute  "
              f"merged is {spent / seconds['merged']:.2f} times as fast")  # fmt: skip


if __name__ == "__main__":
    main()
