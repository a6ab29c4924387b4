"""Which model of a trial is trained on which device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cgo.graph import ModelId
from cgo.graph_data import GraphData, ModelEntry
from cgo.passes.place import Need, Target, estimate_needs, place
from cgo.runtime.accelerator import FILLED, accelerator_for
from cgo.runtime.optimizers import moments_of


@dataclass(frozen=True)
class Places:
    """Where models are trained."""

    devices: Mapping[ModelId, torch.device]
    feeding: bool = False  # stems are computed on one device for models on others, too


def place_models(
    data: GraphData,
    devices: Sequence[torch.device],
    tell: Callable[..., None] = lambda what, **figures: None,
) -> Places:
    """Divide a document's models among devices, by estimated memory and work.

    Args:
        data: The trial's document.
        devices: Where models may go; what other processes use of them is respected.
        tell: Hears of the plan, as JSON values.

    Returns:
        A device for every model. One that seems to fit on none goes to the one with most memory:
        if it does run out there, that is its own failure.
    """
    if len(devices) == 1:
        return Places({entry.id: devices[0] for entry in data.models})
    free = [accelerator_for(device).free_bytes() for device in devices]
    targets = [Target(str(i), int(FILLED * size)) for i, size in enumerate(free)]
    placement = place(data.graph, needs_of(data), targets)
    largest = devices[free.index(max(free))]
    found = {
        entry.id: devices[int(placement.targets[entry.id])]
        if entry.id in placement.targets
        else largest
        for entry in data.models
    }
    tell(
        "placed",
        models=[sum(device == there for there in found.values()) for device in devices],
        makespan_s=placement.makespan_s,
        bound_s=placement.bound_s,
        too_large=dict(placement.unplaced),
        fed=len(placement.feeds),
    )
    return Places(found, bool(placement.feeds))


def needs_of(data: GraphData) -> Mapping[ModelId, Need]:
    """What each model of a document takes."""
    needs = dict(estimate_needs(data.graph))
    held = {entry.id: state_bytes(entry) for entry in data.models}
    needs = {id_: replace(need, state_bytes=held[id_]) for id_, need in needs.items()}
    # An opaque model has no graph to read its work from: it is taken for an average one.
    known = [need.work_s for need in needs.values() if need.work_s]
    average = statistics.mean(known) if known else 1.0
    for entry in data.models:
        if entry.opaque is not None or entry.id not in needs:
            needs[entry.id] = Need(held[entry.id], 0, average)
    return needs


def state_bytes(entry: ModelEntry) -> int:
    """What a model holds all the time it trains: parameters, gradients, moments and buffers."""
    moments = moments_of(entry.training)
    size = 8 if entry.training.precision == "float64" else 4
    found = 0
    for state in entry.state:
        if state.alias_of is None:
            learns = state.kind == "parameter" and state.trainable
            found += int(math.prod(state.shape) * size * (2 + moments if learns else 1))
    return found
