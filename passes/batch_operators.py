"""Horizontal fusion across different architectures: nodes that do the same work become a group.

Every node has a signature: what it computes, on which shapes. An agenda repeatedly picks one
signature among the nodes whose inputs are ready and emits all of these nodes as one group. The
order that comes out is acyclic by construction, and the trial may execute a group as one operator.

Source: agenda-based batching, Neubig, Goldberg and Dyer, "On-the-fly Operation Batching in
Dynamic Computation Graphs", NIPS 2017; the rule that picks the signature is ours.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
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
    """A graph in integers, and the ways of ordering it.

    What is ordered are bundles: nodes of one signature whose inputs come from the same bundles are
    ready at the same time in every order, and so are picked together.
    """

    def __init__(self, graph: Graph, options: BatchOperators) -> None:
        self.nodes = operators(graph)
        self.width = options.max_width or len(self.nodes)
        place = {node.name: index for index, node in enumerate(self.nodes)}
        # Of each input of each node, in order; -1: handed to the program.
        self.producers = [[place.get(r.name, -1) for r in inputs_of(n)] for n in self.nodes]
        self.rank = _places(_ranks(self.nodes))
        kinds = _kinds(graph, self.nodes, options)
        self.sizes = [0] * (max(kinds, default=-1) + 1)
        for kind in kinds:
            self.sizes[kind] += 1
        self.bundles: list[list[int]] = []  # of nodes
        self.kind: list[int] = []  # of each bundle, as all that follows
        self.users: list[list[int]] = []
        self.inputs: list[int] = []  # how many inputs are operators' results
        self.first: list[int] = []  # the first of them; -1: none
        self._bundle(kinds, apart=self.width < len(self.nodes))
        self.counts = [len(bundle) for bundle in self.bundles]
        self.heights = self._heights()
        self.tallest: list[list[int]] = [[] for _ in self.sizes]  # bundles of a signature
        for number in sorted(range(len(self.bundles)), key=self.heights.__getitem__, reverse=True):
            self.tallest[self.kind[number]].append(number)
        # The fewest groups of each signature.
        self.bounds = [self.heights[bundles[0]] for bundles in self.tallest]

    def _bundle(self, kinds: Sequence[int], apart: bool) -> None:
        """Put nodes into bundles; `apart`, each into its own: groups may be narrower."""
        known: dict[object, int] = {}
        bundle: list[int] = []  # of each node
        for index, kind in enumerate(kinds):
            inputs = [bundle[producer] for producer in self.producers[index] if producer >= 0]
            key = index if apart else (kind, *inputs)
            number = known.setdefault(key, len(self.bundles))
            bundle.append(number)
            if number < len(self.bundles):
                self.bundles[number].append(index)
                continue
            self.bundles.append([index])
            self.kind.append(kind)
            self.users.append([])
            self.inputs.append(len(inputs))
            self.first.append(inputs[0] if inputs else -1)
            for producer in inputs:
                self.users[producer].append(number)

    def _heights(self) -> list[int]:
        """The most bundles of a bundle's own signature on a path from it: each is a group.

        What is left of a signature so takes as many groups as its tallest bundle is high, at least.
        """
        found: list[int] = []
        below: list[dict[int, int]] = []  # the height of each signature from a bundle on
        for kind, users in zip(reversed(self.kind), reversed(self.users)):
            mine: dict[int, int] = {}
            for user in users:
                for other, height in below[len(self.kind) - 1 - user].items():
                    mine[other] = max(mine.get(other, 0), height)
            mine[kind] = mine.get(kind, 0) + 1
            found.append(mine[kind])
            below.append(mine)
        return found[::-1]

    def best(self) -> list[list[Node]]:
        """The groups of the best order found: the fewest groups, then the fewest repacked inputs.

        Hill climbing from the plain rule, by perturbing the weights of a few signatures at a time,
        in as many trials as a bounded effort allows.
        """
        weights = [1.0] * len(self.sizes)
        first = _Run(self, weights).groups()
        assert first is not None
        found = self.of_nodes(first)
        best = len(found), self.repacked(found)
        dice = random.Random(0)
        trials = min(_MOST_TRIALS, _EFFORT // max(len(self.nodes), 1))
        for _ in range(trials if len(found) > 1 else 0):
            other = [
                1.0 - _JITTER * dice.random() if dice.random() < _CHANGED else weight
                for weight in weights
            ]
            picked = _Run(self, other).groups(most=best[0])
            if picked is None:
                continue
            groups = self.of_nodes(picked)
            score = len(groups), self.repacked(groups)
            if score <= best:
                weights, found, best = other, groups, score
        return [[self.nodes[index] for index in group] for group in found]

    def of_nodes(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Groups of bundles as groups of nodes, each in the order of its members."""
        return [
            sorted(
                itertools.chain.from_iterable(self.bundles[bundle] for bundle in group),
                key=self.rank.__getitem__,
            )
            for group in groups
        ]

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
        self.ready: list[list[int]] = [[] for _ in agenda.sizes]  # bundles
        self.version = [0] * len(agenda.sizes)
        self.heap: list[tuple[float, int, int, int]] = []
        self.group = [-1] * len(agenda.bundles)  # of each emitted bundle
        self.passed = [0] * len(agenda.sizes)  # of the tallest bundles, emitted ones

    def groups(self, most: float = math.inf) -> list[list[int]] | None:
        """The groups of bundles, in an order in which they can be executed; None: over `most`.

        Repeatedly picks the signature with the largest share of all that is left of it ready, then
        the most. One function, because runs are many: calls and look-ups would be half of the time.
        """
        agenda, weights, heap = self.agenda, self.weights, self.heap
        kinds, counts, users, width = agenda.kind, agenda.counts, agenda.users, agenda.width
        ready, version, group = self.ready, self.version, self.group
        waiting = agenda.inputs.copy()  # inputs that are not emitted yet
        left, count = agenda.sizes.copy(), [0] * len(agenda.sizes)  # nodes: all, the ready ones
        bounds = agenda.bounds.copy()
        slack = most - sum(bounds)  # groups beyond those that there must be
        found: list[list[int]] = []
        free = [bundle for bundle, inputs in enumerate(waiting) if not inputs]
        while True:
            touched = set()
            for bundle in free:
                kind = kinds[bundle]
                ready[kind].append(bundle)
                count[kind] += counts[bundle]
                touched.add(kind)
            for kind in touched:  # entered under its present share; older entries are void
                version[kind] += 1
                share = weights[kind] * count[kind] / left[kind]
                heappush(heap, (-share, -count[kind], kind, version[kind]))
            while heap:
                best = heappop(heap)
                if best[3] == version[best[2]]:
                    break
            else:
                return found
            kind = best[2]
            if heap and heap[0][0] == best[0] and heap[0][1] == best[1]:
                kind = self._untied(best)
            members, ready[kind] = ready[kind], []
            left[kind] -= count[kind]
            count[kind] = 0
            version[kind] += 1
            parts = [members] if len(members) <= width else self._parts(members)
            for part in parts:
                for bundle in part:
                    group[bundle] = len(found)
                found.append(part)
            if not left[kind]:
                slack += bounds[kind]
            elif bounds[kind] > 1:
                slack += bounds[kind]
                bounds[kind] = self._bound(kind)
                slack -= bounds[kind]
            slack -= len(parts)
            if slack < 0:
                return None
            free = []
            for bundle in members:
                for user in users[bundle]:
                    waiting[user] -= 1
                    if not waiting[user]:
                        free.append(user)

    def _parts(self, members: list[int]) -> list[list[int]]:
        """As many members as the width allows at a time; each bundle is a node then."""
        (members,) = self.agenda.of_nodes([members])
        width = self.agenda.width
        return [members[start : start + width] for start in range(0, len(members), width)]

    def _bound(self, kind: int) -> int:
        """The fewest groups that what is left of a signature can take."""
        bundles, emitted, place = self.agenda.tallest[kind], self.group, self.passed[kind]
        while emitted[bundles[place]] >= 0:
            place += 1
        self.passed[kind] = place
        return self.agenda.heights[bundles[place]]

    def _untied(self, best: tuple[float, int, int, int]) -> int:
        """Among equals the signature whose inputs need no repacking: the lanes of one group."""
        tied = [best]
        while len(tied) < _TIES and self.heap and self.heap[0][:2] == best[:2]:
            tied += self._next()
        chosen = min(tied, key=lambda entry: (self._repacks(entry[2]), entry[2]))
        for entry in tied:
            if entry is not chosen:
                heappush(self.heap, entry)
        return chosen[2]

    def _next(self) -> list[tuple[float, int, int, int]]:
        """The first entry that is not void, if there is one."""
        while self.heap:
            entry = heappop(self.heap)
            if entry[3] == self.version[entry[2]]:
                return [entry]
        return []

    def _repacks(self, kind: int) -> bool:
        first = self.agenda.first
        groups = {self.group[first[b]] if first[b] >= 0 else -1 for b in self.ready[kind]}
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


def _places(ranks: Sequence[tuple[str, str, tuple[object, ...]]]) -> list[int]:
    """Each rank's place among all, which compares faster."""
    found = [0] * len(ranks)
    for place, index in enumerate(sorted(range(len(ranks)), key=ranks.__getitem__)):
        found[index] = place
    return found


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
