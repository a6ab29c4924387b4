"""The choice of how merged models are executed, from measured costs, within a budget of time."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cgo.errors import CgoError
from cgo.graph import Graph, ModelId, Node, Ref, bytes_of, inputs_of, is_training
from cgo.passes.assign_layouts import Assignment, Option, assign_layouts
from cgo.runtime.accelerator import FILLED, accelerator_for, free_memory
from cgo.runtime.builder import VMAP
from cgo.runtime.choice import LOOP, LOOPED, Choice, Improve, Rules, Way, rules_for
from cgo.runtime.compiled import Compiler
from cgo.runtime.costs import (
    WIDTHS,
    CostTable,
    Signature,
    Timer,
    default_path,
    repacking,
)
from cgo.runtime.emitter import Types, operator_of, runs
from cgo.runtime.forms import forms_of
from cgo.runtime.record import Memory, Record
from cgo.runtime.streams import Overlap
from cgo.runtime.tape import Replay, Tape
from cgo.tuning import CHANNELS, LANES, STACKED, Tuning

log = logging.getLogger(__name__)

#: Groups whose values are smaller in all are not divided: they fit into a cache.
_CHUNKED_BYTES = 2**18

#: Members with larger values are not fused more than four wide: nothing was ever gained by it.
_LARGE_BYTES = 2**19

#: What a fused form must save of a loop's time, over the number of members: narrow groups have
#: least to gain, and pay for copies that no measurement of a single group sees.
_MARGIN = 0.5


#: Members of a loop that are timed together on a GPU.
_LOOPED = 8

#: Fewer planned steps do not repay recording one, which costs about as much as ten.
_TAPED_STEPS = 64


@dataclass
class Budget:
    """Seconds that may be spent on measuring, and what was spent."""

    seconds: float
    spent: float = 0.0
    measured: int = 0

    @property
    def left(self) -> bool:
        """Whether more may be measured."""
        return self.spent < self.seconds


#: Chooses how the models of a graph are executed.
Chooser = Callable[[Graph, Sequence[ModelId]], Choice]


class Tuner:
    """Chooses by cost for graphs on one device.

    Args:
        table: Known costs; measurements are added.
        device: Where the models run.
        rules: What is chosen where no cost is known.
        tuning: What may be measured.
        steps: Planned training steps.
        record: Where choices are written to, and found again; None: nowhere.
        tell: Hears of each choice, as JSON values.
    """

    def __init__(
        self,
        table: CostTable,
        device: torch.device,
        rules: Rules,
        tuning: Tuning,
        steps: int = 0,
        record: Record | None = None,
        tell: Callable[..., None] = lambda what, **figures: None,
    ) -> None:
        self.table, self.device, self.rules, self.steps = table, device, rules, steps
        self.tuning, self.record, self.tell = tuning, record, tell
        self.budget = Budget(0.0)
        self.assignment = Assignment({}, 0.0, 0.0)  # the last one

    def close(self) -> None:
        """Close the table of costs."""
        self.table.close()

    def __call__(self, graph: Graph, models: Sequence[ModelId]) -> Choice:
        """Divide models into programs by rule, and decide each group of a training program."""
        rules = Rules() if self.tuning.forced else self.rules
        ruled = rules(graph, models)
        memory = Memory(self.table, ruled, self._asked(), anew=self.tuning.anew)
        found = (None if self.record is None else self.record.find(ruled)) or memory.find()
        if found is None:
            options, last = memory.add(*self._decide(ruled.graph))
        else:
            options, last = found
            memory.add(options, last)
        if self.record is not None:
            self.record.add(ruled, options, last)
        self.tell(
            "tuned",
            groups=len(options),
            programs=len(ruled.programs),
            measured=self.budget.measured,
            seconds=self.budget.spent,
            images_last=last,
            ways=_counted(ruled.graph, options),
        )
        captured = self._captured()
        compiler = Compiler(
            None if self.tuning.compile is None else bool(self.tuning.compile),
            self.steps,
            memory.compiled(self.record),
            memory.settling(self.record),
            self.tell,
            accelerator_for(self.device) if captured else None,
        )
        improve: Improve = compiler
        if captured:
            overlap = Overlap(accelerator_for(self.device), self.tell)
            improve = _first_of(compiler, overlap)
        taped = self._taped(captured)
        return replace(
            _applied(ruled, options),
            taped=taped,
            improve=improve,
            kernels=self.tuning.kernels,
            captured=captured,
            images_last=last,
            limit_bytes=self._limit_bytes(),
            recompute=self.tuning.checkpoint,
        )

    def _asked(self) -> list[Any]:
        """What a choice depends on beside the graph: how long is trained, and the settings."""
        return [self.steps, {k: v for k, v in self.tuning.as_json().items() if k != "anew"}]

    def _limit_bytes(self) -> float:
        if self.tuning.memory_bytes is not None:
            return self.tuning.memory_bytes
        if self.device.type == "cpu":
            return math.inf
        return FILLED * free_memory(self.device)

    def _captured(self) -> bool:
        if self.tuning.capture is not None:
            return self.tuning.capture
        return self.device.type == "cuda" and self.steps >= _TAPED_STEPS

    def _taped(self, captured: bool) -> bool:
        if self.tuning.checkpoint:
            return False
        if self.tuning.tape is not None:
            return self.tuning.tape
        return captured or self.steps >= _TAPED_STEPS

    def _decide(self, graph: Graph) -> tuple[Mapping[str, Option], bool | None]:
        """Each group's option, and whether images have channels last: measured, but on a CPU."""
        if not self.budget.seconds:
            seconds = self.tuning.budget_s(self.steps * _step_s(graph))
            # Steps take longer on a CPU, which the estimate is of.
            most = math.inf if self.device.type == "cpu" else self.tuning.most_s
            self.budget.seconds = min(seconds, most)
        last: bool | None = None
        self.assignment = self._assignment(graph, last)
        if self.device.type != "cpu" and self.budget.left and _convolves(graph):
            other = self._assignment(graph, True)
            if other.seconds < self.assignment.seconds:
                self.assignment, last = other, True
        return self.assignment.options, last

    def _assignment(self, graph: Graph, last: bool | None) -> Assignment:
        groups: dict[str, list[Node]] = {}
        for members in runs(graph.nodes):
            name = members[0].group
            if name is not None and len(members) > 1 and is_training(members[0]):
                groups[name] = members
        timer = Timer(self.device, graph, images_last=last)
        options: dict[str, list[Option]] = {}
        decide = self._forced if self.tuning.forced else self._options
        for name in sorted(groups, key=lambda name: -_weight(groups[name], timer.types)):
            options[name] = decide(groups[name], timer)
        moving = repacking(self.table, self.device, measure=self.tuning.measure)
        return assign_layouts(graph, options, moving)

    def _options(self, nodes: Sequence[Node], timer: Timer) -> list[Option]:
        shared = [len(set(column)) == 1 for column in zip(*map(inputs_of, nodes))]
        # Branches of a single model gain less by being one operator than their gradients lose.
        if (shared and all(shared)) or len(frozenset().union(*(n.owners for n in nodes))) == 1:
            return [Option(LOOPED, LANES, 1, 0.0)]
        signature = timer.signature(nodes, shared)
        size = len(nodes)
        largest = max((bytes_of(timer.types[ref]) for ref in _all_refs(nodes[0])), default=0)
        found: list[Option] = []
        for form, layout in _ways(nodes[0]):
            for width in self._widths(size, largest, form):
                seconds = self._cost(signature, nodes, Way(form, layout), width, timer)
                if seconds is not None and math.isfinite(seconds):
                    found.append(Option(form, layout, width, seconds))
        loops = [option for option in found if option.form == LOOPED]
        if not loops or len(loops) == len(found):
            return [self._ruled(nodes, largest)]
        limit = loops[0].seconds * (1 - _MARGIN / size)
        return loops + [o for o in found if o.form != LOOPED and o.seconds < limit]

    def _widths(self, size: int, largest: int, form: str) -> list[int]:
        if form == LOOPED:
            return [1]
        if self.device.type != "cpu":  # what narrower groups gain is a CPU's cache
            return [size]
        chunks = [w for w in (2, 4, 8) if w < size and largest * size > _CHUNKED_BYTES]
        return chunks if largest > _LARGE_BYTES and chunks else [*chunks, size]

    def _measured_width(self, width: int, way: Way) -> int:
        """The next smaller of the widths that are measured; costs a member are alike between them.

        A loop's members are timed one by one; on a GPU several, as one takes hardly any time.
        """
        if way.form != LOOPED:
            return max(w for w in WIDTHS if w <= max(width, WIDTHS[0]))
        return 1 if self.device.type == "cpu" else min(width, _LOOPED)

    def _forced(self, nodes: Sequence[Node], timer: Timer) -> list[Option]:
        width = min(self.tuning.width or len(nodes), len(nodes))
        layout = self.tuning.layout
        if layout == LANES or width == 1:
            return [Option(LOOPED, LANES, 1, 0.0)]
        ways = _ways(nodes[0])[1:]
        form, found = next((way for way in ways if way[1] == layout), ways[0])
        return [Option(form, found, width, 0.0)]

    def _cost(
        self, signature: Signature, nodes: Sequence[Node], way: Way, width: int, timer: Timer
    ) -> float | None:
        """Seconds of a whole group executed one way, so many members at once."""
        measured = self._measured_width(len(nodes) if way.form == LOOPED else width, way)
        key = f"{way.form}/{way.layout}" + ("/last" if timer.marked_last else "")
        known = self.table.get(signature, key, measured)
        if known is None and self.budget.left:
            started = time.perf_counter()
            known = timer.seconds(nodes[:measured], way)
            self.table.put(signature, key, measured, known)
            self.budget.spent += time.perf_counter() - started
            self.budget.measured += 1
        if known is not None:
            return known / measured * len(nodes)
        for narrower in (w for w in (1, *WIDTHS)[::-1] if w <= measured):
            if (known := self.table.near(signature, key, narrower)) is not None:
                return known / narrower * len(nodes)
        return None

    def _ruled(self, nodes: Sequence[Node], largest: int) -> Option:
        """What the rules say, where costs are not known."""
        if largest > self.rules.most_lane_bytes:
            return Option(LOOPED, LANES, 1, 0.0)
        form, layout = _ways(nodes[0])[1]
        return Option(form, layout, len(nodes), 0.0)


def _first_of(*ways: Improve) -> Improve:
    """What the first of several ways to improve a step makes of it."""

    def improve(
        name: str, tape: Tape, replay: Replay, inputs: Sequence[torch.Tensor]
    ) -> Replay | None:
        for way in ways:
            if (found := way(name, tape, replay, inputs)) is not None:
                return found
        return None

    return improve


#: Rough costs of a training step, to plan with: seconds for a node, and for a byte that it gives.
_NODE_S = 2e-5
_BYTE_S = 2e-9


def _convolves(graph: Graph) -> bool:
    return any("convolution" in node.op or "conv2d" in node.op for node in graph.nodes)


def _step_s(graph: Graph) -> float:
    """About what a step of the graph's models takes."""
    found = [node for node in graph.nodes if is_training(node)]
    size = sum(bytes_of(type_) for node in found for type_ in node.types)
    return _NODE_S * len(found) + _BYTE_S * size


def make_tuner(tuning: Tuning, device: torch.device, steps: int = 0, **rest: Any) -> Tuner:
    """A tuner with the user's own table of costs.

    Args:
        tuning: The settings.
        device: Where the models run.
        steps: Planned training steps.
        rest: Further arguments of `Tuner`.
    """
    try:
        table = CostTable(default_path() if tuning.measure else None, device)
    except CgoError as error:  # slower to begin with, but no reason not to train
        log.warning("%s", error)
        table = CostTable(None, device)
    return Tuner(table, device, rules_for(device), tuning, steps, **rest)


def _applied(ruled: Choice, options: Mapping[str, Option]) -> Choice:
    """The graph with groups named as they are to be executed."""
    ways: dict[str, Way] = {}
    nodes: list[Node] = []
    for members in runs(ruled.graph.nodes):
        name = members[0].group
        option = options.get(name or "")
        if name is None or option is None:
            nodes += members
            continue
        plain = name.removesuffix(LOOP)
        if option.form == LOOPED:
            nodes += [replace(node, group=plain + LOOP) for node in members]
            continue
        for start in range(0, len(members), option.width):
            part = members[start : start + option.width]
            own = plain if option.width >= len(members) else f"{plain}/{start // option.width}"
            ways[own] = Way(option.form, option.layout)
            nodes += [replace(n, group=own if len(part) > 1 else None) for n in part]
    return Choice(Graph(tuple(nodes), ruled.graph.outputs), ruled.programs, ways)


def _counted(graph: Graph, options: Mapping[str, Option]) -> dict[str, int]:
    """How many groups of each operator are executed each way."""
    operators = {node.group: operator_of(node) for node in graph.nodes if node.group in options}
    ways = (
        f"{operators[name]}: {option.form}" + f", {option.layout}" * (option.form != LOOPED)
        for name, option in options.items()
    )
    return dict(Counter(ways).most_common())


def _all_refs(node: Node) -> list[Ref]:
    return [*inputs_of(node), *(Ref(node.name, index) for index in range(len(node.types)))]


def _weight(nodes: Sequence[Node], types: Types) -> int:
    """What is measured first: groups that move most."""
    return len(nodes) * sum(bytes_of(types[ref]) for ref in _all_refs(nodes[0]))


def _ways(node: Node) -> list[tuple[str, str]]:
    """Forms with the layouts that they can have, in the order of preference; a loop first."""
    found: list[tuple[str, str]] = [(LOOPED, LANES)]
    for form in forms_of(operator_of(node)):
        layouts = (STACKED, CHANNELS) if form.layouts == "either" else (form.layouts,)
        found += [(form.name, layout) for layout in layouts]
    if len(found) == 1:
        found.append((VMAP, STACKED))
    return found
