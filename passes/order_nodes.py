"""Reordering so that less is alive at once.

What a program computes does not depend on the order of its nodes, but how much memory its values
take does: a value is there from its node to its last reader. This pass repeatedly picks, among the
groups and single nodes whose inputs are ready, the one that allocates least beyond what it frees.

How long values live, as `live_peak` and the pass see it:

- What is handed to a program (inputs, parameters, buffers, random tensors) is there anyway and does
  not count. What leaves it stays to its end.
- A group has one value an output, which is there while any lane of it is read. Views have no memory
  of their own; what they are of lives as long as they do.
- In an evaluation program a value ends with its last reader.
- In a training program what autograd keeps for the backward does not end before it. Only operators
  of three short lists are known to keep less than their arguments and results. The backward itself
  is not looked at. So there is little to gain where everything is kept, as behind convolutions.

Gradients of a value that is read three times or more are summed in the order of its readers, and
sums round. So such readers stay in order in training programs, and no gradient changes by a bit.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from cgo.graph import HANDED, Graph, Node, Ref, bytes_of, inputs_of, programs, restrict
from cgo.operators import aten


def order_nodes(graph: Graph) -> Graph:
    """Reorder each program whose values take less memory in another order.

    Groups stay together; nodes keep everything but their places. Where no program gains, the graph
    comes back as it is, and so does what this pass gave.
    """
    placed: dict[str, None] = {node.name: None for node in graph.nodes if node.op in HANDED}
    gains = False
    for program in programs(graph):
        liveness = _Liveness(restrict(graph, program=program), program)
        order: Sequence[int] = range(len(liveness.units))
        found = _Greedy(liveness).order()
        if liveness.peak(found) < liveness.peak(order):
            gains, order = True, found
        placed |= dict.fromkeys(node.name for unit in order for node in liveness.units[unit])
    if not gains:
        return graph
    nodes = {node.name: node for node in graph.nodes}
    return Graph(tuple(nodes[name] for name in placed), graph.outputs)


def live_peak(graph: Graph, program: str) -> int:
    """Bytes of a program's values that are alive at one time, at most, in the graph's order.

    Args:
        graph: Any graph.
        program: One of its programs, such as "train/64".
    """
    liveness = _Liveness(restrict(graph, program=program), program)
    return liveness.peak(range(len(liveness.units)))


class _Liveness:
    """A program in integers: units, which are groups or single nodes, and values."""

    def __init__(self, part: Graph, program: str) -> None:
        operators = [node for node in part.nodes if node.op not in HANDED]
        self.units = _units(operators)
        self.sizes: list[int] = []  # of each value
        self.made: list[list[int]] = [[] for _ in self.units]  # values that a unit allocates
        self.before: list[set[int]] = [set() for _ in self.units]  # units that have to come first
        self._values: dict[Ref, tuple[int, ...]] = {}  # in whose memory a reference lies
        unit_of: dict[str, int] = {}
        for index, members in enumerate(self.units):
            for node in members:
                self.before[index] |= {
                    unit_of[r.name] for r in inputs_of(node) if r.name in unit_of
                }
            unit_of |= dict.fromkeys((node.name for node in members), index)
            self._make(index, members)
        self.reads = [self._of(ref for n in unit for ref in inputs_of(n)) for unit in self.units]
        self.stays = self._of(output.ref for output in part.outputs)
        if program.startswith("train/"):
            self._keep_for_backward(part)
            self._keep_readers_in_order()

    def _make(self, index: int, members: Sequence[Node]) -> None:
        for output, type_ in enumerate(members[0].types):
            if _is_view(members[0]):
                for node in members:
                    base = next(inputs_of(node), None)
                    self._values[Ref(node.name, output)] = self._values.get(base, ())  # type: ignore[arg-type]
                continue
            value = len(self.sizes)
            self.sizes.append(bytes_of(type_) * len(members))
            self.made[index].append(value)
            self._values |= {Ref(node.name, output): (value,) for node in members}

    def _of(self, refs: Iterable[Ref]) -> set[int]:
        """The values in which references lie; none of what is handed to the program."""
        return {value for ref in refs for value in self._values.get(ref, ())}

    def _keep_for_backward(self, part: Graph) -> None:
        learning: set[str] = set()
        for node in part.nodes:
            reads = list(inputs_of(node))
            trained = node.op == "cgo.parameter" and node.keyword("trainable") is True
            if not trained and learning.isdisjoint(ref.name for ref in reads):
                continue
            learning.add(node.name)
            name = _name(node)
            if not (name in _KEEP_NOTHING or name in _KEEP_RESULT or _is_view(node)):
                self.stays |= self._of(reads)
            if not (name in _KEEP_NOTHING or name in _KEEP_ARGUMENTS or _is_view(node)):
                self.stays |= self._of(Ref(node.name, i) for i in range(len(node.types)))

    def _keep_readers_in_order(self) -> None:
        readers: dict[Ref, list[int]] = defaultdict(list)
        values: dict[int, list[int]] = defaultdict(list)
        for index, members in enumerate(self.units):
            for ref in (ref for node in members for ref in inputs_of(node)):
                readers[ref].append(index)  # of what is handed over, by name
                for value in self._values.get(ref, ()):
                    values[value].append(index)
        for several in (*readers.values(), *values.values()):
            for first, second in pairwise(dict.fromkeys(several)) if len(several) > 2 else ():
                self.before[second].add(first)

    def readers(self) -> list[set[int]]:
        """The units that read each value."""
        readers: list[set[int]] = [set() for _ in self.sizes]
        for unit, values in enumerate(self.reads):
            for value in values:
                readers[value].add(unit)
        return readers

    def bytes_of(self, values: Iterable[int]) -> int:
        """All of them together."""
        return sum(self.sizes[value] for value in values)

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes that are alive at one time."""
        left = self.readers()
        now = highest = 0
        for unit in order:
            now += self.bytes_of(self.made[unit])
            highest = max(highest, now)
            for value in self.reads[unit]:
                left[value].discard(unit)
            ended = [v for v in (*self.made[unit], *self.reads[unit]) if not left[v]]
            now -= self.bytes_of(value for value in ended if value not in self.stays)
        return highest


class _Greedy:
    """The order in which each step allocates least beyond what it frees; ties by name."""

    def __init__(self, liveness: _Liveness) -> None:
        self.liveness = liveness
        self.left = liveness.readers()  # that are still to come
        self.ranks = _ranks(liveness.units)
        self.waiting = [len(before) for before in liveness.before]
        self.after: list[list[int]] = [[] for _ in liveness.units]
        for unit, before in enumerate(liveness.before):
            for first in before:
                self.after[first].append(unit)
        self.ready: list[tuple[int, int, int]] = []

    def order(self) -> list[int]:
        for unit, count in enumerate(self.waiting):
            if not count:
                self._enter(unit)
        order: dict[int, None] = {}
        while self.ready:
            _, _, unit = heapq.heappop(self.ready)
            if unit not in order:  # else it was entered twice, when it came to free more
                order[unit] = None
                self._leave(unit)
        return list(order)

    def _enter(self, unit: int) -> None:
        made, stays = self.liveness.made[unit], self.liveness.stays
        freed = [value for value in self.liveness.reads[unit] if self.left[value] == {unit}]
        unread = [value for value in made if not self.left[value]]
        ended = (value for value in (*freed, *unread) if value not in stays)
        grows = self.liveness.bytes_of(made) - self.liveness.bytes_of(ended)
        heapq.heappush(self.ready, (grows, self.ranks[unit], unit))

    def _leave(self, unit: int) -> None:
        for value in self.liveness.reads[unit]:
            self.left[value].discard(unit)
            if len(self.left[value]) == 1:
                (last,) = self.left[value]
                if not self.waiting[last]:
                    self._enter(last)
        for user in self.after[unit]:
            self.waiting[user] -= 1
            if not self.waiting[user]:
                self._enter(user)


def _units(nodes: Sequence[Node]) -> list[list[Node]]:
    """Groups, and nodes without a group each by itself."""
    found: list[list[Node]] = []
    for name, neighbours in groupby(nodes, key=lambda node: node.group):
        members = list(neighbours)
        found += [members] if name is not None else [[node] for node in members]
    return found


def _ranks(units: Sequence[Sequence[Node]]) -> list[int]:
    """Places by name, which do not change when the pass is applied once more."""
    order = sorted(range(len(units)), key=lambda unit: _natural(min(n.name for n in units[unit])))
    ranks = [0] * len(units)
    for rank, unit in enumerate(order):
        ranks[unit] = rank
    return ranks


def _natural(name: str) -> tuple[object, ...]:
    """A key by which `relu_2` comes before `relu_10`."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in parts)


def _name(node: Node) -> str:
    """The operator without its overload."""
    return node.op.rpartition(".")[0] if node.op.startswith("aten.") else node.op


def _is_view(node: Node) -> bool:
    overload = aten(node.op)
    return (overload is not None and overload.is_view) or _name(node) in _USUALLY_VIEWS


_USUALLY_VIEWS = frozenset({"aten.reshape", "aten.flatten", "aten.unflatten", "aten.contiguous"})

#: Operators whose backward needs shapes at most.
_KEEP_NOTHING = frozenset(
    """
    aten.add aten.sub aten.rsub aten.neg aten.cat aten.stack aten.mean aten.sum aten.clone
    aten.zeros_like aten.ones_like aten.full_like aten.avg_pool2d aten.adaptive_avg_pool2d
    aten.constant_pad_nd aten.pad
    """.split()  # noqa: SIM905
)

#: Operators whose backward needs the result, and not the arguments.
_KEEP_RESULT = frozenset(
    """
    aten.relu aten.tanh aten.sigmoid aten.exp aten.sqrt aten.rsqrt aten.reciprocal aten.softmax
    aten.log_softmax
    """.split()  # noqa: SIM905
)

#: Operators whose backward needs arguments, and not the result.
_KEEP_ARGUMENTS = frozenset(
    """
    aten.linear aten.matmul aten.mm aten.bmm aten.addmm aten.conv1d aten.conv2d aten.mul
    aten.gelu aten.silu aten.batch_norm aten.layer_norm cgo.batch_norm
    """.split()  # noqa: SIM905
)
