"""Value numbering: what is computed from equal inputs and equal frozen values is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cgo.graph import STATE, Graph, ModelId, Node, Ref, homes, rebuild, with_homes, with_inputs
from cgo.passes.sharing import argument_key, is_own, pure


def dedup_stems(graph: Graph) -> Graph:
    """Share nodes that compute the same value for several models, or twice for one.

    Two nodes are one when operator, literals (type and bits), input values, output types and
    autocast agree, the operator is on the allow-list of `cgo.passes.sharing`, and the value
    depends on no trainable parameter and no random number. Frozen parameters and constants agree
    by content. Buffers agree when they start equal and every step updates them equally.

    Returns:
        The graph with each shared value once, owned by all models that need it; `graph` itself
        when nothing can be shared. Outputs stay: every model keeps the updates of its own
        buffers, though several may name one value.

    Source: value numbering by partition refinement, Alpern, Wegman and Zadeck, POPL 1988.
    """
    return share(graph, numbering(graph))


def share(graph: Graph, numbers: Sequence[int]) -> Graph:
    """Keep the first node of each number in place of the others."""
    members: dict[int, list[Node]] = defaultdict(list)
    for node, number in zip(graph.nodes, numbers):
        members[number].append(node)
    renamed = {node.name: first.name for first, *others in members.values() for node in others}
    if not renamed:
        return graph

    def rename(ref: Ref) -> Ref:
        return replace(ref, name=renamed[ref.name]) if ref.name in renamed else ref

    kept = (_stand_for(first, others, rename) for first, *others in members.values())
    return rebuild(graph, kept, renamed)


def _stand_for(first: Node, others: Sequence[Node], rename: Callable[[Ref], Ref]) -> Node:
    if others and first.op in STATE:
        return with_homes(first, [place for node in (first, *others) for place in homes(node)])
    return with_inputs(first, rename)


def numbering(graph: Graph) -> list[int]:
    """One integer a node; equal exactly where the values are provably equal in every step.

    Optimistic: buffers that start equal are taken to be one value until the numbers of their
    updates say otherwise; then their class is split and everything is numbered again.
    """
    program = _Interned(graph)
    while True:
        numbers = program.number()
        if not program.split_buffers(numbers):
            return numbers


class _Interned:
    """A graph in integers: what a node is apart from its inputs, and where its inputs are."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = {node.name: index for index, node in enumerate(graph.nodes)}
        self.inputs: list[tuple[int, ...]] = []  # positions, in argument order
        self.kinds: list[int] = []  # equal: may compute one value; negative: shared with none
        self._ids: dict[object, int] = {}
        self._trained: list[bool] = []
        for index, node in enumerate(graph.nodes):
            refs: list[Ref] = []
            key = (argument_key(node.args, refs), argument_key(node.kwargs, refs))
            inputs = tuple(self.position[ref.name] for ref in refs)
            trained = is_own(node) or any(self._trained[i] for i in inputs)
            self._trained.append(trained)
            self.inputs.append(inputs)
            shared = None if trained else sharing_key(node, key)
            self.kinds.append(-1 - index if shared is None else self._intern(shared))
        self.buffers = self._updates()

    def _intern(self, key: object) -> int:
        return self._ids.setdefault(key, len(self._ids))

    def _updates(self) -> dict[int, list[tuple[str, frozenset[str], int, int]]]:
        """For each buffer, and parameter: (program, data, position, index) of each update."""
        places = {
            place: index
            for index, node in enumerate(self.graph.nodes)
            if node.op in STATE
            for place in homes(node)
        }
        found: dict[int, list[tuple[str, frozenset[str], int, int]]] = {
            index: [] for index in places.values() if self.kinds[index] >= 0
        }
        data = training_data(self.graph)
        for output in self.graph.outputs:
            buffer = places.get((output.model, output.key)) if output.role == "update" else None
            if buffer in found:
                found[buffer].append(
                    (
                        output.program,
                        data[output.model],
                        self.position[output.ref.name],
                        output.ref.index,
                    )
                )
        return found

    def number(self) -> list[int]:
        """Number all nodes under the present classes of buffers."""
        ids: dict[tuple[int, ...], int] = {}
        numbers: list[int] = []
        for kind, inputs in zip(self.kinds, self.inputs):
            key = (kind, *[numbers[index] for index in inputs])
            numbers.append(ids.setdefault(key, len(ids)))
        return numbers

    def split_buffers(self, numbers: Sequence[int]) -> bool:
        """Put apart buffers whose updates have different numbers; False if there are none."""
        before = len({self.kinds[index] for index in self.buffers})
        kinds = {
            index: self._intern(
                (
                    "evolves",
                    self.kinds[index],
                    frozenset((*where, numbers[at], out) for *where, at, out in updates),
                )
            )
            for index, updates in self.buffers.items()
        }
        if len(set(kinds.values())) == before:
            return False
        for index, kind in kinds.items():
            self.kinds[index] = kind
        return True


def sharing_key(node: Node, arguments: object) -> object | None:
    """What must agree, beside the input values, for two nodes to be one; None: share never."""
    if node.op in STATE or node.op == "cgo.constant":
        content = node.keyword("content")
        return (node.op, content, node.types) if content else None
    return (node.op, arguments, node.types, node.autocast) if pure(node) else None


def training_data(graph: Graph) -> Mapping[ModelId, frozenset[str]]:
    """The data each model trains on.

    A buffer that counts steps evolves equally in two models only if both take the same steps.
    """
    data: dict[ModelId, set[str]] = {output.model: set() for output in graph.outputs}
    for node in graph.nodes:
        if node.op == "cgo.input" and node.keyword("split") == "train":
            for model in node.owners:
                data[model].add(str(node.keyword("data")))
    return {model: frozenset(found or {f"of {model}"}) for model, found in data.items()}
