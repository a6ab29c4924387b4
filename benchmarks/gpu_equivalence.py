"""Whether merged training on a device equals training alone there, repeats itself, and isolates.

The plain loop here is written out, and uses nothing of the engine's but the specs.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gpu_workloads import WORKLOADS
from torch.nn import functional as F

import cgo
from cgo.events import Event
from cgo.graph_data import GraphData
from cgo.imports import resolve
from cgo.model import Model
from cgo.runtime.training import train

#: Relative distance of float64 losses that is allowed.
ALLOWED = 1e-8

#: Nothing is measured, so that two runs choose alike; steps are recorded, as in long trainings.
TUNING = {"measure": False, "tape": True}

#: A learning rate after which a model's weights are no numbers.
_RUINOUS = 1e30


@dataclass
class Run:
    """What a merged training gave, by model."""

    losses: dict[str, list[float]] = field(default_factory=dict)  # of each step, if observed
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # of each epoch
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each epoch
    weights: dict[str, str | None] = field(default_factory=dict)  # hashes
    errors: dict[str, str] = field(default_factory=dict)

    def on_loss(self, model: str, step: int, loss: torch.Tensor) -> None:
        self.losses.setdefault(model, []).append(float(loss))

    def on_gradients(self, model: str, step: int, gradients: Any) -> None:
        pass

    def report(self, event: Event) -> None:
        """Keep what says how a model fares."""
        if event.kind == "epoch":
            row = dict(event.value)
            self.seconds.setdefault(event.model, []).append(row.pop("seconds"))
            self.rows.setdefault(event.model, []).append(row)
        elif event.kind == "ended":
            self.weights[event.model] = event.value["sha256"]
            if event.value["error"] is not None:
                self.errors[event.model] = event.value["error"]

    def digest(self, model: str) -> str:
        """Equal for equal bits of all the model's figures and weights."""
        text = repr((self.rows.get(model), self.weights.get(model), self.errors.get(model)))
        return hashlib.sha256(text.encode()).hexdigest()


def checked_models() -> dict[str, list[Model]]:
    """The companies of models that are checked, by the names of their plans."""
    families = {name: workload.build("small") for name, workload in WORKLOADS.items()}
    return {**families, "whole": mixed_models(), "ruined": mixed_models(ruined=True)}


def run(
    data: GraphData,
    device: torch.device,
    *,
    observed: bool = False,
    heard: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Train in a fresh folder; observed, every step's losses are read."""
    found = Run()

    def report(event: Event) -> None:
        found.report(event)
        heard(event)

    with tempfile.TemporaryDirectory(prefix="cgo-suite-") as folder:
        observer = found if observed else None
        train(data, Path(folder), report, observer=observer, device=device)
    return found


def check_family(name: str, data: GraphData, device: torch.device) -> dict[str, Any]:
    """Float64 losses of a small variant of a workload over 100 steps, against the plain loop.

    Steps are compared in an observed run, epochs in one without, whose steps are as fast ones are.
    """
    models = WORKLOADS[name].build("small")
    steps, epochs = run(data, device, observed=True), run(data, device)
    _refuse_errors(steps, epochs)
    worst_step = worst_epoch = 0.0
    for model in models:
        alone = plain_losses(model, device)
        worst_step = max(worst_step, _distance(steps.losses[model.model_id], alone))
        means = _epoch_means(alone, model.training.epochs)
        rows = [row["train_loss"] for row in epochs.rows[model.model_id]]
        worst_epoch = max(worst_epoch, _distance(rows, means))
    return {
        "models": len(models),
        "steps": len(alone),
        "worst_step": worst_step,
        "worst_epoch": worst_epoch,
        "passed": worst_step <= ALLOWED and worst_epoch <= ALLOWED,
    }


def plain_losses(model: Model, device: torch.device) -> list[float]:
    """Training one model alone: the loss of each step."""
    torch.manual_seed(model.seed)
    net = resolve(model.module)(**model.kwargs).double().to(device)
    inputs, targets = resolve(model.data.source)(**model.data.kwargs)[0].tensors
    inputs, targets = inputs.double().to(device), targets.to(device)
    optimizer = torch.optim.SGD(net.parameters(), **model.training.optimizer_kwargs)
    losses = []
    for epoch in range(model.training.epochs):
        generator = torch.Generator().manual_seed(model.data.seed + epoch)
        for batch in torch.randperm(len(targets), generator=generator).split(model.data.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _epoch_means(losses: Sequence[float], epochs: int) -> list[float]:
    steps = len(losses) // epochs
    return [math.fsum(losses[i : i + steps]) / steps for i in range(0, len(losses), steps)]


def _distance(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative distance; infinite where a value is no number or is missing."""
    if len(found) != len(expected):
        return math.inf
    apart = (abs(a - b) / max(abs(b), 1e-300) for a, b in zip(found, expected))
    return max((d if math.isfinite(d) else math.inf for d in apart), default=math.inf)


def _refuse_errors(*runs: Run) -> None:
    for found in runs:
        if found.errors:
            raise cgo.CgoError(f"models failed: {found.errors}")


def mixed_models(*, ruined: bool = False) -> list[Model]:
    """Small models of four families in float32, of one loader; one of them may be ruined."""
    models = [m for name in ("cells", "cnn", "wide", "heads") for m in small(name)]
    if ruined:
        models[2].training = replace(
            models[2].training, optimizer_kwargs={"lr": _RUINOUS, "momentum": 0.9}
        )
    return models


def small(name: str) -> list[Model]:
    """Two small models of a family in float32, which go on where they have diverged."""
    models = WORKLOADS[name].build("small")[:2]
    for model in models:
        model.training = replace(model.training, precision="float32", epochs=5, stop_on_nan=False)
    return models


def check_bits(data: GraphData, spoilt: GraphData, device: torch.device) -> dict[str, Any]:
    """Two equal runs give equal bits; a model whose weights become NaN changes no other's.

    Deterministic algorithms are asked for; operators that have none are named, not refused.

    Args:
        data: Of `mixed_models`.
        spoilt: Of the same, one of them ruined.
        device: Where to train.
    """
    whole = mixed_models()
    with _deterministic() as notes:
        first, second = run(data, device), run(data, device)
        beside = run(spoilt, device)
    _refuse_errors(first, second)
    lane = whole[2].model_id
    ids = [model.model_id for model in whole]
    repeated = [i for i in ids if first.digest(i) != second.digest(i)]
    touched = [i for i in ids if i != lane and first.digest(i) != beside.digest(i)]
    diverged = not math.isfinite(beside.rows[lane][-1]["train_loss"])
    return {
        "passed": diverged and not touched and not repeated,
        "models": len(ids),
        "steps": 4 * len(first.rows[lane]),
        "repeat": {"passed": not repeated, "differ": repeated},
        "nan": {"passed": diverged and not touched, "lane": lane, "diverged": diverged,
                "differ": touched},
        "nondeterministic": sorted(notes),
    }  # fmt: skip


@contextmanager
def _deterministic() -> Iterator[set[str]]:
    """Ask for deterministic algorithms; gives what was warned of."""
    before = torch.are_deterministic_algorithms_enabled()
    notes: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield notes
        finally:
            torch.use_deterministic_algorithms(before)
            texts = (str(warning.message) for warning in caught)
            notes |= {text[:200] for text in texts if "deterministic" in text}
