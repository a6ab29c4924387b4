"""`cgo demo`: a whole search on real data, merged, against the same models one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cgo.cli import serial
from cgo.cli.search import search
from cgo.engine import CGOEngine
from cgo.model import DataSpec, Model, TrainingSpec, best
from cgo.platforms.local import LocalPlatform, default_workers
from cgo.report import MergeReport
from cgo.store import open_experiment

#: What the best model must reach on the validation digits.
REQUIRED_ACCURACY = 0.95


def candidates(epochs: int) -> list[Model]:
    """Twenty-four different networks of four families over scikit-learn's digits."""
    data = DataSpec("cgo.zoo:digits", batch_size=64)
    sgd = TrainingSpec(
        metrics=("accuracy",),
        optimizer="SGD",
        optimizer_kwargs={"lr": 0.05, "momentum": 0.9},
        scheduler="CosineAnnealingLR",
        scheduler_kwargs={"T_max": epochs},
        epochs=epochs,
    )
    adam = TrainingSpec(
        metrics=("accuracy",), optimizer="Adam", optimizer_kwargs={"lr": 0.002}, epochs=epochs
    )
    mlps: list[dict[str, Any]] = [
        {"widths": list(w)} for w in ((32,), (64,), (128,), (64, 32), (128, 64), (64, 64, 64))
    ]
    cnns: list[dict[str, Any]] = [
        {"width": width, "depth": depth} for width in (8, 16) for depth in (2, 3, 4)
    ]
    resnets: list[dict[str, Any]] = [
        {"width": width, "blocks": blocks} for width in (8, 12) for blocks in (1, 2, 3)
    ]
    stems: list[dict[str, Any]] = [{"width": width} for width in (16, 24, 32, 48, 64, 96)]
    families: dict[str, tuple[list[dict[str, Any]], TrainingSpec]] = {
        "mlp": (mlps, adam),
        "cnn": (cnns, sgd),
        "resnet": (resnets, sgd),
        "stemmed": (stems, adam),
    }
    return [
        Model(
            f"cgo.zoo:{family}",
            kwargs,
            data=data,
            training=training,
            seed=number,
            model_id=f"{family}-{number}",
        )
        for family, (variants, training) in families.items()
        for number, kwargs in enumerate(variants)
    ]


def demo(experiment_dir: Path | None, epochs: int, skip_serial: bool) -> bool:
    """Search 24 different networks, and say how; whether the best is as good as it must be."""
    console = Console()
    models = candidates(epochs)
    console.print(f"{len(models)} different networks, {epochs} epochs each, merged:")
    started = time.perf_counter()
    with CGOEngine(experiment_dir, platform=LocalPlatform(default_workers())) as engine:
        search(console, engine, models)
        wall_s = time.perf_counter() - started
        folder, reports = engine.experiment_dir, engine.reports
    if not skip_serial:
        console.print("Now the same models, one after another, in a plain PyTorch loop ...")
        console.print(throughput(models, reports, wall_s, serial.measure(models), folder))
    winner = best(models)
    if winner is None or winner.metric is None or winner.metric < REQUIRED_ACCURACY:
        console.print(f"[red]no model reached a validation accuracy of {REQUIRED_ACCURACY}[/]")
        return False
    console.print(f"best: {winner.model_id}, validation accuracy {winner.metric:.4f}")
    return True


def throughput(
    models: Sequence[Model],
    reports: Sequence[MergeReport],
    wall_s: float,
    alone: dict[str, float],
    folder: Path,
) -> Table:
    """Merged against serial, in model-epochs a second.

    "training" is loading, steps and evaluation alone; "everything" adds capture, merging and the
    trial's start.
    """
    epochs = sum(model.training.epochs for model in models)
    merged_s, serial_s = training_seconds(models), sum(alone.values())
    planning_s = sum(report.capture_s + report.merge_s for report in reports)
    table = Table("", "seconds", "model-epochs/s", "against serial", title="Throughput")
    for name, seconds in (
        ("serial loop, training", serial_s),
        ("merged, training", merged_s),
        ("merged, everything", wall_s),
    ):
        ratio = f"{serial_s / seconds:.2f}x"
        table.add_row(name, f"{seconds:.1f}", f"{epochs / seconds:.1f}", ratio)
    trials = len(open_experiment(folder).trials())
    table.caption = f"{trials} trial(s); planning took {planning_s:.1f} s of everything"
    return table


def training_seconds(models: Sequence[Model]) -> float:
    """Wall time of the merged epochs: models of one trial share them, trials run side by side."""
    return max(sum(row["seconds"] for row in model.history) for model in models)
