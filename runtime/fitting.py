"""Programs made to fit into the memory that a device has, before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from cgo.graph import ModelId
from cgo.model import TrainingSpec
from cgo.passes.order_nodes import order_nodes
from cgo.runtime.choice import Choice, divided
from cgo.runtime.memory import Cache, Estimate, at_most, estimate


def fit(
    choice: Choice,
    trainings: Mapping[ModelId, TrainingSpec],
    limit_bytes: float,
    device: torch.device,
    tell: Callable[..., None] = lambda what, **figures: None,
    *,
    cache: Cache | None = None,
) -> tuple[Choice, dict[str, int]]:
    """Order nodes, then divide programs, until a step is estimated to fit.

    What cannot be divided further is left as it is: if it does run out of memory, that is found out
    when it runs.

    Args:
        choice: How models are to be executed.
        trainings: By model.
        limit_bytes: Of a step: beside parameters and buffers, which are there already.
        device: Where.
        tell: Hears of the plan, as JSON values.
        cache: Of estimates.

    Returns:
        The choice that fits, and the bytes that a step is to take: `estimated_bytes`, or
        `at_most_bytes` where even a rough bound fits.
    """
    cache = {} if cache is None else cache
    if (most := at_most(choice.graph)) <= limit_bytes:
        bound = {"at_most_bytes": most}
        tell("memory", device=str(device), programs=len(choice.programs), **bound)
        return choice, bound

    def taken(candidate: Choice) -> Estimate:
        return estimate(
            candidate.graph, trainings, choice=candidate, device_type=device.type, cache=cache
        )

    found = taken(choice)
    if _step(found) > limit_bytes:
        ordered = replace(choice, graph=order_nodes(choice.graph))
        better = found if ordered.graph is choice.graph else taken(ordered)
        if better.peak < found.peak:
            choice, found = ordered, better
    most = max(map(len, choice.programs), default=0)
    while _step(found) > limit_bytes and most > 1:
        most = -(-most // 2)
        choice = divided(choice, most)
        found = taken(choice)
    expected = {"estimated_bytes": found.peak}
    limit = int(limit_bytes)
    programs = len(choice.programs)
    tell("memory", device=str(device), programs=programs, **expected, limit_bytes=limit)
    return choice, expected


def _step(found: Estimate) -> int:
    """What is not there yet when programs are chosen."""
    return found.peak - found.parameters - found.buffers
