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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
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
from cgo.zoo import random_cells

LIMIT_S = 10.0
T = TypeVar("T")


def images() -> tuple[Dataset[object], Dataset[object]]:
    """Random images; one shape of training batch, one of validation."""
    x, y = torch.randn(12, 3, 16, 16), torch.randint(0, 10, (12,))
    return TensorDataset(x[:8], y[:8]), TensorDataset(x[8:], y[8:])  # type: ignore[return-value]


def candidates(count: int, cells: int, seed: int = 0) -> list[Model]:
    """`count` different networks, the same in every run."""
    data = DataSpec(f"{Path(__file__).stem}:images", batch_size=8)
    return [
        Model(
            "cgo.zoo:nas_bench_201",
            {"edges": edges, "cells": cells, "inputs": 3},
            data=data,
            training=TrainingSpec(),
            model_id=f"m{index:03}",
        )
        for index, edges in enumerate(random_cells(count, seed))
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
