"""The options of groups with what they cost: known, measured within a budget, or estimated.

On a CPU groups are measured in the order of what they move. On a GPU a budget goes further: groups
are measured in the order of what they may take at most to lose, views and what planned steps do not
repay are not measured at all, and what there was no time for is estimated, by what the device can
do and by how far estimates were off where both are known.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cgo.graph import Node, bytes_of
from cgo.passes.assign_layouts import Option
from cgo.runtime.builder import VMAP
from cgo.runtime.choice import LOOPED, Rules, Way
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import BEHIND, WIDTHS, Timer, shared_inputs
from cgo.runtime.device_profile import DeviceProfile
from cgo.runtime.emitter import Types, operator_of
from cgo.runtime.estimates import (
    Work,
    all_refs,
    is_product,
    is_view,
    largest_bytes,
    largest_elements,
    view_seconds,
    work_of,
)
from cgo.runtime.forms import Form, forms_of
from cgo.runtime.layouts import IMAGES
from cgo.runtime.searching import FOUND, SEARCHED, candidate, searching, worth_searching
from cgo.runtime.triton_kernels import usable
from cgo.tuning import CHANNELS, LANES, STACKED

#: Members of a loop that are timed together on a GPU.
_LOOPED = 8

#: Timed runs of a measurement, and those before.
_RUNS = 9

#: Costs are taken from another size of the same operator where that is so much larger or smaller.
_NEAR = 2.0


@dataclass
class Budget:
    """Seconds that may be spent on measuring, and what was spent."""

    seconds: float
    spent: float = 0.0
    measured: int = 0
    clock: Callable[[], float] = time.perf_counter

    @property
    def left(self) -> bool:
        """Whether more may be measured."""
        return self.spent < self.seconds

    def spend(self, action: Callable[[], float]) -> float:
        """Measure once."""
        started = self.clock()
        try:
            return action()
        finally:
            self.spent += self.clock() - started
            self.measured += 1


#: Groups by name, and options by group.
Groups = Mapping[str, Sequence[Node]]
Options = dict[str, list[Option]]


def by_itself(form: Form) -> bool:
    """Whether a form needs no choice."""
    return not form.chosen


@dataclass
class Measuring:
    """Finds what the options of groups cost on one device.

    Args:
        table: Known costs; measurements are added.
        profile: What the device can do.
        rules: What is fused how wide.
        budget: For measuring.
        steps: Planned; they have to repay a measurement.
        offered: Whether a form is there, on this device.
        search: Whether cuDNN may be asked to time its kernels.
    """

    table: CostTable
    profile: DeviceProfile
    rules: Rules
    budget: Budget
    steps: int
    offered: Callable[[Form], bool] = by_itself
    search: bool = False
    searched: dict[str, float] = field(default_factory=dict)  # groups, and seconds expected of it
    _off: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def _on_cpu(self) -> bool:
        return self.profile.kind == "cpu"

    def options(self, groups: Groups, timers: Sequence[Timer]) -> list[Options]:
        """The options of each group, for each timer: one a format of images in memory."""
        found: list[Options] = [{} for _ in timers]
        self.searched = self._searches(groups, timers)
        for name in self.order(groups, timers[0].types):
            for timer, options in zip(timers, found):
                options[name] = self.of_group(groups[name], timer)
        return found

    def _searches(self, groups: Groups, timers: Sequence[Timer]) -> dict[str, float]:
        """Groups for which cuDNN is to time its kernels; half of the budget may go there."""
        if not self.search:
            return {}
        types, shapes = timers[0].types, len(timers)
        candidates = [
            found
            for name, nodes in groups.items()
            if (found := candidate(name, nodes, types, self.profile, shapes=shapes)) is not None
        ]
        budget_s = (self.budget.seconds - self.budget.spent) / 2
        chosen = worth_searching(candidates, self.profile, self.steps, budget_s)
        return {one.name: one.found_s for one in candidates if one.name in chosen}

    def order(self, groups: Groups, types: Types) -> list[str]:
        """Names of groups; what is measured first is first."""
        if self._on_cpu:
            return sorted(groups, key=lambda name: -_weight(groups[name], types))
        return sorted(groups, key=lambda name: -self._stake(groups[name], types))

    def _stake(self, nodes: Sequence[Node], types: Types) -> float:
        """Seconds of a step that depend on how a group is executed, about.

        How fast a product is depends on which kernel is chosen for its shape; all others move what
        they move.
        """
        work = work_of(nodes[0], types)
        one_by_one = work.seconds(len(nodes), self.profile, fused=False)
        if is_product(nodes[0]):
            return _UNSURE * one_by_one
        return one_by_one - work.seconds(len(nodes), self.profile, fused=True)

    def of_group(self, nodes: Sequence[Node], timer: Timer) -> list[Option]:
        """A group's options; a loop where fusing is none."""
        shared = shared_inputs(nodes)
        # Branches of a single model gain less by being one operator than their gradients lose.
        if (shared and all(shared)) or len(frozenset().union(*(n.owners for n in nodes))) == 1:
            return [Option(LOOPED, LANES, 1, 0.0)]
        if not self._on_cpu and is_view(nodes[0]):
            return self._views(nodes, timer)
        largest = largest_bytes(nodes[0], timer.types)
        found = self._costed(nodes, timer, largest)
        loops = [option for option in found if option.form == LOOPED]
        if not loops or len(loops) == len(found):
            return [self._ruled(nodes, largest)]
        limit = loops[0].seconds * (1 - self.rules.margin / len(nodes))
        return loops + [o for o in found if o.form != LOOPED and o.seconds < limit]

    def _costed(self, nodes: Sequence[Node], timer: Timer, largest: int) -> list[Option]:
        """Each way of executing a group that can be gone, with its cost where that is known."""
        cost = _Cost(self, nodes, timer)
        elements = largest_elements(nodes[0], timer.types)
        found: list[Option] = []
        for form, layout in ways_of(nodes[0], self.offered):
            looped = form == LOOPED
            for width in [1] if looped else self.rules.widths(len(nodes), largest, elements):
                seconds = cost(Way(form, layout), width)
                if seconds is not None and math.isfinite(seconds):
                    found.append(Option(form, layout, width, seconds))
                    cost.best = min(cost.best, seconds)
        return found

    def _views(self, nodes: Sequence[Node], timer: Timer) -> list[Option]:
        """Views cost nothing in a captured step, so that their layout is what their readers want.

        A loop would have its members' values taken apart, and their gradients brought together.
        """
        found = [Option(LOOPED, LANES, 1, 0.0)]
        for form, layout in ways_of(nodes[0])[1:]:
            if timer.applies(nodes, Way(form, layout)):
                seconds = view_seconds(nodes, layout, timer.types, self.profile)
                found.append(Option(form, layout, len(nodes), seconds))
        return found

    def _ruled(self, nodes: Sequence[Node], largest: int) -> Option:
        """What the rules say, where costs are not known."""
        if largest > self.rules.most_lane_bytes:
            return Option(LOOPED, LANES, 1, 0.0)
        form, layout = ways_of(nodes[0])[1]
        return Option(form, layout, len(nodes), 0.0)

    def measured_width(self, width: int, way: Way) -> int:
        """The next smaller of the widths that are measured; costs a member are alike between them.

        A loop's members are timed one by one; on a GPU several, as one takes hardly any time.
        """
        if way.form != LOOPED:
            return max(w for w in WIDTHS if w <= max(width, WIDTHS[0]))
        return 1 if self._on_cpu else min(width, _LOOPED)

    def repays(self, work: Work, members: int) -> bool:
        """Whether planned steps may gain by a measurement what it takes."""
        if self._on_cpu:
            return True
        one_by_one = work.seconds(members, self.profile, fused=False)
        price = self.profile.measure_s + _RUNS * one_by_one
        return self.steps * one_by_one > price

    def found_s(self, nodes: Sequence[Node], option: Option, timer: Timer) -> float | None:
        """Seconds of a group with the kernels that cuDNN once found; None where it never was."""
        key = f"{option.form}/{option.layout}" + "/last" * timer.marked_last + FOUND
        known = self.table.get(timer.signature(nodes), key, option.width)
        return None if known is None else known * len(nodes) / option.width

    def note(self, key: str, measured: float, estimated: float) -> None:
        """Remember how far an estimate was off."""
        if math.isfinite(measured) and estimated > 0:
            self._off[key].append(measured / estimated)

    def corrected(self, key: str, estimated: float) -> float:
        """An estimate, by how far those of its kind were off."""
        return estimated * statistics.median(self._off[key] or [1.0])


#: Times that the kernel chosen for a product may take as long as another.
_UNSURE = 4.0


@dataclass
class _Cost:
    """What a group costs, one way or another."""

    measuring: Measuring
    nodes: Sequence[Node]
    timer: Timer
    best: float = math.inf  # of the ways before

    def __post_init__(self) -> None:
        self.signature = self.timer.signature(self.nodes)
        self._work = work_of(self.nodes[0], self.timer.types)
        repays = self.measuring.repays(self._work, len(self.nodes))
        # Ways are compared with each other: those of one group are all measured, or none.
        self._begun = repays and self.measuring.budget.left
        self._images = any(
            type_ is not None and len(type_.shape) == IMAGES
            for type_ in (self.timer.types[ref] for ref in all_refs(self.nodes[0]))
        )

    def __call__(self, way: Way, width: int) -> float | None:
        """Seconds of the whole group executed one way, so many members at once.

        Of a form that takes over what stands behind, less what that costs by itself.
        """
        form = self._forms.get(way.form)
        if form is None or not form.takes_over:
            return self._seconds(way, width)
        behind = self.timer.behind(self.nodes)
        whole = self._seconds(way, width, behind)
        apart = [_Cost(self.measuring, nodes, self.timer)(BEHIND, width) for nodes in behind]
        if whole is None or None in apart:
            return None
        return max(0.0, whole - sum(seconds for seconds in apart if seconds is not None))

    @property
    def _forms(self) -> Mapping[str, Form]:
        return {form.name: form for form in forms_of(operator_of(self.nodes[0]))}

    def _seconds(self, way: Way, width: int, behind: Sequence[Sequence[Node]] = ()) -> float | None:
        """Seconds of the group, and of groups behind it that are part of this way."""
        of, size = self.measuring, len(self.nodes)
        measured = of.measured_width(size if way.form == LOOPED else width, way)
        key = "+".join([f"{way.form}/{way.layout}", *(n[0].op for n in behind)])
        if self.timer.marked_last and self._images:
            key += "/last"
        expected = of.searched.get(self.nodes[0].group or "", math.inf)
        search = way.form == SEARCHED and expected < self.best
        if search:
            key, measured = key + FOUND, width  # what is found holds for this very shape
        known = of.table.get(self.signature, key, measured)
        if known is None and self._may and not self._is_near(key, measured):
            members = self.nodes[:measured]
            rest = [[nodes[:measured] for nodes in behind]] if behind else []
            if way.form in self._forms and self._forms[way.form].offered is usable:
                self.timer.prepare(members, way, *rest)  # is no part of the budget
            with searching() if search else contextlib.nullcontext():
                known = of.budget.spend(lambda: self.timer.seconds(members, way, *rest))
            of.table.put(self.signature, key, measured, known)
        if known is not None:
            of.note(self._kind(key), known, self._least(way, measured))
            return self._scaled(known, way, measured, width)
        for narrower in (w for w in (1, *WIDTHS)[::-1] if w <= measured):
            if (known := of.table.near(self.signature, key, narrower)) is not None:
                return self._scaled(known, way, narrower, width)
        if way.form in self._forms and self._forms[way.form].chosen:
            return None  # taken where it is known to be faster
        if of.profile.kind == "cpu" or not self.timer.applies(self.nodes[:2], way):
            return None
        parts = -(-size // width) if way.form != LOOPED else 1
        least = parts * self._least(way, min(width, size) if parts > 1 else size)
        return of.corrected(self._kind(key), least)

    @property
    def _may(self) -> bool:
        of = self.measuring
        return of.budget.left if of.profile.kind == "cpu" else self._begun

    def _kind(self, key: str) -> str:
        return f"{operator_of(self.nodes[0])} {key}"

    def _is_near(self, key: str, measured: int) -> bool:
        """Whether about this size has been measured, of an operator that only moves values."""
        of = self.measuring
        if of.profile.kind == "cpu" or is_product(self.nodes[0]):
            return False
        return of.table.is_near(self.signature, key, measured, _NEAR)

    def _least(self, way: Way, members: int) -> float:
        fused = way.form != LOOPED
        return self._work.seconds(members, self.measuring.profile, fused=fused)

    def _scaled(self, known: float, way: Way, measured: int, width: int) -> float:
        """The whole group's cost from that of some members.

        On a GPU launches count once for all members of a fused operator: twice as many members of
        little work take as long.
        """
        size = len(self.nodes)
        if self.measuring.profile.kind == "cpu" or way.form == LOOPED:
            return known / measured * size
        more = self._least(way, width) / max(self._least(way, measured), 1e-12)
        return known * max(1.0, min(more, width / measured)) * size / width


def ways_of(node: Node, offered: Callable[[Form], bool] = by_itself) -> list[tuple[str, str]]:
    """Forms with the layouts that they can have, in the order of preference; a loop first."""
    found: list[tuple[str, str]] = [(LOOPED, LANES)]
    for form in filter(offered, forms_of(operator_of(node))):
        layouts = (STACKED, CHANNELS) if form.layouts == "either" else (form.layouts,)
        found += [(form.name, layout) for layout in layouts]
    if len(found) == 1:
        found.append((VMAP, STACKED))
    return found


def _weight(nodes: Sequence[Node], types: Types) -> int:
    """What is measured first on a CPU: groups that move most."""
    return len(nodes) * sum(bytes_of(types[ref]) for ref in all_refs(nodes[0]))
