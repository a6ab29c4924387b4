"""The benchmark behind `cgo bench`: a training step of many models, method against method.

Every method takes the same step: forward, backward and optimizer step of every model, over the same
batches in memory, in one process (but for `processes`), on the same threads. Rounds of all methods
are interleaved; ratios are of the plain serial loop's time to the method's, round by round.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch

from cgo.bench.families import FAMILIES
from cgo.bench.methods import SERIAL, NotApplicable, Steps, all_methods
from cgo.errors import SpecError
from cgo.machine import devices
from cgo.model import Model

#: A round takes as many steps as make up this time in the serial loop.
ROUND_S = 0.25


#: In the first steps methods build what they build lazily; ours records one and checks another.
_FIRST_STEPS = 4


@dataclass(frozen=True)
class Record:
    """What one method took; times in seconds, ratios against the plain serial loop."""

    family: str
    models: int
    method: str
    median_s: float  # of a step of all models
    ratio: float  # above 1: faster than the serial loop
    low: float  # 95% interval of the ratio
    high: float
    setup_s: float  # capture, lowering, compiling: before the first step

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)


def measure(
    family: str,
    count: int,
    *,
    methods: Sequence[str] | None = None,
    rounds: int = 9,
    skipped: Callable[[str, str], None] = lambda method, reason: None,
) -> list[Record]:
    """Measure methods on one family.

    Args:
        family: A name of `FAMILIES`.
        count: Number of models.
        methods: Names; None for all that need no compiler. The serial loop is always among them.
        rounds: Interleaved rounds.
        skipped: Hears the methods that cannot train this family, and why.

    Raises:
        SpecError: an unknown family or method, or too few rounds.
    """
    if rounds < 7:
        raise SpecError(f"rounds: {rounds}; a median needs at least 7")
    models = _models(family, count)
    prepared: dict[str, Steps] = {}
    setup: dict[str, float] = {}
    for name, prepare in _chosen(methods):
        started = time.perf_counter()
        try:
            steps = prepare(models)
            steps(_FIRST_STEPS)
        except NotApplicable as error:
            skipped(name, str(error))
            continue
        prepared[name], setup[name] = steps, time.perf_counter() - started
    times = _rounds(prepared, rounds)
    return [
        Record(family, count, name, statistics.median(times[name]),
               *ratio(times[SERIAL], times[name]), setup[name])
        for name in prepared
    ]  # fmt: skip


def _models(family: str, count: int) -> list[Model]:
    if family not in FAMILIES:
        raise SpecError(f"family: {family!r} is none of {', '.join(FAMILIES)}")
    if count < 1:
        raise SpecError(f"models: {count}; at least one")
    return FAMILIES[family](count)


def _chosen(names: Sequence[str] | None) -> Iterator[tuple[str, Callable[[list[Model]], Steps]]]:
    known = all_methods()
    wanted = names
    if wanted is None:
        wanted = [name for name, method in known.items() if not method.compiles]
    for name in dict.fromkeys((SERIAL, *wanted)):
        if name not in known:
            raise SpecError(f"method: {name!r} is none of {', '.join(known)}")
        yield name, known[name].prepare


def _rounds(prepared: dict[str, Steps], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, by method, one for each round."""
    started = time.perf_counter()
    prepared[SERIAL](1)
    count = max(1, round(ROUND_S / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(rounds):
        for name, steps in prepared.items():
            started = time.perf_counter()
            steps(count)
            times[name].append((time.perf_counter() - started) / count)
    return times


def ratio(serial: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """The median of the ratios serial / other, and its 95% bootstrap interval."""
    return summary([a / b for a, b in zip(serial, other, strict=True)])


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and its 95% bootstrap interval."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def environment() -> dict[str, Any]:
    """When, on which machine and under which versions a record was made."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": devices()[0].name,
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
