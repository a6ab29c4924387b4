"""The sections of `gpu_suite.py`: each is prepared without the device, then run on it.

What a section finds it hands to `emit`, figure by figure, so that an end before its time loses only
what was not yet found: baselines first, then the merged step, then rounds of all in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import gpu_equivalence
import gpu_methods
import torch
from gpu_counting import measure_ceilings, synchronize
from gpu_plans import Emit, Place, plan
from gpu_stored import prepare_stored, run_stored
from gpu_workloads import WORKLOADS, Workload

import cgo
from cgo.graph_data import GraphData
from cgo.model import Model
from cgo.runtime.memory import estimate


@dataclass(frozen=True)
class Job:
    """What all sections are told."""

    device: str  # "cuda", "cpu"
    size: str  # of `gpu_workloads.SIZES`
    place: Place  # a section's own, for plans
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
    plans: bool = True  # its preparing is planning, which needs no device and may be done before
    environment: tuple[tuple[str, str], ...] = ()


def _nothing(job: Job, emit: Emit) -> None:
    return None


def described(error: BaseException) -> str:
    """An error as the results file keeps it."""
    return f"{type(error).__name__}: {str(error)[:2000]}"


# --- ceilings and equivalence -------------------------------------------------------------------


def _ceilings(job: Job, prepared: Any, emit: Emit) -> None:
    emit(asdict(measure_ceilings(job.torch_device, reduced=job.size != "full")))


def _plan_equivalence(job: Job, emit: Emit) -> dict[str, GraphData | Exception]:
    """Documents by name, or why there is none: one family that fails hides no other."""
    found: dict[str, GraphData | Exception] = {}
    figures: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for name, models in gpu_equivalence.checked_models().items():
        figures[name] = {}
        try:
            tuning = gpu_equivalence.TUNING
            found[name] = plan(models, job.place.of(name), figures[name].update, tuning)
        except Exception as error:  # recorded when the family's turn comes
            found[name] = error
    before = all(figure.get("planned_before") for figure in figures.values())
    emit({"plan_s": time.perf_counter() - started, "planned_before": before})
    if job.place.renew and (wrong := [e for e in found.values() if isinstance(e, Exception)]):
        raise wrong[0]
    return found


def _equivalence(job: Job, documents: dict[str, GraphData | Exception], emit: Emit) -> None:
    """What may cross from one model into another first, then each family by itself.

    Raises:
        CgoError: something is not equal, or could not be compared.
    """

    def document(name: str) -> GraphData:
        found = documents[name]
        if isinstance(found, Exception):
            raise found
        return found

    def bits() -> dict[str, Any]:
        whole, ruined = document("whole"), document("ruined")
        return gpu_equivalence.check_bits(whole, ruined, job.torch_device)

    def family(name: str) -> dict[str, Any]:
        return gpu_equivalence.check_family(name, document(name), job.torch_device)

    found = {"bits": _attempt(bits)}
    emit(found)
    for name in WORKLOADS:
        found[name] = _attempt(lambda name=name: family(name))
        emit({name: found[name]})
    if wrong := [name for name, figures in found.items() if not figures["passed"]]:
        raise cgo.CgoError(f"not equal to training alone: {', '.join(wrong)}")


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        found = action()
    except Exception as error:  # recorded, so that the rest is still checked
        found = {"passed": False, "error": described(error)}
    return {**found, "seconds": time.perf_counter() - started}


# --- workloads ------------------------------------------------------------------------------------


def _prepare_workload(name: str) -> Callable[[Job, Emit], GraphData]:
    workload = WORKLOADS[name]

    def prepare(job: Job, emit: Emit) -> GraphData:
        models = workload.build(job.size)

        def also(data: GraphData) -> dict[str, Any]:
            found = gpu_methods.counted(workload, models, _sample(workload, models))
            return {
                "flops": found.total.flops, "bytes": found.total.moved, "calls": found.total.calls,
                "scale": found.scale, "estimated_peak_bytes": _estimated_peak(data),
            }  # fmt: skip

        return plan(models, job.place, emit, also=also)

    return prepare


def _sample(workload: Workload, models: list[Model]) -> list[Model]:
    return gpu_methods.sampled(models, workload.sampled)


def _estimated_peak(data: GraphData) -> int:
    """What the runtime expects a step to take on a GPU at most, by rules, in bytes."""
    trainings = {entry.id: entry.training for entry in data.models}
    return int(estimate(data.graph, trainings, device_type="cuda").peak)


def _run_workload(name: str) -> Callable[[Job, GraphData, Emit], None]:
    workload = WORKLOADS[name]

    def run(job: Job, data: GraphData, emit: Emit) -> None:
        models, device = workload.build(job.size), job.torch_device
        sample = _sample(workload, models)
        emit({"models": len(models), "sampled": len(sample), "tf32": tf32(workload)})
        rows: dict[str, list[float]] = {}

        def heard(found: dict[str, list[float]]) -> None:
            rows.update(found)
            emit({"rows": rows})

        methods = {"eager": gpu_methods.eager(sample, device)}
        gpu_methods.times(methods, device, 1, heard)
        try:
            captured = gpu_methods.captured(sample, device)
            gpu_methods.times({"captured": captured}, device, 1, heard)
            methods["captured"] = captured
        except Exception as error:  # recorded; the others are measured all the same
            emit({"captured_error": described(error)})
        methods["merged"] = _first_steps(models, data, device, emit)
        gpu_methods.times({"merged": methods["merged"]}, device, 1, heard)
        gpu_methods.times(methods, device, job.rounds, heard)
        if device.type == "cuda" and "captured" not in methods:
            raise cgo.CgoError("the baseline of CUDA graphs could not be captured")

    return run


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
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)  # of the baselines
    started = time.perf_counter()
    told: list[dict[str, Any]] = []

    def tell(what: str, **figures: Any) -> None:
        told.append({"what": what, "at_s": time.perf_counter() - started, **figures})
        emit({"told": told})

    steps = gpu_methods.merged_steps(models, device, data, tell)
    emit({"build_s": time.perf_counter() - started})
    steps(1)
    synchronize(device)
    emit({"first_step_s": time.perf_counter() - started})
    steps(gpu_methods.WARM_STEPS)
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    emit({"warm_s": time.perf_counter() - started, "peak_bytes": peak})
    return steps


# --- compiled solo models -------------------------------------------------------------------------

#: Models a family that are compiled: of several kinds where there are some and compiling is quick.
_COMPILED = {"mix": 3, "encoders": 2}

#: Compiling one takes a C++ compiler minutes, however small it is.
_TOO_LONG_ON_CPU = {"cells"}


def _prepare_compiled(name: str) -> Callable[[Job, Emit], Any]:
    def prepare(job: Job, emit: Emit) -> Any:
        count = _COMPILED.get(name, 1) if job.size == "full" else 1
        sample = gpu_methods.sampled(WORKLOADS[name].build(job.size), count)
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

    def heard(rows: dict[str, list[float]]) -> None:
        medians = gpu_methods.median(rows)
        emit({"rows": rows, "over_eager": medians["eager"] / medians["compiled"]})

    gpu_methods.times(methods, job.torch_device, job.rounds, heard)


# --- all of them ----------------------------------------------------------------------------------

#: Seconds of sections: what they took on a device, and half as much again. On a CPU, where the
#: suite shows that it runs, they only end what hangs.
_BUDGETS = {
    "equivalence": 100.0, "ceilings": 10.0, "cnn": 20.0, "heads": 25.0, "encoders": 30.0,
    "wide": 20.0, "mix": 30.0, "narrow": 75.0, "cells": 60.0, "stored": 40.0,
}  # fmt: skip
_COMPILED_S = 12.0
_CPU_S = 300.0


def sections(device: str) -> list[Section]:
    """All of them, in the order of their worth: what may be skipped for want of time is last."""
    deterministic = (("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),)
    budgets = _BUDGETS if device == "cuda" else dict.fromkeys(_BUDGETS, _CPU_S)
    found = [
        Section("equivalence", budgets["equivalence"], _plan_equivalence, _equivalence,
                timed=False, environment=deterministic),
        Section("ceilings", budgets["ceilings"], _nothing, _ceilings, plans=False),
    ]  # fmt: skip
    for name in WORKLOADS:
        found.append(Section(name, budgets[name], _prepare_workload(name), _run_workload(name)))
    found.append(Section("stored", budgets["stored"], prepare_stored, run_stored))
    threads = (("TORCHINDUCTOR_COMPILE_THREADS", "4"),)  # each compiles beside the others
    on_cpu = [name for name in WORKLOADS if name not in _TOO_LONG_ON_CPU]
    for name in WORKLOADS if device == "cuda" else on_cpu:
        found.append(
            Section(
                f"compiled:{name}",
                _COMPILED_S if device == "cuda" else _CPU_S,
                _prepare_compiled(name),
                _run_compiled,
                plans=False,
                environment=threads,
            )
        )
    return found


#: Shares of the processors for capturing, by what it costs: each model is checked on a CPU.
_SHARES = {"narrow": 0.4, "cells": 0.2, "heads": 0.15, "stored": 0.15}


def processes_for(name: str, size: str) -> int:
    """Processes that capture for a section."""
    if size != "full":
        return 1
    return max(1, round(_SHARES.get(name, 0.0) * (os.cpu_count() or 1)))
