"""Plans of the suite's models: captured and merged, with what their steps count; kept in folders.

A plan is kept with a key of all that decides it. One that is there and still fits is read; another
is made anew where plans are made, and where they are only read it is used as long as its models are
the right ones, and said to be of another version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import cgo
import cgo.capture
import cgo.passes
from cgo.bench.methods import NotApplicable
from cgo.graph_data import VERSION, GraphData
from cgo.model import Model, as_json
from cgo.planner import Planner

Emit = Callable[[dict[str, Any]], None]

#: What a plan that is complete is known by; written last.
_FIGURES = "figures.json"

#: Modules of `cgo` beside capture and passes that decide what a plan says, or build its models.
_DECIDING = (
    "planner.py", "graph.py", "graph_data.py", "wire.py", "entries.py", "model.py", "operators.py",
    "weights.py", "zoo.py", "bench/networks.py", "bench/families.py",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a plan is kept, and how it may be made."""

    folder: Path
    processes: int = 1  # that may capture side by side
    renew: bool = False  # make what no longer fits anew, instead of reading it

    def of(self, name: str) -> Place:
        """A place for one of several plans."""
        return replace(self, folder=self.folder / name)


def code_digest() -> str:
    """Of the sources that plan; the same for a checkout and a wheel of it."""
    root = Path(cgo.__file__).parent
    files = {f"cgo/{name}": root / name for name in _DECIDING}
    for package in (cgo.capture, cgo.passes):
        for folder in package.__path__:
            files |= {f"{package.__name__}/{p.name}": p for p in Path(folder).glob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def definition(models: list[Model], tuning: Mapping[str, Any]) -> str:
    """A digest of what is to be planned, whatever code plans it."""
    rows = [
        [m.model_id, m.module, dict(m.kwargs), m.seed, as_json(m.training), as_json(m.data)]
        for m in models
    ]
    text = json.dumps([rows, dict(tuning), VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _nothing(data: GraphData) -> dict[str, Any]:
    return {}


def plan(
    models: list[Model],
    place: Place,
    emit: Emit,
    tuning: Mapping[str, Any] | None = None,
    also: Callable[[GraphData], dict[str, Any]] = _nothing,
) -> GraphData:
    """Capture and merge models, in several processes; or read what was planned before.

    Args:
        models: What to plan.
        place: Where the plan lies, or is to.
        emit: Hears of the plan's figures.
        tuning: Settings of `cgo.Tuning` that the plan carries.
        also: Further figures that are kept with the plan; called when it is made.

    Raises:
        NotApplicable: not all the models could be merged.
        CgoError: there is a plan of other models, which is not to be renewed.
    """
    wanted = {"definition": definition(models, tuning or {}), "code": code_digest()}
    figures = _kept(place, wanted)
    if figures is not None:
        data = GraphData.read(place.folder / "graph.json")
        emit({**figures, "planned_before": True})
        return data
    if place.folder.exists():
        shutil.rmtree(place.folder)
    data, figures = _made(models, place, tuning or {})
    figures |= also(data)
    # Last, and whole: a plan that was broken off has none.
    partial = place.folder / f"{_FIGURES}.part"
    partial.write_text(json.dumps({"key": wanted, **figures}))
    partial.replace(place.folder / _FIGURES)
    emit(figures)
    return data


def _kept(place: Place, wanted: Mapping[str, str]) -> dict[str, Any] | None:
    """Figures of the plan that is there; None where there is none, or none to be read."""
    path = place.folder / _FIGURES
    if not path.exists():
        return None
    figures: dict[str, Any] = json.loads(path.read_text())
    key = figures.pop("key", {})
    if key == wanted:
        return figures
    if place.renew:
        return None
    if key.get("definition") != wanted["definition"]:
        raise cgo.CgoError(f"{place.folder} has a plan of other models; remove it, to plan anew")
    return {**figures, "planned_by_other_code": True}


def _made(
    models: list[Model], place: Place, tuning: Mapping[str, Any]
) -> tuple[GraphData, dict[str, Any]]:
    started, busy = time.perf_counter(), time.process_time()
    planner = Planner()
    _capture_apart(planner, models, place.processes)
    settings = {"tuning": cgo.Tuning(**tuning).as_json()} if tuning else None
    found = planner.plan(models, place.folder, settings)
    report = found.report
    if found.graph_data is None or found.failures or report.opaque:
        raise NotApplicable(f"not merged: {found.failures or report.opaque}")
    return found.graph_data, {
        "plan_s": time.perf_counter() - started, "capture_processes": place.processes,
        "captured": report.captured, "merge_s": report.merge_s,
        "nodes": len(found.graph_data.graph.nodes), "groups": report.groups,
        "stems_shared": report.stems_shared, "plan_cpu_s": time.process_time() - busy,
        "planned_with_torch": torch.__version__,
    }  # fmt: skip


def _capture_apart(planner: Planner, models: list[Model], processes: int) -> None:
    """Capture in other processes, where several are given; equal architectures stay together."""
    processes = min(processes, len(models))
    if processes < 2:
        return
    ordered = sorted(models, key=lambda m: (m.module, json.dumps(m.kwargs, sort_keys=True)))
    ends = [round(i * len(ordered) / processes) for i in range(processes + 1)]
    parts = [list(map(_portable, ordered[a:b])) for a, b in pairwise(ends)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for captured in pool.map(_capture, parts):
            planner.adopt(captured)


def _portable(model: Model) -> tuple[Any, ...]:
    return model.module, model.kwargs, model.data, model.training, model.seed, model.model_id


def _capture(portable: list[tuple[Any, ...]]) -> Any:
    torch.set_num_threads(1)
    planner = Planner()
    planner.capture([
        Model(module, kwargs, data=data, training=training, seed=seed, model_id=id_)
        for module, kwargs, data, training, seed, id_ in portable
    ])  # fmt: skip
    return planner.captured()
