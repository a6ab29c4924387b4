"""A tuner for a CUDA device that is not there: estimates are its measurements, by a clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from cgo.graph import Node
from cgo.runtime.choice import LOOPED, Rules, Way, rules_for
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import Timer
from cgo.runtime.device_profile import DeviceProfile, prior
from cgo.runtime.emitter import operator_of
from cgo.runtime.estimates import work_of
from cgo.runtime.forms import forms_of
from cgo.runtime.tuning import Tuner
from cgo.tuning import Tuning

GPU = torch.device("cuda:0")  # with a number, torch does not ask for the current one
H100 = replace(prior("NVIDIA H100 80GB HBM3", (9, 0), 132), source="measured")


@dataclass
class Clock:
    """Seconds that measurements took, and what was measured."""

    price_s: float = 0.01
    now: float = 0.0
    asked: list[tuple[Node, Way, int, bool]] = field(default_factory=list)
    searched: list[tuple[str, str]] = field(default_factory=list)  # by cuDNN: groups, and forms

    def __call__(self) -> float:
        return self.now

    @property
    def groups(self) -> list[str]:
        """In the order in which they were first measured."""
        return list(dict.fromkeys(str(node.group) for node, *_ in self.asked))


class SimulatedTimer(Timer):
    """Gives estimates, times a factor by form."""

    def __init__(self, clock: Clock, factors: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock, self._factors = clock, factors

    def seconds(
        self, nodes: Sequence[Node], way: Way, behind: Sequence[Sequence[Node]] = ()
    ) -> float:
        self._clock.now += self._clock.price_s
        self._clock.asked.append((nodes[0], way, len(nodes), self.marked_last))
        if torch.backends.cudnn.benchmark:
            self._clock.searched.append((str(nodes[0].group), way.form))
        chosen = {form.name for form in forms_of(operator_of(nodes[0])) if form.chosen}
        if not self.applies(nodes, way) or (way.form in chosen and way.form not in self._factors):
            return math.inf
        least = work_of(nodes[0], self.types).seconds(len(nodes), H100, fused=way.form != LOOPED)
        factor = self._factors.get("last" if self.marked_last else way.form, 1.0)
        return max(1e-6, least * factor)

    def prepare(
        self, nodes: Sequence[Node], way: Way, behind: Sequence[Sequence[Node]] = ()
    ) -> None:
        """Nothing is compiled here."""

    def repacked(self, kind: str, size: int) -> float:
        return 1e-6 * size


def simulated(
    clock: Clock,
    tuning: Tuning | None = None,
    *,
    steps: int = 10**6,
    rules: Rules | None = None,
    profile: DeviceProfile = H100,
    table: CostTable | None = None,
    factors: dict[str, float] | None = None,
) -> Tuner:
    """A tuner for the device; nothing is allocated there."""
    tuning = replace(tuning or Tuning(), memory_bytes=2**36)
    return Tuner(
        CostTable(None, GPU, key="simulated") if table is None else table,
        GPU,
        rules_for(GPU) if rules is None else rules,
        tuning,
        steps,
        profile=profile,
        timing=partial(SimulatedTimer, clock, factors or {}),
        separates=True,
        clock=clock,
    )
