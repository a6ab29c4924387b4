"""How wide groups are executed, as rules: which as one operator, in chunks, or as a loop.

Fusing saves the fixed cost of calls; what it costs is that a whole group's values pass through the
cache at once, and are copied together where their memberships differ. So small members are fused,
and large ones run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cgo.graph import Graph, Node, TensorType, inputs_of
from cgo.runtime.emitter import runs

#: Marks the name of a group that is executed as a loop.
LOOP = "~"


@dataclass(frozen=True)
class Rules:
    """What is fused on a device.

    Args:
        most_lane_bytes: A group is a loop where one member's largest value is larger.
        most_group_bytes: A group is executed in chunks whose values are no larger in all.
    """

    most_lane_bytes: float = math.inf
    most_group_bytes: float = math.inf

    def __call__(self, graph: Graph) -> Graph:
        """Rename groups: `g7~` is a loop, `g7.0` and `g7.1` are chunks of `g7`."""
        types = {node.name: node.types for node in graph.nodes}
        nodes: list[Node] = []
        for members in runs(graph.nodes):
            name = members[0].group
            if name is None:
                nodes += members
                continue
            lane = _lane_bytes(members[0], types)
            width = self._width(lane, len(members))
            if width == 1:
                nodes += [replace(member, group=name + LOOP) for member in members]
            elif width >= len(members):
                nodes += members
            else:
                nodes += _chunked(members, name, width)
        same = len(nodes) == len(graph.nodes) and all(a is b for a, b in zip(nodes, graph.nodes))
        return graph if same else Graph(tuple(nodes), graph.outputs)

    def _width(self, lane: int, size: int) -> int:
        """Members that are executed together; 1 for a loop."""
        if lane > self.most_lane_bytes:
            return 1
        if lane * size <= self.most_group_bytes:
            return size
        chunks = math.ceil(lane * size / self.most_group_bytes)
        return max(1, math.ceil(size / chunks))


def rules_for(device: torch.device) -> Rules:
    """What measurements on devices of this kind suggest."""
    import os
    if device.type == "cpu":
        return Rules(most_lane_bytes=float(os.environ.get("LB", 2**18)), most_group_bytes=float(os.environ.get("GB", "inf")))
    return Rules()


def _chunked(members: Sequence[Node], name: str, width: int) -> list[Node]:
    found = []
    for number, start in enumerate(range(0, len(members), width)):
        chunk = members[start : start + width]
        group = f"{name}.{number}" if len(chunk) > 1 else None
        found += [replace(member, group=group) for member in chunk]
    return found


def _lane_bytes(node: Node, types: dict[str, tuple[TensorType | None, ...]]) -> int:
    """The largest value that a node reads or gives; weights count as well."""
    read = [types[ref.name][ref.index] for ref in inputs_of(node)]
    return max(map(_bytes, [*read, *node.types]), default=0)


def _bytes(type_: TensorType | None) -> int:
    if type_ is None:
        return 0
    return math.prod(type_.shape) * getattr(torch, type_.dtype).itemsize
