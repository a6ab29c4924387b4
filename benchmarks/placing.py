"""Plans for several devices: seconds to compute, and makespan over its lower bound.

    python benchmarks/placing.py [--models 1000] [--devices 8]

The devices are simulated; the models are captured and merged as for a trial: perceptrons, two sizes
of convolutional networks, encoders, and cell networks that differ from each other, so that one
model's work is up to a hundred times another's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import common

from cgo.bench.families import FAMILIES
from cgo.graph_data import GraphData
from cgo.model import Model
from cgo.passes.place import Target, estimate_needs, place

#: Of the models, in hundredths.
SHARES = {"mlp": 30, "cnn8": 30, "cnn32": 24, "encoders": 14, "cells-different-16": 2}

#: What a device has, in bytes.
MEMORY = 80e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=8)
    options = parser.parse_args()
    common.tuned_process()
    started = time.perf_counter()
    data = common.plan(_models(options.models))
    merged_s = time.perf_counter() - started
    figures = {"target": "under 5 s, makespan within 1.10 of the bound"}
    given = {"models": options.models, "devices": options.devices, "capture_and_merge_s": merged_s}
    common.write("placing", {**figures, **given, **_planned(data, options.devices)})


def _models(count: int) -> list[Model]:
    found: list[Model] = []
    for family, share in SHARES.items():
        for number, model in enumerate(FAMILIES[family](max(1, count * share // 100))):
            given = {"data": model.data, "training": model.training, "seed": model.seed}
            id_ = f"{family}-{number}"  # families name their models alike
            found.append(Model(model.module, model.kwargs, **given, model_id=id_))
    return found[:count]


def _planned(data: GraphData, devices: int) -> dict[str, Any]:
    targets = [Target(f"cuda:{index}", int(MEMORY)) for index in range(devices)]
    started = time.perf_counter()
    needs = estimate_needs(data.graph)
    estimated = time.perf_counter()
    placement = place(data.graph, needs, targets)
    ended = time.perf_counter()
    counts = [list(placement.targets.values()).count(target.name) for target in targets]
    work = [need.work_s for need in needs.values()]
    return {
        "nodes": len(data.graph.nodes),
        "estimate_s": estimated - started,
        "place_s": ended - estimated,
        "makespan_over_bound": placement.makespan_s / placement.bound_s,
        "models_by_device": counts,
        "work_ratio": max(work) / min(work),
    }


if __name__ == "__main__":
    main()
