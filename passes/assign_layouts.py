"""How each group is executed and how its values lie, so that operators and copies cost least.

A group has options: one by one, or as one operator over values stacked `(M, ...)` or side by side
in channels `(N, M*C, ...)`, all at once or in chunks. An option has a cost of its own, and between
groups there are others: where layouts differ a value is converted, where memberships differ its
lanes are taken apart and brought together again. The cheapest assignment is sought by coordinate
descent, from several beginnings; it finds a local optimum, at least as good as each beginning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from cgo.graph import HANDED, Graph, Node, Ref, TensorType, bytes_of, inputs_of
from cgo.tuning import CHANNELS, LANES

#: Seconds of a kind of repacking ("convert", "to lanes", "to stacked", "to channels"), for a number
#: of lanes of a number of bytes.
Repacking = Callable[[str, int, int], float]

_MOST_SWEEPS = 8


@dataclass(frozen=True)
class Option:
    """One way of executing a group."""

    form: str
    layout: str  # of what it takes and gives
    width: int  # members executed at once
    seconds: float  # forward and backward of the whole group


@dataclass(frozen=True)
class Assignment:
    """The option of each group, and what all of them cost together."""

    options: Mapping[str, Option]
    seconds: float
    repacking_s: float  # of it, for conversions and copies


@dataclass
class _Input:
    """One tensor argument of a group's members, computed by other nodes."""

    producers: tuple[str, ...]  # the groups that lanes come from
    whole: bool  # the lanes of one group, in order
    lane_bytes: int


@dataclass
class _Group:
    size: int
    options: Sequence[Option]
    inputs: list[_Input] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    alone: bool = False  # some lane is read by itself: by a node in no group, or as an output
    lane_bytes: int = 0


def assign_layouts(
    graph: Graph, options: Mapping[str, Sequence[Option]], repacking: Repacking
) -> Assignment:
    """Choose an option for each group.

    Args:
        graph: With groups, in an order in which they can be executed.
        options: At least one for each group that is to be decided.
        repacking: What moving values costs.
    """
    problem = _Problem(graph, options, repacking)
    beginnings: list[Callable[[Sequence[Option]], Option]] = [
        partial(min, key=lambda option: option.seconds),
        partial(min, key=lambda option: (option.layout != LANES, option.seconds)),
        partial(min, key=lambda option: (option.layout == LANES, option.seconds)),
    ]
    found = [problem.descend(begin) for begin in beginnings]
    return min(found, key=lambda assignment: assignment.seconds)


class _Problem:
    def __init__(
        self, graph: Graph, options: Mapping[str, Sequence[Option]], repacking: Repacking
    ) -> None:
        self.repacking = repacking
        self.groups: dict[str, _Group] = {}
        self.chosen: dict[str, Option] = {}
        self._build(graph, options)

    def _build(self, graph: Graph, options: Mapping[str, Sequence[Option]]) -> None:
        members: dict[str, list[Node]] = defaultdict(list)
        home: dict[str, str] = {}
        for node in graph.nodes:
            if node.group in options:
                assert node.group is not None
                members[node.group].append(node)
                home[node.name] = node.group
        sources = {node.name for node in graph.nodes if node.op in HANDED}
        types = {node.name: node.types for node in graph.nodes}
        for name, nodes in members.items():
            group = self.groups[name] = _Group(len(nodes), options[name])
            group.lane_bytes = max(map(bytes_of, nodes[0].types), default=0)
        names = {name: [node.name for node in nodes] for name, nodes in members.items()}
        for name, nodes in members.items():
            for column in zip(*(tuple(inputs_of(node)) for node in nodes)):
                if column[0].name not in sources:
                    self._read(name, column, home, names, types)
        read_alone = [ref.name for n in graph.nodes if n.name not in home for ref in inputs_of(n)]
        for producer in (*read_alone, *(output.ref.name for output in graph.outputs)):
            if producer in home:
                self.groups[home[producer]].alone = True

    def _read(
        self,
        name: str,
        column: Sequence[Ref],
        home: Mapping[str, str],
        names: Mapping[str, list[str]],
        types: Mapping[str, tuple[TensorType | None, ...]],
    ) -> None:
        producers = tuple(dict.fromkeys(home[r.name] for r in column if r.name in home))
        if len(set(column)) == 1:  # one value for all members
            for producer in producers:
                self.groups[producer].alone = True
            return
        read = [ref.name for ref in column]
        whole = len(producers) == 1 and names[producers[0]] == read
        lane_bytes = bytes_of(types[column[0].name][column[0].index])
        self.groups[name].inputs.append(_Input(producers, whole, lane_bytes))
        for producer in producers:
            self.groups[producer].users.append(name)

    def descend(self, begin: Callable[[Sequence[Option]], Option]) -> Assignment:
        """From the options that `begin` picks, to where no change of a single group helps."""
        self.chosen = {name: begin(group.options) for name, group in self.groups.items()}
        for _ in range(_MOST_SWEEPS):
            changed = False
            for name, group in self.groups.items():
                before = self.chosen[name]
                costs = [(self._around(name, option), option) for option in group.options]
                seconds, best = min(costs, key=lambda item: item[0])
                if best is before or seconds >= self._around(name, before):
                    best = before
                self.chosen[name] = best
                changed |= best is not before
            if not changed:
                break
        own = sum(option.seconds for option in self.chosen.values())
        moved = sum(self._gathering(n) + self._splitting(n) for n in self.groups)
        return Assignment(dict(self.chosen), own + moved, moved)

    def _around(self, name: str, option: Option) -> float:
        """The part of the total cost that depends on one group's option."""
        self.chosen[name] = option
        group = self.groups[name]
        producers = {producer for read in group.inputs for producer in read.producers}
        total = option.seconds + self._gathering(name) + self._splitting(name)
        total += sum(map(self._splitting, producers))
        return total + sum(map(self._gathering, set(group.users)))

    def _gathering(self, name: str) -> float:
        """What bringing a group's inputs together costs."""
        group, option = self.groups[name], self.chosen[name]
        if option.layout == LANES:
            return 0.0
        total = 0.0
        for read in group.inputs:
            kind = f"to {option.layout}"
            if self._as_it_is(read, option):
                if self.chosen[read.producers[0]].layout == option.layout:
                    continue
                kind = "convert"
            total += self.repacking(kind, group.size, read.lane_bytes)
        return total

    def _as_it_is(self, read: _Input, option: Option) -> bool:
        """Whether the input's lanes are together already."""
        if not read.whole:
            return False
        producer = self.chosen[read.producers[0]]
        return producer.layout != LANES and producer.width == option.width

    def _splitting(self, name: str) -> float:
        """What taking a group's result apart costs, if any reader wants lanes."""
        group, option = self.groups[name], self.chosen[name]
        if option.layout == LANES:
            return 0.0
        apart = group.alone or any(
            name in read.producers
            and (self.chosen[user].layout == LANES or not self._as_it_is(read, self.chosen[user]))
            for user in group.users
            for read in self.groups[user].inputs
        )
        if not apart:
            return 0.0
        total = self.repacking("to lanes", group.size, group.lane_bytes)
        if option.layout == CHANNELS:
            total += self.repacking("convert", group.size, group.lane_bytes)
        return total
