"""What merging did, in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cgo.capture import Captured
from cgo.graph import Graph, ModelId
from cgo.model import Model
from cgo.passes.unmerged import Family, unmerged
from cgo.worth import Estimate


@dataclass(frozen=True)
class MergeReport:
    """What merging did: counts for people, kept with the trial."""

    passes: tuple[tuple[str, int, int], ...]  # name, nodes before, nodes after
    models: int
    captured: int
    loaders_before: int
    loaders: int
    stems_shared: int  # nodes with several owners that are not inputs
    grouped: int  # nodes that are fused with others, of all programs
    groups: int  # fused operators that they become
    aliases: Mapping[ModelId, ModelId]
    opaque: Mapping[ModelId, str]
    unmerged: tuple[Family, ...]
    capture_s: float
    merge_s: float
    estimate: Estimate | None = None  # of merging and not; None: it was not asked for

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def report_of(
    models: Sequence[Model],
    captured: Mapping[ModelId, Captured],
    aliases: Mapping[ModelId, ModelId],
    graph: Graph,
    counts: Sequence[tuple[str, int, int]],
    capture_s: float,
    merge_s: float,
) -> MergeReport:
    """The figures of one plan."""
    opaque = {
        id_: item.entry.opaque for id_, item in captured.items() if item.entry.opaque is not None
    }
    shared = [node for node in graph.nodes if len(node.owners) > 1 and node.op != "cgo.input"]
    return MergeReport(
        passes=tuple(counts),
        models=len(models),
        captured=len(models) - len(opaque),
        loaders_before=len(models),
        loaders=len({model.data.digest for model in models}),
        stems_shared=len(shared),
        grouped=sum(node.group is not None for node in graph.nodes),
        groups=len({node.group for node in graph.nodes if node.group is not None}),
        aliases=dict(aliases),
        opaque=opaque,
        unmerged=unmerged(graph),
        capture_s=capture_s,
        merge_s=merge_s,
    )
