"""N graphs become one; nothing is shared yet."""

from __future__ import annotations

from collections.abc import Sequence

from cgo.errors import GraphError
from cgo.graph import Graph


def merge(graphs: Sequence[Graph]) -> Graph:
    """Put graphs of different models side by side.

    Args:
        graphs: Each in topological order, with node names that begin with its model's id.

    Returns:
        One graph: the nodes of the first graph, then those of the second, and so on. The graph
        itself where there is only one.

    Raises:
        GraphError: two graphs have a node of the same name; names both models.
    """
    if len(graphs) == 1:
        return graphs[0]
    homes: dict[str, int] = {}
    for index, graph in enumerate(graphs):
        for node in graph.nodes:
            other = homes.setdefault(node.name, index)
            if other != index:
                raise GraphError(
                    f"cannot merge models {_models(graphs[other])} and {_models(graph)}: both "
                    f"have a node called %{node.name}; give one of them another model_id"
                )
    return Graph(
        tuple(node for graph in graphs for node in graph.nodes),
        tuple(output for graph in graphs for output in graph.outputs),
    )


def _models(graph: Graph) -> str:
    return ", ".join(repr(model) for model in dict.fromkeys(o.model for o in graph.outputs))
