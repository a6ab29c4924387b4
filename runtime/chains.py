"""Groups that stand directly behind a batch norm, and nowhere else: a kernel can take them over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cgo.graph import Graph, Node, Ref, inputs_of
from cgo.runtime.emitter import operator_of, runs

_NORMS = frozenset({"cgo.batch_norm", "aten.batch_norm"})
_ADDITION = "aten.add"
_ACTIVATIONS = frozenset(
    "aten.relu aten.relu6 aten.hardtanh aten.silu aten.gelu aten.hardswish".split()  # noqa: SIM905
)


def behind_norms(graph: Graph) -> Mapping[str, Sequence[Sequence[Node]]]:
    """An addition and an activation behind each group of batch norms, by the group's name.

    That is where each is a group of as many members in the same order, and the only reader of the
    one before.
    """
    readers = _readers(graph)
    groups = {part[0].group: part for part in runs(graph.nodes) if len(part) > 1}
    found: dict[str, list[list[Node]]] = {}
    for name, members in groups.items():
        if name is not None and operator_of(members[0]) in _NORMS:
            found[name] = _chain(members, groups, readers)
    return found


def _readers(graph: Graph) -> Mapping[Ref, list[str]]:
    """Names of the nodes that read each value; an output is a reader without a name."""
    readers: dict[Ref, list[str]] = defaultdict(list)
    for node in graph.nodes:
        for ref in inputs_of(node):
            readers[ref].append(node.name)
    for output in graph.outputs:
        readers[output.ref].append("")
    return readers


def _chain(
    members: Sequence[Node],
    groups: Mapping[str | None, list[Node]],
    readers: Mapping[Ref, list[str]],
) -> list[list[Node]]:
    chain: list[list[Node]] = []
    wanted = {_ADDITION, *_ACTIVATIONS}
    by_reader = {tuple(n.name for n in part): part for part in groups.values()}
    while wanted:
        several = [readers.get(Ref(node.name), []) for node in members]
        following = by_reader.get(tuple(names[0] for names in several if len(names) == 1))
        if following is None or len(following) != len(members):
            break
        operator = operator_of(following[0])
        if operator not in wanted:
            break
        chain.append(following)
        members = following
        wanted = {*_ACTIVATIONS} if operator == _ADDITION else set()
    return chain
