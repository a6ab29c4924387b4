"""The choice of how merged models are executed, from measured costs, within a budget of time."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cgo.errors import CgoError
from cgo.graph import Graph, ModelId, Node, bytes_of, is_training
from cgo.passes.assign_layouts import Assignment, Option, assign_layouts
from cgo.runtime.accelerator import FILLED, accelerator_for, free_memory
from cgo.runtime.artifacts import default_artifacts
from cgo.runtime.choice import LOOP, LOOPED, Choice, Improve, Rules, Way, rules_for
from cgo.runtime.compiled import Compiler, Compilers
from cgo.runtime.cost_table import CostTable, default_path
from cgo.runtime.costs import Repacking, Timer, repacking
from cgo.runtime.device_profile import DeviceProfile, measure, profile_of
from cgo.runtime.emitter import Types, operator_of, runs
from cgo.runtime.estimates import estimated_repacking, work_of
from cgo.runtime.forms import Form, all_forms, forms_of
from cgo.runtime.isolation import Separation
from cgo.runtime.measuring import Budget, Groups, Measuring, Options, ways_of
from cgo.runtime.record import Memory, Record
from cgo.runtime.searching import SEARCHED, candidate, may_search, searching, worth_searching
from cgo.runtime.streams import Overlap
from cgo.runtime.tape import Replay, Tape
from cgo.runtime.taped import Later
from cgo.runtime.triton_kernels import usable
from cgo.runtime.verdicts import Verdicts
from cgo.tuning import LANES, Tuning

log = logging.getLogger(__name__)

#: Fewer planned steps do not repay recording one, which costs about as much as ten.
_TAPED_STEPS = 64


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
        profile: What the device can do; default is as it was measured before, or is published.
        timing: Makes what measures groups; called as `Timer` is.
        separates: Whether the device's kernels are known to keep the members of a group apart;
            default is what its accelerator says.
        clock: Seconds, by which measuring is kept within its budget.
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
        *,
        profile: DeviceProfile | None = None,
        timing: Callable[..., Timer] = Timer,
        separates: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.table, self.device, self.rules, self.steps = table, device, rules, steps
        self.tuning, self.record, self.tell = tuning, record, tell
        self.profile = profile_of(device, table) if profile is None else profile
        self.timing = timing
        self._separates = separates
        self.budget = Budget(0.0, clock=clock)
        self.assignment = Assignment({}, 0.0, 0.0)  # the last one
        self._compiles: Compilers | None = None

    @property
    def separates(self) -> bool:
        """Whether the device's kernels are known to keep the members of a group apart."""
        if self._separates is None:
            return accelerator_for(self.device).separates
        return self._separates

    @property
    def measuring(self) -> Measuring:
        """Finds what the options of groups cost."""
        search = may_search(self.tuning.search, self.device)
        rest = self.budget, self.steps, self._offered, search
        return Measuring(self.table, self.profile, self.rules, *rest)

    def _offered(self, form: Form) -> bool:
        """Whether a form is measured: kernels on a CPU are run by an interpreter, for tests."""
        if form.offered is None:
            return True
        return self.device.type != "cpu" and form.offered(self.device, self.tuning.kernels)

    def close(self) -> None:
        """Close the table of costs, and end what is compiled for nobody any more."""
        self.table.close()
        if self._compiles is not None:
            self._compiles.close()

    def _compilers(self) -> Compilers:
        """Made where something is compiled; raises `ArtifactError`."""
        if self._compiles is None:
            self._compiles = Compilers(default_artifacts(), waited=bool(self.tuning.compile))
        return self._compiles

    def __call__(self, graph: Graph, models: Sequence[ModelId]) -> Choice:
        """Divide models into programs by rule, and decide each group of a training program."""
        rules = Rules() if self.tuning.forced else self.rules
        ruled = rules(graph, models)
        memory = Memory(self.table, ruled, self._asked(), anew=self.tuning.anew)
        found = (None if self.record is None else self.record.find(ruled)) or memory.find()
        options, last = self._decide(ruled.graph) if found is None else found
        if found is not None:
            self._search_again(ruled.graph, options, last)
        options = self._allowed(options)
        if not self.separates:
            timer = self._timer(ruled.graph, last)
            options = Separation(self.table, self.tell).options(ruled.graph, options, timer)
        options, last = memory.add(options, last)
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
            self._compilers,
            Verdicts(self.table, anew=self.tuning.anew),
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
            whole=taped and self.device.type == "cpu" and self.tuning.capture is None,
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
        groups = _groups(graph)
        timers = [self._timer(graph, None)]
        if not self.budget.seconds:
            self.budget.seconds = self._budget_s(graph, groups, timers[0].types)
        self._profile()
        if self.device.type != "cpu" and self.budget.left and _convolves(graph):
            timers.append(self._timer(graph, True))
        moving = self._repacking(timers[0])
        found = self._options(groups, timers)
        assigned = [assign_layouts(graph, options, moving) for options in found]
        best = min(range(len(timers)), key=lambda index: assigned[index].seconds)
        self.assignment = assigned[best]
        return self.assignment.options, True if best else None

    def _options(self, groups: Groups, timers: Sequence[Timer]) -> list[Options]:
        if self.tuning.forced:
            found = [{n: self._forced(groups[n], timer) for n in groups} for timer in timers]
        else:
            found = self.measuring.options(groups, timers)
        if self.tuning.kernels and self.device.type == "cpu":
            wanted = {name: self._interpreted(nodes) for name, nodes in groups.items()}
            return [options | {n: o for n, o in wanted.items() if o} for options in found]
        return found

    def _allowed(self, options: Mapping[str, Option]) -> Mapping[str, Option]:
        """A record's options; groups are executed by rule where these are of forbidden kernels."""
        if self.tuning.kernels is not False:
            return options
        forbidden = {form.name for form in all_forms() if form.offered is usable}
        return {name: o for name, o in options.items() if o.form not in forbidden}

    def _interpreted(self, nodes: Sequence[Node]) -> list[Option]:
        """The kernel that was asked for, by Triton's interpreter."""
        asked = self.device, self.tuning.kernels
        width = min(self.tuning.width or len(nodes), len(nodes))
        looped = self.tuning.layout == LANES or width == 1
        forms = () if looped else forms_of(operator_of(nodes[0]))
        return [
            Option(form.name, form.layouts, width, 0.0)
            for form in forms
            if form.offered is usable and form.offered(*asked)
        ]

    def _timer(self, graph: Graph, last: bool | None) -> Timer:
        return self.timing(self.device, graph, images_last=last)

    def _repacking(self, timer: Timer) -> Repacking:
        """What moving values costs; on a GPU it is measured within the budget."""
        if self.device.type == "cpu":
            return repacking(self.table, self.device, measure=self.tuning.measure)

        def timed(kind: str, size: int) -> float:
            return self.budget.spend(lambda: timer.repacked(kind, size))

        if not self.budget.left:
            return estimated_repacking(self.profile)
        return repacking(self.table, self.device, timing=timed)

    def _profile(self) -> None:
        """Measure the device, where that was not done yet and the budget is long enough."""
        if self.profile.source != "published" or self.budget.seconds < _PROFILED_S:
            return
        started = self.budget.clock()
        measured = partial(measure, accelerator_for(self.device))
        self.profile = profile_of(self.device, self.table, measured)
        self.budget.spent += self.budget.clock() - started
        self.tell("device", **self.profile.as_json())

    def _budget_s(self, graph: Graph, groups: Groups, types: Types) -> float:
        """Seconds for measuring: a share of what the planned steps should take."""
        if self.device.type == "cpu":
            return self.tuning.budget_s(self.steps * _step_s(graph))
        step = sum(
            work_of(nodes[0], types).seconds(len(nodes), self.profile, fused=False)
            for nodes in groups.values()
        )
        return min(self.tuning.budget_s(self.steps * _OVER * step), self.tuning.most_s)

    def _search_again(self, graph: Graph, options: Mapping[str, Option], last: bool | None) -> None:
        """What cuDNN found before is not there in this process: let it search where that repays."""
        if not may_search(self.tuning.search, self.device):
            return
        groups, timer = _groups(graph), self._timer(graph, last)
        chosen = {n: o for n, o in options.items() if o.form == SEARCHED and n in groups}
        candidates = []
        for name, option in chosen.items():
            known = self.measuring.found_s(groups[name], option, timer)
            one = candidate(name, groups[name], timer.types, self.profile, shapes=1, found_s=known)
            candidates += [one] if one is not None and known is not None else []
        for name in worth_searching(candidates, self.profile, self.steps, self.tuning.most_s / 2):
            way = Way(chosen[name].form, chosen[name].layout)
            with searching():
                timer.seconds(groups[name][: chosen[name].width], way)

    def _forced(self, nodes: Sequence[Node], timer: Timer) -> list[Option]:
        width = min(self.tuning.width or len(nodes), len(nodes))
        layout = self.tuning.layout
        if layout == LANES or width == 1:
            return [Option(LOOPED, LANES, 1, 0.0)]
        ways = ways_of(nodes[0])[1:]
        form, found = next((way for way in ways if way[1] == layout), ways[0])
        return [Option(form, found, width, 0.0)]


def _first_of(*ways: Improve) -> Improve:
    """What the first of several ways to improve a step makes of it; others, until that is there."""

    def improve(
        name: str, tape: Tape, replay: Replay, inputs: Sequence[torch.Tensor]
    ) -> Replay | Later | None:
        for number, way in enumerate(ways, 1):
            found = way(name, tape, replay, inputs)
            if isinstance(found, Later):
                other = _first_of(*ways[number:])(name, tape, replay, inputs)
                found.meanwhile = None if isinstance(other, Later) else other
            if found is not None:
                return found
        return None

    return improve


#: Times that a merged step takes as long as it should at least: on an H200 four or five.
_OVER = 4.0

#: A device is measured within a second, where at least so much may be spent on measuring.
_PROFILED_S = 2.0

#: Rough costs of a training step, to plan with: seconds for a node, and for a byte that it gives.
_NODE_S = 2e-5
_BYTE_S = 2e-9


def _groups(graph: Graph) -> dict[str, list[Node]]:
    """The groups that are trained, by name."""
    found: dict[str, list[Node]] = {}
    for members in runs(graph.nodes):
        name = members[0].group
        if name is not None and len(members) > 1 and is_training(members[0]):
            found[name] = members
    return found


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
