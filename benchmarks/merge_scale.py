"""How long it takes to merge many captured networks: passes, verification, document, report.

    python benchmarks/merge_scale.py [--models 64] [--cells 1] [--json FILE] [--profile]

Captures different NAS-Bench-201-style networks (that time is reported apart), then times what is
done to the merged graph. Exits with status 1 when merging takes 10 s or more.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torchmetrics  # noqa: F401  (validating a document imports it; no part of what is timed)
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from cgo.capture import Capturer, Examples
from cgo.graph import Graph, verify
from cgo.graph_data import GraphData, ModelEntry
from cgo.model import DataSpec, Model, TrainingSpec
from cgo.passes.alias_models import AliasModels
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.pipeline import run_pipeline
from cgo.passes.unmerged import unmerged

LIMIT_S = 10.0
OPERATIONS = ("none", "skip", "conv1", "conv3", "pool")
T = TypeVar("T")


def convolution(channels_in: int, channels: int, size: int, stride: int = 1) -> nn.Module:
    """ReLU, convolution, batch norm: the search space's order."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(channels),
    )


def operation(name: str, channels: int) -> nn.Module | None:
    """What stands on one edge of a cell; None where nothing does."""
    return {
        "none": lambda: None,
        "skip": nn.Identity,
        "conv1": lambda: convolution(channels, channels, 1),
        "conv3": lambda: convolution(channels, channels, 3),
        "pool": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    }[name]()


class Cell(nn.Module):
    """Four values, each the sum of operations on all earlier ones (NAS-Bench-201, ICLR 2020)."""

    def __init__(self, edges: Sequence[str], channels: int) -> None:
        super().__init__()
        names = iter(edges)
        self.edges = nn.ModuleDict()
        for target in range(1, 4):
            for source in range(target):
                found = operation(next(names), channels)
                if found is not None:
                    self.edges[f"{source}_{target}"] = found

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for target in range(1, 4):
            terms = [
                self.edges[f"{source}_{target}"](values[source])
                for source in range(target)
                if f"{source}_{target}" in self.edges
            ]
            values.append(sum(terms) if terms else torch.zeros_like(x))
        return values[-1]


def network(edges: Sequence[str], cells: int = 1, channels: int = 8) -> nn.Module:
    """Stem, three stages of cells with a halving between them, classifier."""
    stages: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    stages.append(nn.BatchNorm2d(channels))
    for stage in range(3):
        stages += [Cell(edges, channels) for _ in range(cells)]
        if stage < 2:
            stages.append(convolution(channels, 2 * channels, 3, stride=2))
            channels *= 2
    return nn.Sequential(*stages, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels, 10))  # fmt: skip


def images() -> tuple[Dataset[object], Dataset[object]]:
    """Random images; one shape of training batch, one of validation."""
    x, y = torch.randn(12, 3, 16, 16), torch.randint(0, 10, (12,))
    return TensorDataset(x[:8], y[:8]), TensorDataset(x[8:], y[8:])  # type: ignore[return-value]


def candidates(count: int, cells: int) -> list[Model]:
    """`count` different networks, the same in every run."""
    generator = random.Random(0)
    chosen: dict[tuple[str, ...], None] = {}
    while len(chosen) < count:
        edges = tuple(generator.choice(OPERATIONS) for _ in range(6))
        if edges.count("none") <= 1:
            chosen[edges] = None
    here = Path(__file__).stem
    data = DataSpec(f"{here}:images", batch_size=8)
    kwargs = [{"edges": list(edges), "cells": cells} for edges in chosen]
    return [
        Model(f"{here}:network", each, data=data, training=TrainingSpec(), model_id=f"m{index}")
        for index, each in enumerate(kwargs)
    ]


def capture(models: Sequence[Model]) -> tuple[list[Graph], list[ModelEntry]]:
    capturer, examples = Capturer(), Examples.of(models[0].data)
    graphs, entries = [], []
    for model in models:
        captured = capturer.capture(model, examples)
        if captured.graph is None:
            raise SystemExit(f"{model.model_id} was not captured: {captured.entry.opaque}")
        graphs.append(captured.graph)
        entries.append(captured.entry)
    return graphs, entries


class Clock:
    """Seconds of each step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, step: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = step()
        self.seconds[name] = time.perf_counter() - start
        return result


def measure(
    graphs: Sequence[Graph], entries: Sequence[ModelEntry], data: DataSpec, clock: Clock
) -> Graph:
    """Everything between capture and the start of the trial."""
    graph = clock.time("merge", lambda: merge(graphs))
    graph = clock.time(
        "passes", lambda: run_pipeline(graph, (dedup_inputs, dedup_stems, AliasModels({})))
    )
    clock.time("verify", lambda: verify(graph))
    clock.time("explain", lambda: unmerged(graph))
    document = GraphData(models=tuple(entries), data={data.digest: data}, graph=graph)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.json"
        clock.time("write", lambda: document.write(path))
        read = clock.time("read", lambda: GraphData.read(path))
    assert read.graph == graph
    return graph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--cells", type=int, default=1, help="cells a stage")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    clock = Clock()
    models = candidates(options.models, options.cells)
    graphs, entries = clock.time("capture", lambda: capture(models))
    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    graph = measure(graphs, entries, models[0].data, clock)
    profile.disable()
    if options.profile:
        profile.print_stats("tottime")
    total = sum(seconds for name, seconds in clock.seconds.items() if name != "capture")
    figures = {
        "models": len(models),
        "nodes": sum(len(one.nodes) for one in graphs),
        "nodes_after": len(graph.nodes),
        "shared_nodes": dict(Counter(n.op for n in graph.nodes if len(n.owners) > 1)),
        "seconds": {name: round(seconds, 4) for name, seconds in clock.seconds.items()},
        "merge_s": round(total, 3),
        "limit_s": LIMIT_S,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if total < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
