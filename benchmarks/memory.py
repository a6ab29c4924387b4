"""How near the estimated peak of merged training is to the measured one.

    python benchmarks/memory.py [--models 8] [--steps 3]

Measured: all that the CPU's allocator gave at one time, from building the models to the last step,
run plainly. The estimate is of the same choice of forms, and allocates nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch

from cgo.bench.families import FAMILIES
from cgo.graph import restrict
from cgo.graph_data import GraphData
from cgo.runtime.data import Leaves, Loader, open_data
from cgo.runtime.lanes import MergedLanes
from cgo.runtime.member import Member
from cgo.runtime.memory import estimate, measured_peak
from cgo.runtime.tuning import make_tuner
from cgo.tuning import Tuning

_CPU = torch.device("cpu")
_PLAIN = Tuning(measure=False, tape=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    common.tuned_process()
    families = {}
    for name in FAMILIES:
        data = common.plan(FAMILIES[name](options.models))
        if len(data.data) == 1:  # loaders take turns, and leave their models' state behind
            families[name] = _compared(data, options.steps)
    worst = max(abs(row["ratio"] - 1) for row in families.values())
    figures = {"models": options.models, "target": "within 0.15", "worst": worst}
    common.write("memory", {**figures, "families": families})


def _compared(data: GraphData, steps: int) -> dict[str, Any]:
    batches = list(Loader(open_data(next(iter(data.data.values()))), _CPU).train(0))
    estimate(data.graph, _trainings(data))  # what is imported on first use is no model's
    started = time.perf_counter()
    models = tuple(entry.id for entry in data.models)
    choice = make_tuner(_PLAIN, _CPU)(restrict(data.graph, models=set(models)), models)
    chosen = time.perf_counter()
    found = estimate(data.graph, _trainings(data), choice=choice)
    ended = time.perf_counter()
    measured = measured_peak(lambda: _train(data, (batches * steps)[:steps]))
    batch = sum(leaf.numel() * leaf.element_size() for leaf in batches[0][1].values())
    return {
        "estimated_bytes": found.peak,
        "measured_bytes": measured + batch,
        "ratio": found.peak / (measured + batch),
        **{key: getattr(found, key) for key in found.__dataclass_fields__},
        "programs": len(choice.programs),
        "choose_ms_a_model": (chosen - started) * 1e3 / len(models),
        "estimate_ms_a_model": (ended - chosen) * 1e3 / len(models),
    }


def _trainings(data: GraphData) -> dict[str, Any]:
    return {entry.id: entry.training for entry in data.models}


def _train(data: GraphData, batches: Sequence[tuple[int, Leaves]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        members = [
            Member(entry, data, _CPU, Path(folder), lambda event: None) for entry in data.models
        ]
        lanes = MergedLanes(data.graph, members, {}, _CPU, make_tuner(_PLAIN, _CPU))
        ids = [member.id for member in members]
        for size, leaves in batches:
            for member in members:
                member.updater.zero_grad()
            for outcome in lanes.train(ids, leaves, size).values():
                if isinstance(outcome, Exception):
                    raise outcome
            assert not lanes.update(ids)


if __name__ == "__main__":
    main()
