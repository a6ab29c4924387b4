"""The suite's section of whole trials: heads over one trunk whose activations are stored."""

from __future__ import annotations

import time
from typing import Any

import gpu_equivalence
import gpu_methods
import torch
from gpu_counting import synchronize
from gpu_plans import Emit, plan
from gpu_workloads import STORED_EPOCHS, WORKLOADS, stored
from torch import Tensor

import cgo
from cgo.bench.methods import NotApplicable, Solo, batches_of
from cgo.events import Event
from cgo.graph_data import GraphData
from cgo.model import Model

#: Models that the serial loops are measured on.
_SAMPLED = 2


def prepare_stored(job: Any, emit: Emit) -> GraphData:
    """Plan the heads for a training of few epochs."""
    models = stored(job.size)

    def also(data: GraphData) -> dict[str, Any]:
        """What the training computes and moves where the trunk is run once a batch."""
        step = gpu_methods.counted(WORKLOADS["heads"], models, models)
        (batches,) = batches_of(models[:1]).values()
        epoch = step.total + step.trunk * -1
        whole = (epoch * STORED_EPOCHS + step.trunk) * len(batches)
        return {"flops": whole.flops, "bytes": whole.moved, "batches": len(batches)}

    emit({"store_stems": True})
    return plan(models, job.place, emit, {"store_stems": True}, also)


def run_stored(job: Any, data: GraphData, emit: Emit) -> None:
    """Serial loops over a sample of the models, then a whole trial of a few epochs."""
    device, models = job.torch_device, stored(job.size)
    sample = gpu_methods.sampled(models, _SAMPLED)
    scale = len(models) / len(sample)
    emit({"models": len(models), "sampled": len(sample), "epochs": STORED_EPOCHS,
          "tf32": bool(torch.backends.cudnn.allow_tf32)})  # fmt: skip
    emit({"serial_s": scale * _serial_s(sample, device)})
    try:
        emit({"captured_s": scale * _captured_s(sample, device)})
    except NotApplicable as error:
        emit({"captured_error": str(error)})
    epochs: list[float] = []
    first = data.models[0].id

    def heard(event: Event) -> None:
        if event.kind == "epoch" and event.model == first:
            epochs.append(event.value["seconds"])
            emit({"epoch_s": epochs})

    started = time.perf_counter()
    found = gpu_equivalence.run(data, device, heard=heard)
    emit({"trial_s": time.perf_counter() - started})
    if found.errors:
        raise cgo.CgoError(f"models failed: {found.errors}")


def _serial_s(sample: list[Model], device: torch.device) -> float:
    """Of the plain loop over all epochs."""
    batches = batches_of(sample, device)
    loops = [EpochLoop(model, batches[model.data.digest]) for model in sample]
    for loop in loops:
        loop.epoch()  # to warm up
    synchronize(device)
    started = time.perf_counter()
    for loop in loops:
        for _ in range(STORED_EPOCHS):
            loop.epoch()
    synchronize(device)
    return time.perf_counter() - started


def _captured_s(sample: list[Model], device: torch.device) -> float:
    """Likewise of steps captured as CUDA graphs; evaluation, which is not captured, is left out."""
    steps = gpu_methods.captured(sample, device)
    (batches,) = batches_of(sample[:1]).values()
    steps(1)
    synchronize(device)
    started = time.perf_counter()
    steps(STORED_EPOCHS * len(batches))
    synchronize(device)
    return time.perf_counter() - started


class EpochLoop:
    """One model alone, epoch by epoch: it trains, then evaluates one batch."""

    def __init__(self, model: Model, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._solo, self._steps = Solo(model, batches), len(batches)
        self._evaluated = next(self._solo.batches)

    def epoch(self) -> None:
        """Train on all batches, then evaluate as many samples as the trial does."""
        for _ in range(self._steps):
            self._solo.step()
        modes = [(part, part.training) for part in self._solo.net.modules()]
        self._solo.net.eval()
        with torch.no_grad():
            self._solo.objective(*self._evaluated)
        for part, mode in modes:
            part.training = mode
