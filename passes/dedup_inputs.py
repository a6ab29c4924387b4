"""Equal batches become one input, so that one loader feeds all models that read it."""

from __future__ import annotations

from dataclasses import replace

from cgo.graph import Graph, Node, Ref, rebuild, with_inputs
from cgo.passes.sharing import argument_key


def dedup_inputs(graph: Graph) -> Graph:
    """Share `cgo.input` nodes that stand for the same leaf of the same batches.

    Two inputs are one when data digest, split, size, leaf and type agree.

    Returns:
        The graph with each input once, owned by all models that need it; `graph` itself when no
        two inputs are equal.
    """
    kept: dict[object, str] = {}
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:  # topological order
        if node.op == "cgo.input":
            first = kept.setdefault((argument_key(node.kwargs), node.types), node.name)
            if first != node.name:
                renamed[node.name] = first
                continue
        nodes.append(node)
    if not renamed:
        return graph

    def rename(ref: Ref) -> Ref:
        return replace(ref, name=renamed[ref.name]) if ref.name in renamed else ref

    return rebuild(graph, (with_inputs(node, rename) for node in nodes), renamed)
