"""A model equal to another in every respect is trained once and reported twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cgo.graph import Graph, ModelId, restrict


def find_aliases(contents: Mapping[ModelId, str]) -> dict[ModelId, ModelId]:
    """Which models need no training of their own.

    Args:
        contents: For each model, in order of submission, a digest of all that decides its result.

    Returns:
        Each later model whose digest was seen before, mapped to the first with that digest.
    """
    first: dict[str, ModelId] = {}
    twins = {model: first.setdefault(content, model) for model, content in contents.items()}
    return {model: twin for model, twin in twins.items() if twin != model}


@dataclass(frozen=True)
class AliasModels:
    """Drop what only aliases need.

    `aliases` maps each model that is not to be trained to the equal one that is.
    """

    aliases: Mapping[ModelId, ModelId]

    def __call__(self, graph: Graph) -> Graph:
        """The graph without the aliases' outputs; the same object when it has none."""
        models = {output.model for output in graph.outputs}
        if models.isdisjoint(self.aliases):
            return graph
        return restrict(graph, models=models - self.aliases.keys())
