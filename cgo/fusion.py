"""How a merged graph will be executed, for `cgo explain`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cgo.graph import Graph, Node, program_of, restrict
from cgo.passes.batch_operators import BatchOperators, operators
from cgo.passes.ungrouped import ungrouped
from cgo.passes.unmerged import Family
from cgo.runtime.builder import Decision
from cgo.runtime.choice import LOOP, LOOPED, Choice, Way
from cgo.runtime.costs import Timer
from cgo.runtime.emitter import operator_of
from cgo.runtime.lower import lower
from cgo.runtime.packing import plan_packs
from cgo.runtime.tuning import Tuner


@dataclass(frozen=True)
class Fused:
    """Groups of one operator that are executed in one form."""

    op: str
    form: str
    sizes: tuple[int, ...]  # members of each group, descending
    gathers: int  # inputs for which members' values are copied together

    @property
    def nodes(self) -> int:
        """Nodes in all groups."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Timing:
    """Forward and backward of all groups of one operator that are executed in one form."""

    op: str
    form: str
    groups: int
    predicted_s: float  # by the table of costs
    measured_s: float  # now, at the groups' own sizes

    @property
    def error(self) -> float:
        """How far the prediction is off: 0.1 is ten percent too much."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class FusionReport:
    """One training step: what is fused, and what runs node by node for which reason."""

    nodes: int
    groups: int  # fused; loops do not count
    fused: tuple[Fused, ...]  # most nodes first
    repacked: tuple[Decision, ...]  # groups for which values are copied together, in order
    loops: tuple[Family, ...]
    alone: tuple[Family, ...]
    timings: tuple[Timing, ...]  # longest first
    repacking_s: float  # predicted, for conversions and copies

    @property
    def gathers(self) -> int:
        """Inputs for which members' values are copied together."""
        return sum(row.gathers for row in self.fused)


def fusion_report(graph: Graph, options: BatchOperators, tuner: Tuner) -> FusionReport:
    """Lower the training programs over whole batches and say what became of every node.

    Args:
        graph: A planned graph.
        options: The pass that grouped it.
        tuner: Chooses how groups are executed.
    """
    device = tuner.device
    models = sorted({output.model for output in graph.outputs})
    choice = tuner(graph, models)
    packs = plan_packs(choice.graph)
    nodes = 0
    decisions: list[Decision] = []
    alone: list[Family] = []
    for program in _largest(graph):
        part = restrict(graph, program=program)
        nodes += len(operators(part))
        alone += ungrouped(part, options)
        for ids in choice.programs:
            own = restrict(choice.graph, models=set(ids))
            if any(output.program == program for output in own.outputs):
                decisions += lower(own, program, device, packs, ways=choice.ways).decisions
        decisions += _left_over(part, choice.graph)
    fused = [decision for decision in decisions if decision.form is not None]
    return FusionReport(
        nodes,
        len(fused),
        _fused(fused),
        tuple(decision for decision in fused if decision.gathers),
        _loops(decisions),
        tuple(_by_nodes(alone)),
        _timings(choice, tuner, _largest(graph)),
        tuner.assignment.repacking_s,
    )


def _timings(choice: Choice, tuner: Tuner, programs: Sequence[str]) -> tuple[Timing, ...]:
    """What each group was predicted to take, and what it takes."""
    known = {name.removesuffix(LOOP): o for name, o in tuner.assignment.options.items()}
    timer = Timer(tuner.device, choice.graph)
    members_of: dict[str, list[Node]] = defaultdict(list)
    for node in choice.graph.nodes:
        if node.group is not None and program_of(node) in programs:
            members_of[node.group].append(node)
    total: dict[tuple[str, str], list[float]] = {}
    sizes = Counter(_plain(name) for name, nodes in members_of.items() for _ in nodes)
    for name, nodes in members_of.items():
        option = known.get(_plain(name))
        if option is None or not option.seconds:
            continue
        loop = option.form == LOOPED
        width = 1 if loop else len(nodes)
        seconds = timer.seconds(nodes[:width], Way(option.form, option.layout))
        row = total.setdefault((operator_of(nodes[0]), option.form), [0, 0.0, 0.0])
        row[0] += 1
        row[1] += option.seconds * len(nodes) / sizes[_plain(name)]
        row[2] += seconds * len(nodes) / width
    rows = [Timing(op, form, int(n), a, b) for (op, form), (n, a, b) in total.items()]
    return tuple(sorted(rows, key=lambda row: -row.measured_s))


def _plain(name: str) -> str:
    return name.removesuffix(LOOP).partition("/")[0]


def _left_over(part: Graph, chosen: Graph) -> list[Decision]:
    """Members of groups that no other model of their program has a node in."""
    now = {node.name: node.group for node in chosen.nodes}
    return [
        Decision(operator_of(node), 1, None, "no other model of its program does this", node.name)
        for node in part.nodes
        if node.group is not None and now[node.name] is None
    ]


def _largest(graph: Graph) -> list[str]:
    """The training programs over each model's largest batch: "train/64"."""
    largest: dict[str, int] = {}
    for output in graph.outputs:
        split, _, size = output.program.partition("/")
        if split == "train":
            largest[output.model] = max(int(size), largest.get(output.model, 0))
    return [f"train/{size}" for size in sorted(set(largest.values()))]


def _fused(decisions: Sequence[Decision]) -> tuple[Fused, ...]:
    found: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        found.setdefault((decision.operator, decision.form or ""), []).append(decision)
    rows = [
        Fused(
            op,
            form,
            tuple(sorted((d.size for d in members), reverse=True)),
            sum(d.gathers for d in members),
        )
        for (op, form), members in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.nodes, row.op, row.form)))


def _loops(decisions: Sequence[Decision]) -> tuple[Family, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for decision in decisions:
        if decision.form is None:
            counts[decision.operator, decision.reason] += decision.size
            examples.setdefault((decision.operator, decision.reason), decision.example)
    return tuple(
        _by_nodes(
            Family(op, count, reason, examples[op, reason])
            for (op, reason), count in counts.items()
        )
    )


def _by_nodes(families: Iterable[Family]) -> list[Family]:
    return sorted(families, key=lambda family: (-family.nodes, family.op, family.reason))
