"""Documents put together, for models that join others which train already.

A trial imports this, and with it the passes that merge, when somebody joins it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cgo import weights
from cgo.commands import JOINED
from cgo.division import share_file
from cgo.errors import GraphDataError
from cgo.graph import Graph
from cgo.graph_data import FileRef, GraphData, file_sha256
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.pipeline import Pass, run_pipeline
from cgo.paths import replacing


def union(data: GraphData, added: GraphData) -> GraphData:
    """The models of two documents in one, side by side: nothing is shared between the two.

    Args:
        data: Its settings and its folder are the union's.
        added: Its constants are left to `write_union`.

    Raises:
        GraphDataError: both have a model of the same id.
        GraphError: both have a node of the same name.
    """
    known = {entry.id for entry in data.models} | data.aliases.keys()
    ids = [entry.id for entry in added.models] + list(added.aliases)
    if twice := sorted(known.intersection(ids)):
        raise GraphDataError(f"models {', '.join(twice[:5])} are there already")
    graphs = [g for g in (data.graph, _apart(added.graph, data.graph)) if g.nodes]
    return replace(
        data,
        models=(*data.models, *added.models),
        data={**data.data, **added.data},
        graph=merge(graphs) if graphs else data.graph,
        aliases={**data.aliases, **added.aliases},
        experiment={**data.experiment, JOINED: True},
    )


def _apart(graph: Graph, other: Graph) -> Graph:
    """The graph with names of groups that the other does not have."""
    taken = {node.group for node in other.nodes if node.group is not None}
    groups = {node.group for node in graph.nodes if node.group is not None}
    if taken.isdisjoint(groups):
        return graph
    number = 1
    while any(f"{number}.{group}" in taken for group in groups):
        number += 1
    nodes = (n if n.group is None else replace(n, group=f"{number}.{n.group}") for n in graph.nodes)
    return Graph(tuple(nodes), graph.outputs)


def write_union(
    whole: GraphData, added: GraphData, folder: Path, constants: Mapping[str, Tensor]
) -> GraphData:
    """Make a folder's document the union, so that a crash leaves either the old one or the new.

    Args:
        whole: What `union` gave.
        added: The document that joined; its files are put into the folder, too.
        folder: The trial's.
        constants: All that the union's graph refers to.

    Returns:
        The union, with its files.

    Raises:
        OSError: a file cannot be written.
    """
    for what, file in added.files().items():
        if what != "constants":
            share_file(added.base, folder, file)
    reference = whole.constants
    if constants and added.constants is not None:
        name = f"constants-{file_sha256(added.base / added.constants.file)[:16]}.safetensors"
        weights.save(folder / name, constants)
        reference = FileRef(name, file_sha256(folder / name))
    whole = replace(whole, constants=reference, base=folder)
    with replacing(folder / "graph.json") as stream:
        stream.write(whole.to_json().encode())
    return whole


def regrouped(graphs: Sequence[Graph], options: BatchOperators | None) -> Graph:
    """Merge graphs that passes went over before, as if their models had been planned together.

    Args:
        graphs: Of different models. What is shared and grouped within one may be so with others.
        options: Which operators may be fused; None: none.

    Returns:
        One graph, its nodes under their own names.
    """
    # By id, as the planner does it: what is grouped does not depend on who came first.
    ordered = sorted(graphs, key=lambda graph: min((o.model for o in graph.outputs), default=""))
    graph = merge([_ungrouped(graph) for graph in ordered])
    passes: list[Pass] = [dedup_inputs, dedup_stems]
    return run_pipeline(graph, passes if options is None else [*passes, options])


def _ungrouped(graph: Graph) -> Graph:
    if all(node.group is None for node in graph.nodes):
        return graph
    nodes = (n if n.group is None else replace(n, group=None) for n in graph.nodes)
    return Graph(tuple(nodes), graph.outputs)


# --- the settings of a document -------------------------------------------------------------------

_FUSING = "batch_operators"


def fusing_as_json(options: BatchOperators | None) -> dict[str, Any]:
    """What a document's settings say of fusing."""
    if options is None:
        return {_FUSING: None}
    only = None if options.only is None else sorted(options.only)
    found = {"max_width": options.max_width, "only": only, "without": sorted(options.without)}
    return {_FUSING: found}


def fusing_of(data: GraphData) -> BatchOperators | None:
    """Which operators of a document's models may be fused, as its settings or its groups say.

    Raises:
        GraphDataError: the settings have another form.
    """
    if _FUSING not in data.experiment:
        grouped = any(node.group is not None for node in data.graph.nodes)
        return BatchOperators() if grouped else None
    found = data.experiment[_FUSING]
    if found is None:
        return None
    if not _is_fusing(found):
        raise GraphDataError(f"experiment: {_FUSING} has another form: {found!a:.200}")
    only = None if found["only"] is None else frozenset(found["only"])
    return BatchOperators(found["max_width"], only, frozenset(found["without"]))


def _is_fusing(found: Any) -> bool:
    if not isinstance(found, dict) or found.keys() != {"max_width", "only", "without"}:
        return False
    width, names = found["max_width"], (found["only"] or [], found["without"])
    known = width is None or (type(width) is int and width > 0)
    return known and all(
        isinstance(part, list) and all(isinstance(name, str) for name in part) for part in names
    )
