"""Horizontal fusion across different architectures: nodes that do the same work become a group.

Every node has a signature: what it computes, on which shapes. An agenda repeatedly picks one
signature among the nodes whose inputs are ready and emits all of these nodes as one group. The
order that comes out is acyclic by construction, and the trial may execute a group as one operator.

Source: agenda-based batching, Neubig, Goldberg and Dyer, "On-the-fly Operation Batching in
Dynamic Computation Graphs", NIPS 2017; the rule that picks the signature is ours.
"""

from __future__ import annotations

import heapq
import operator
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cgo.graph import HANDED, SOURCES, Graph, Node, Ref, TensorType, inputs_of
from cgo.passes.sharing import argument_key


@dataclass(frozen=True)
class BatchOperators:
    """The pass, with what may be grouped.

    Args:
        max_width: Most nodes in a group; None for no limit.
        only: Operators that may be grouped, by name without overload ("aten.linear"); None: all.
        without: Operators that may not.
    """

    max_width: int | None = None
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    def __call__(self, graph: Graph) -> Graph:
        """Reorder the graph so that the members of each group are neighbours, and mark them.

        The same models give the same groups in whatever order they are merged, as long as they
        have the same ids. Nodes keep their names; nothing else changes. A graph in which no two
        nodes can be grouped, or that is in order already, comes back as it is.
        """
        order = _Agenda(graph, self).best()
        if not any(len(group) > 1 for group in order) and not any(n.group for n in graph.nodes):
            return graph
        nodes = [node for node in graph.nodes if node.op in HANDED]
        for number, group in enumerate(order):
            name = f"g{number}" if len(group) > 1 else None
            for node in group:
                nodes.append(node if node.group == name else replace(node, group=name))
        same = len(nodes) == len(graph.nodes) and all(map(operator.is_, nodes, graph.nodes))
        return graph if same else Graph(tuple(nodes), graph.outputs)

    def allows(self, node: Node) -> bool:
        """Whether the node may be in a group with others."""
        name = node.op.rpartition(".")[0] if node.op.startswith("aten.") else node.op
        return name not in self.without and (self.only is None or name in self.only)


def operators(graph: Graph) -> list[Node]:
    """The nodes that compute something, in order."""
    return [node for node in graph.nodes if node.op not in HANDED]


class _Agenda:
    """A graph in integers, and the ways of ordering it."""

    def __init__(self, graph: Graph, options: BatchOperators) -> None:
        self.nodes = operators(graph)
        self.width = options.max_width or len(self.nodes)
        place = {node.name: index for index, node in enumerate(self.nodes)}
        self.users: list[list[int]] = [[] for _ in self.nodes]
        self.inputs: list[int] = []  # how many inputs are operators' results
        self.first: list[int] = []  # the first of them; -1: none
        self.producers: list[list[int]] = []  # of each input in order; -1: handed to the program
        for index, node in enumerate(self.nodes):
            self.producers.append([place.get(ref.name, -1) for ref in inputs_of(node)])
            inputs = [producer for producer in self.producers[-1] if producer >= 0]
            self.inputs.append(len(inputs))
            self.first.append(inputs[0] if inputs else -1)
            for producer in inputs:
                self.users[producer].append(index)
        self.rank = _ranks(self.nodes)
        self.kind = _kinds(graph, self.nodes, options)
        self.sizes = [0] * (max(self.kind, default=-1) + 1)
        for kind in self.kind:
            self.sizes[kind] += 1

    def best(self) -> list[list[Node]]:
        """The groups of the best order found: the fewest groups, then the fewest repacked inputs.

        Hill climbing from the plain rule, by perturbing the weights of a few signatures at a time,
        in as many trials as a bounded effort allows.
        """
        weights = [1.0] * len(self.sizes)
        found = _Run(self, weights).groups()
        best = len(found), self.repacked(found)
        dice = random.Random(0)
        trials = min(_MOST_TRIALS, _EFFORT // max(len(self.nodes), 1))
        for _ in range(trials if len(found) > 1 else 0):
            other = [
                1.0 - _JITTER * dice.random() if dice.random() < _CHANGED else weight
                for weight in weights
            ]
            groups = _Run(self, other).groups()
            if len(groups) > best[0]:
                continue
            score = len(groups), self.repacked(groups)
            if score <= best:
                weights, found, best = other, groups, score
        return [[self.nodes[index] for index in group] for group in found]

    def repacked(self, groups: Sequence[Sequence[int]]) -> int:
        """How many inputs of groups are not the lanes of one earlier group, in order."""
        home = {index: group for group in groups for index in group}
        count = 0
        for group in groups:
            for column in zip(*(self.producers[index] for index in group)) if group[1:] else ():
                first = column[0]
                shared = first < 0 or column.count(first) == len(column)
                count += not shared and tuple(home[first]) != column
        return count


class _Run:
    """One pass over the agenda, with a weight for each signature."""

    def __init__(self, agenda: _Agenda, weights: Sequence[float]) -> None:
        self.agenda, self.weights = agenda, weights
        self.waiting = agenda.inputs.copy()  # inputs that are not emitted yet
        self.left = agenda.sizes.copy()
        self.ready: list[list[int]] = [[] for _ in agenda.sizes]
        self.version = [0] * len(agenda.sizes)
        self.heap: list[tuple[float, int, int, int]] = []
        self.group = [-1] * len(agenda.nodes)  # of each emitted node

    def groups(self) -> list[list[int]]:
        """The groups, in an order in which they can be executed."""
        for index, waiting in enumerate(self.waiting):
            if not waiting:
                self.ready[self.agenda.kind[index]].append(index)
        for signature in range(len(self.ready)):
            self._push(signature)
        found: list[list[int]] = []
        while (kind := self._pick()) is not None:
            members = sorted(self.ready[kind], key=self.agenda.rank.__getitem__)
            self.ready[kind] = []
            self.left[kind] -= len(members)
            for start in range(0, len(members), self.agenda.width):
                group = members[start : start + self.agenda.width]
                for index in group:
                    self.group[index] = len(found)
                found.append(group)
            self._release(members)
        return found

    def _release(self, members: Sequence[int]) -> None:
        touched: dict[int, None] = {}
        for index in members:
            for user in self.agenda.users[index]:
                self.waiting[user] -= 1
                if not self.waiting[user]:
                    kind = self.agenda.kind[user]
                    self.ready[kind].append(user)
                    touched[kind] = None
        for kind in touched:
            self._push(kind)

    def _push(self, kind: int) -> None:
        """Enter a signature under its present share; older entries of it are void."""
        if ready := len(self.ready[kind]):
            self.version[kind] += 1
            share = self.weights[kind] * ready / self.left[kind]
            heapq.heappush(self.heap, (-share, -ready, kind, self.version[kind]))

    def _pick(self) -> int | None:
        """The signature with the largest share of all that is left of it ready, then the most.

        Among equals the one whose inputs need no repacking: they are the lanes of one group.
        """
        best = self._pop()
        if best is None:
            return None
        tied = [best]
        while len(tied) < _TIES and self.heap and self.heap[0][:2] == best[:2]:
            if (entry := self._pop()) is not None:
                tied.append(entry)
        chosen = min(tied, key=lambda entry: (self._repacks(entry[2]), entry[2]))
        for entry in tied:
            if entry is not chosen:
                heapq.heappush(self.heap, entry)
        return chosen[2]

    def _pop(self) -> tuple[float, int, int, int] | None:
        while self.heap:
            entry = heapq.heappop(self.heap)
            if entry[3] == self.version[entry[2]] and self.ready[entry[2]]:
                return entry
        return None

    def _repacks(self, kind: int) -> bool:
        first = self.agenda.first
        groups = {self.group[first[i]] if first[i] >= 0 else -1 for i in self.ready[kind]}
        return len(groups) > 1


#: Perturbed orders: how many are tried, how many nodes they may visit in all, the share of the
#: signatures that change in each, and how far their weights go down.
_MOST_TRIALS = 512
_EFFORT = 600_000
_CHANGED = 0.1
_JITTER = 0.9

#: Ties that are compared for repacking; more would cost more than they bring.
_TIES = 8


def _ranks(nodes: Sequence[Node]) -> list[tuple[str, str, tuple[object, ...]]]:
    """The order of members in a group: by model, then by place in the model's own program.

    Consecutive groups of the same members so have the same lanes. The place is told by the numbers
    in names, which capture gives in order to the calls of one operator: places in this graph would
    be others once its nodes have been reordered, and a second run of the pass would move them anew.
    """
    ranks = []
    for node in nodes:
        _, _, rest = node.name.partition("/")
        program, _, own = rest.rpartition("/")
        ranks.append((min(node.owners), program, _natural(own or node.name)))
    return ranks


def _natural(name: str) -> tuple[object, ...]:
    """A key by which `relu` comes before `relu_2`, and that before `relu_10`."""
    return tuple(
        (1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)
    )


class Operand(NamedTuple):
    """What must agree of an input: dtype and shape, and of state whether it is trained.

    One operator cannot give a gradient to one lane's weights and None to another's. Inputs of the
    program stay apart from computed values: they need no gradient, and often all members share one.
    """

    kind: str  # of source; "" for a computed value
    trained: bool | None  # of parameters
    type: TensorType | None  # strides do not count


class Signature(NamedTuple):
    """What must agree of nodes that one operator is to do the work of."""

    op: str
    arguments: object  # literals with type and bits, and where tensors stand among them
    inputs: tuple[Operand, ...]
    types: tuple[object, ...]
    autocast: str | None
    programs: frozenset[str]
    data: frozenset[str]


def signatures(graph: Graph, nodes: Sequence[Node]) -> list[Signature]:
    """The signature of each node."""
    made = {node.name: node for node in graph.nodes}
    programs, data = _programs(graph), _data(graph)
    found = []
    for node in nodes:
        refs: list[Ref] = []
        arguments = (argument_key(node.args, refs), argument_key(node.kwargs, refs))
        inputs = tuple(_operand(made[ref.name], ref.index) for ref in refs)
        whose = programs[node.name], frozenset(data[model] for model in node.owners)
        found.append(Signature(node.op, arguments, inputs, _types(node), node.autocast, *whose))
    return found


def _kinds(graph: Graph, nodes: Sequence[Node], options: BatchOperators) -> list[int]:
    """A number a node; equal where the nodes may share a group.

    Numbers follow the sorted text of the signatures, so that they do not depend on the order of
    the nodes.
    """
    texts: dict[object, str] = {}
    keys: list[object] = []
    for node, signature in zip(nodes, signatures(graph, nodes)):
        key = signature if options.allows(node) else node.name
        keys.append(key)
        if key not in texts:
            texts[key] = _text(key)
    numbers = {key: number for number, (key, _) in enumerate(sorted(texts.items(), key=_second))}
    return [numbers[key] for key in keys]


def _second(item: tuple[object, str]) -> str:
    return item[1]


def _text(key: object) -> str:
    """A text that is the same in every process; sets have no order of their own."""
    if isinstance(key, frozenset):
        return repr(sorted(map(_text, key)))
    if isinstance(key, tuple):
        return f"({','.join(map(_text, key))})"
    return repr(key)


def _types(node: Node) -> tuple[object, ...]:
    return tuple(None if t is None else (t.dtype, t.shape) for t in node.types)


def _operand(producer: Node, index: int) -> Operand:
    type_ = producer.types[index]
    trained = producer.keyword("trainable") if producer.op == "cgo.parameter" else None
    kind = producer.op if producer.op in SOURCES else ""
    plain = None if type_ is None else TensorType(type_.dtype, type_.shape)
    return Operand(kind, trained, plain)  # type: ignore[arg-type]


def _programs(graph: Graph) -> dict[str, frozenset[str]]:
    """The programs that need each node; only nodes of the same program run together."""
    needed: dict[str, set[str]] = {}
    for output in graph.outputs:
        needed.setdefault(output.ref.name, set()).add(output.program)
    for node in reversed(graph.nodes):
        mine = needed.get(node.name)
        if mine:
            for ref in inputs_of(node):
                needed.setdefault(ref.name, set()).update(mine)
    return {name: frozenset(programs) for name, programs in needed.items()}


def _data(graph: Graph) -> dict[str, str]:
    """The data that each model trains on: models of one loader run in step."""
    data: dict[str, str] = {output.model: "" for output in graph.outputs}
    for node in graph.nodes:
        if node.op == "cgo.input" and node.keyword("split") == "train":
            for model in node.owners:
                data[model] = str(node.keyword("data"))
    return data
