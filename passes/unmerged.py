"""Why nodes were left unshared, for `cgo explain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from cgo.graph import SOURCES, STATE, Graph, ModelId, Node, Ref
from cgo.passes.sharing import argument_key, is_own, pure

TRAINED = "depends on trainable parameters"
DRAWS = "draws random numbers of its own model"
RANDOM = "depends on random numbers of its own model"
FROZEN = "frozen values differ between models"
DATA = "reads other data than the same node of other models"
ALONE = "no other model computes it"


@dataclass(frozen=True)
class Family:
    """Operator nodes that one model alone owns, all with one operator and one reason."""

    op: str
    nodes: int
    reason: str
    example: str  # a node's name


def unmerged(graph: Graph) -> tuple[Family, ...]:
    """Families of operator nodes owned by one model only, the largest first.

    Args:
        graph: A graph that the sharing passes have gone over.
    """
    reasons = _reasons(graph)
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for node, reason in zip(graph.nodes, reasons):
        if node.op not in SOURCES and len(node.owners) == 1:
            counts[node.op, reason] += 1
            examples.setdefault((node.op, reason), node.name)
    return tuple(
        Family(op, count, reason, examples[op, reason])
        for (op, reason), count in counts.most_common()
    )


def _reasons(graph: Graph) -> list[str]:
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    # What two nodes would be if contents, or contents and data, were left out of account.
    without_contents = _Blind(STATE | {"cgo.constant"})
    without_data = _Blind(SOURCES)
    causes: list[str | None] = []
    for node in graph.nodes:
        refs: list[Ref] = []
        key = (argument_key(node.args, refs), argument_key(node.kwargs, refs))
        inputs = [position[ref.name] for ref in refs]
        causes.append(_cause(node, [causes[index] for index in inputs]))
        without_contents.add(node, key, inputs)
        without_data.add(node, key, inputs)
    return [
        cause
        or (
            FROZEN
            if without_contents.common(index)
            else DATA
            if without_data.common(index)
            else ALONE
        )
        for index, cause in enumerate(causes)
    ]


def _cause(node: Node, inherited: Collection[str | None]) -> str | None:
    """Why the node could not be shared whatever other models do; None: it could."""
    if is_own(node):
        return DRAWS if node.op == "cgo.random" else TRAINED
    if TRAINED in inherited:
        return TRAINED
    if DRAWS in inherited or RANDOM in inherited:
        return RANDOM
    if node.op not in SOURCES and not pure(node):
        return f"operator {node.op} not on the allow-list"
    blocked = next((cause for cause in inherited if cause is not None), None)
    if blocked is None or blocked.startswith("depends on"):
        return blocked
    return f"depends on {blocked.removesuffix(' not on the allow-list')}, not on the allow-list"


class _Blind:
    """Numbers values as `dedup_stems` does, but takes some sources for equal by their type."""

    def __init__(self, blind: Collection[str]) -> None:
        self._blind = blind
        self._ids: dict[object, int] = {}
        self._numbers: list[int] = []
        self._owners: dict[int, set[ModelId]] = {}

    def add(self, node: Node, arguments: object, inputs: list[int]) -> None:
        """Number one node, after its inputs."""
        known = None if node.op in self._blind else arguments
        values = tuple(self._numbers[index] for index in inputs)
        key = (node.op, known, node.types, node.autocast, values)
        number = self._ids.setdefault(key, len(self._ids))
        self._numbers.append(number)
        self._owners.setdefault(number, set()).update(node.owners)

    def common(self, index: int) -> bool:
        """Whether several models own a node with this node's number."""
        return len(self._owners[self._numbers[index]]) > 1
