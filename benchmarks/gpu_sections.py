"""The sections of `gpu_suite.py`: each is prepared without the device, then run on it.

What a section finds it hands to `emit`, part by part, so that an end before its time loses only
what was not yet found.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gpu_equivalence
import gpu_methods
import torch
from gpu_counting import measure_ceilings, synchronize
from gpu_workloads import STORED_EPOCHS, WORKLOADS, Workload, stored
from torch import Tensor

import cgo
from cgo.bench.methods import NotApplicable, Solo, batches_of
from cgo.graph_data import GraphData
from cgo.model import Model
from cgo.planner import Planner

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What all sections are told."""

    device: str  # "cuda", "cpu"
    size: str  # of `gpu_workloads.SIZES`
    folder: Path  # a section's own, for plans
    processes: int = 1  # that may capture side by side
    rounds: int = 5

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True)
class Section:
    """A part of the suite with a time of its own."""

    name: str
    budget_s: float  # from the moment that it may use the device
    prepare: Callable[[Job, Emit], Any]
    run: Callable[[Job, Any, Emit], None]
    timed: bool = True  # nothing else may use the machine meanwhile
    late: bool = False  # prepared only when all others are done: it needs the device for that
    environment: tuple[tuple[str, str], ...] = ()


def _nothing(job: Job, emit: Emit) -> None:
    return None


# --- ceilings and equivalence -------------------------------------------------------------------


def _ceilings(job: Job, prepared: Any, emit: Emit) -> None:
    emit(asdict(measure_ceilings(job.torch_device, reduced=job.size != "full")))


def _equivalence(job: Job, prepared: Any, emit: Emit) -> None:
    """Each family by itself: one that fails hides no other."""
    for name in WORKLOADS:
        emit({name: _attempt(gpu_equivalence.check_family, name, job.folder / name,
                             job.torch_device)})  # fmt: skip
    emit({"bits": _attempt(gpu_equivalence.check_bits, job.folder / "bits", job.torch_device)})


def _attempt(action: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return action(*args)
    except Exception as error:  # recorded, so that the rest is still checked
        return {"passed": False, "error": described(error)}


def described(error: BaseException) -> str:
    """An error as the results file keeps it."""
    return f"{type(error).__name__}: {str(error)[:2000]}"


# --- workloads ------------------------------------------------------------------------------------


def plan(models: list[Model], job: Job, emit: Emit, **tuning: Any) -> GraphData:
    """Capture and merge models, in several processes; or read what was planned before."""
    known, figures = job.folder / "graph.json", job.folder / "figures.json"
    if figures.exists():
        data = GraphData.read(known)
        _refuse_others(models, data, known)
        emit({**json.loads(figures.read_text()), "planned_before": True})
        return data
    started = time.perf_counter()
    planner = Planner()
    _capture_apart(planner, models, job.processes)
    settings = {"tuning": cgo.Tuning(**tuning).as_json()} if tuning else None
    found = planner.plan(models, job.folder, settings)
    if found.graph_data is None or found.failures or found.report.opaque:
        raise NotApplicable(f"not merged: {found.failures or found.report.opaque}")
    report = found.report
    told = {
        "plan_s": time.perf_counter() - started, "capture_processes": job.processes,
        "merge_s": report.merge_s, "nodes": len(found.graph_data.graph.nodes),
        "groups": report.groups, "stems_shared": report.stems_shared,
    }  # fmt: skip
    figures.write_text(json.dumps(told))  # last: a plan that was broken off has none
    emit(told)
    return found.graph_data


def _refuse_others(models: list[Model], data: GraphData, path: Path) -> None:
    """A plan of other models, or of another version of them, is not what is to be measured."""
    wanted = {m.model_id: (m.module, m.kwargs, m.seed, m.training, m.data.digest) for m in models}
    found = {
        entry.id: (entry.factory.target, dict(entry.factory.kwargs), entry.seed, entry.training,
                   entry.data)
        for entry in data.models
        if entry.factory is not None
    }  # fmt: skip
    if wanted != found:
        raise cgo.CgoError(f"{path} is a plan of other models; remove it, to plan anew")


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


def _prepare_workload(name: str) -> Callable[[Job, Emit], GraphData]:
    return lambda job, emit: plan(WORKLOADS[name].build(job.size), job, emit)


def _run_workload(name: str) -> Callable[[Job, GraphData, Emit], None]:
    workload = WORKLOADS[name]

    def run(job: Job, data: GraphData, emit: Emit) -> None:
        models, device = workload.build(job.size), job.torch_device
        sample = gpu_methods.sampled(models, workload.sampled)
        emit({"models": len(models), "sampled": len(sample), "rounds": job.rounds})
        merged = _first_steps(models, data, device, emit)
        methods = {"merged": merged, "eager": gpu_methods.eager(sample, device)}
        try:
            methods["captured"] = gpu_methods.captured(sample, device)
        except Exception as error:  # recorded; merged and eager are measured all the same
            emit({"captured_error": described(error)})
        rows = gpu_methods.times(methods, device, job.rounds)
        emit({"step_s": _scaled(gpu_methods.median(rows), len(models) / len(sample)), "rows": rows})
        del methods, merged
        work = gpu_methods.total_work(workload, models, device)
        emit({"flops": work.flops, "bytes": work.moved, "tf32": tf32(workload)})
        emit({"estimated_peak_bytes": estimated_peak(data, device)})

    return run


def _scaled(medians: dict[str, float], scale: float) -> dict[str, float]:
    """Seconds of a step of all models; solo methods were measured on a sample."""
    return {name: value if name == "merged" else value * scale for name, value in medians.items()}


def tf32(workload: Workload) -> bool:
    """Whether most of the workload's products may be computed in TF32, as torch is set."""
    if workload.images:
        return bool(torch.backends.cudnn.allow_tf32)
    return torch.get_float32_matmul_precision() != "highest"


def _first_steps(
    models: list[Model], data: GraphData, device: torch.device, emit: Emit
) -> gpu_methods.Steps:
    """Build the merged step and warm it up: set-up time, and the peak of memory."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    told: list[dict[str, Any]] = []
    steps = gpu_methods.merged_steps(
        models, device, data, lambda what, **figures: told.append({"what": what, **figures})
    )
    built_s = time.perf_counter() - started
    steps(1)
    synchronize(device)
    emit({"build_s": built_s, "first_step_s": time.perf_counter() - started})
    steps(gpu_methods.WARM_STEPS)
    synchronize(device)
    emit({
        "warm_s": time.perf_counter() - started,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "told": told,
    })  # fmt: skip
    return steps


def estimated_peak(data: GraphData, device: torch.device) -> int | None:
    """What the runtime expects at most, in bytes; None in a version that estimates nothing."""
    try:
        from cgo.runtime.memory import estimate
    except ImportError:
        return None
    trainings = {entry.id: entry.training for entry in data.models}
    return int(estimate(data.graph, trainings, device_type=device.type).peak)


# --- compiled solo models -------------------------------------------------------------------------

#: Models a family that are compiled, at most.
_COMPILED = 3


def _prepare_compiled(name: str) -> Callable[[Job, Emit], Any]:
    def prepare(job: Job, emit: Emit) -> Any:
        sample = gpu_methods.sampled(WORKLOADS[name].build(job.size), _COMPILED)
        emit({"sampled": len(sample)})
        started = time.perf_counter()
        steps = gpu_methods.compiled(sample, job.torch_device)
        steps(2)
        synchronize(job.torch_device)
        emit({"compile_s": time.perf_counter() - started})
        return sample, steps

    return prepare


def _run_compiled(job: Job, prepared: Any, emit: Emit) -> None:
    sample, steps = prepared
    methods = {"compiled": steps, "eager": gpu_methods.eager(sample, job.torch_device)}
    rows = gpu_methods.times(methods, job.torch_device, job.rounds)
    medians = gpu_methods.median(rows)
    emit({"step_s": medians, "over_eager": medians["eager"] / medians["compiled"], "rows": rows})


# --- stored activations ---------------------------------------------------------------------------


def _prepare_stored(job: Job, emit: Emit) -> GraphData:
    settings: dict[str, Any] = {}
    if "store_stems" in inspect.signature(cgo.Tuning).parameters:
        settings["store_stems"] = True
    emit({"store_stems": bool(settings)})
    return plan(stored(job.size), job, emit, **settings)


def _run_stored(job: Job, data: GraphData, emit: Emit) -> None:
    """A whole trial of a few epochs, and the plain loop over a sample of its models."""
    device, models = job.torch_device, stored(job.size)
    sample = gpu_methods.sampled(models, 2)
    emit({"models": len(models), "sampled": len(sample), "epochs": STORED_EPOCHS})
    batches = batches_of(models, device)
    loops = [EpochLoop(model, batches[model.data.digest]) for model in sample]
    for loop in loops:
        loop.epoch()  # to warm up
    merged_s, epochs = _trial_seconds(data, device)
    synchronize(device)
    started = time.perf_counter()
    for loop, _ in product(loops, range(STORED_EPOCHS)):
        loop.epoch()
    synchronize(device)
    serial_s = (time.perf_counter() - started) * len(models) / len(sample)
    emit({
        "serial_s": serial_s, "trial_s": merged_s, "epoch_s": epochs,
        "ratio": serial_s / sum(epochs), "ratio_with_set_up": serial_s / merged_s,
        "ratio_last_epoch": serial_s / STORED_EPOCHS / epochs[-1],
    })  # fmt: skip


def _trial_seconds(data: GraphData, device: torch.device) -> tuple[float, list[float]]:
    """Of a whole trial, set-up and all, and of each of its epochs."""
    started = time.perf_counter()
    found = gpu_equivalence.run(data, device)
    total = time.perf_counter() - started
    if found.errors:
        raise cgo.CgoError(f"models failed: {found.errors}")
    return total, next(iter(found.seconds.values()))


class EpochLoop:
    """One model alone, epoch by epoch: it trains, then evaluates one batch."""

    def __init__(self, model: Model, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._solo, self._batches = Solo(model, batches), batches

    def epoch(self) -> None:
        """Train on all batches, then evaluate as many samples as the trial does."""
        for _ in self._batches:
            self._solo.step()
        modes = [(part, part.training) for part in self._solo.net.modules()]
        self._solo.net.eval()
        with torch.no_grad():
            self._solo.objective(*self._batches[0])
        for part, mode in modes:
            part.training = mode


#: Seconds of the workloads that have most models or most operators.
_BUDGETS = {"narrow": 100.0, "cells": 90.0}


def sections(device: str) -> list[Section]:
    """All of them, in the order of their worth: what may be skipped for want of time is last."""
    deterministic = (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),)
    found = [
        Section("equivalence", 150.0, _nothing, _equivalence, timed=False,
                environment=deterministic),
        Section("ceilings", 20.0, _nothing, _ceilings),
    ]  # fmt: skip
    for name in ("cnn", "heads", "encoders", "wide", "mix", "narrow", "cells"):
        found.append(
            Section(name, _BUDGETS.get(name, 60.0), _prepare_workload(name), _run_workload(name))
        )
    found.append(Section("stored", 45.0, _prepare_stored, _run_stored))
    threads = (("TORCHINDUCTOR_COMPILE_THREADS", "4"),)  # each compiles beside the others
    if device == "cuda":  # on a CPU compiling takes minutes a family
        for name in ("cnn", "encoders", "wide", "heads", "cells", "mix", "narrow"):
            found.append(
                Section(
                    f"compiled:{name}",
                    25.0,
                    _prepare_compiled(name),
                    _run_compiled,
                    late=True,
                    environment=threads,
                )
            )
    return found


#: Shares of the processors for capturing, by what it costs: each model is checked on a CPU.
_SHARES = {"narrow": 0.4, "cells": 0.2, "heads": 0.15, "stored": 0.15}


def processes_for(section: Section, size: str) -> int:
    """Processes that capture for a section."""
    if size != "full":
        return 1
    return max(1, round(_SHARES.get(section.name, 0.0) * (os.cpu_count() or 1)))
