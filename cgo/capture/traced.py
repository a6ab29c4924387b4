"""A step as the operators it called: what recording and exporting both give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from cgo.errors import CaptureError


@dataclass(frozen=True)
class Source:
    """What a placeholder of a traced graph stands for."""

    kind: Literal["parameter", "buffer", "input", "constant"]
    key: str  # the path, or the leaf's name; nothing of a constant
    value: Tensor  # of a constant its content; of others a tensor of the same type
    seen: Tensor | None = None  # of a recording: the tensor itself


@dataclass(frozen=True)
class Setting:
    """What was in force when an operator was called, where it was not what the step began with."""

    detached: bool  # no gradients were recorded
    autocast: tuple[str, Any, bool] | None  # device, dtype, whether it is on


@dataclass(frozen=True)
class Traced:
    """The ATen calls of a step, as a `torch.fx` graph whose output is (loss, prediction).

    Of a recording, `node.meta["val"]` has what a call gave and `node.meta["setting"]` the `Setting`
    where there is one.
    """

    graph: fx.Graph
    sources: Mapping[str, Source]  # by the placeholder's name; nodes of ours come in this order
    owner: fx.GraphModule | None = None  # of an export: has its regions

    @property
    def recorded(self) -> bool:
        """Whether it was recorded, and not exported."""
        return self.owner is None

    def loss(self) -> Tensor | None:
        """Of a recording: what the run gave; None where that was no result of an operator."""
        node: Any = self.graph.output_node().args[0][0]  # type: ignore[index]
        return None if node is None else node.meta.get("val")


def release(graph: fx.Graph) -> None:
    """Let go of what a run computed: nodes refer to each other, so nobody else would soon."""
    for node in graph.nodes:
        node.meta.clear()


def of_export(exported: ExportedProgram, leaves: Mapping[str, Tensor], strip: str) -> Traced:
    """What was exported.

    Args:
        exported: A training-IR export of a `Step`.
        leaves: The batch it was exported with.
        strip: Prefix to take off parameter and buffer paths.

    Raises:
        CaptureError: it has an input of a kind that no graph of ours has.
    """
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    names = iter(leaves)
    sources: dict[str, Source] = {}
    for node in exported.graph_module.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        match spec.kind:
            case InputKind.PARAMETER | InputKind.BUFFER:
                path = str(spec.target).removeprefix(strip)
                kind: Any = "parameter" if spec.kind is InputKind.PARAMETER else "buffer"
                sources[node.name] = Source(kind, path, node.meta["val"])
            case InputKind.USER_INPUT:
                leaf = next(names)
                sources[node.name] = Source("input", leaf, leaves[leaf])
            case InputKind.CONSTANT_TENSOR:
                value = exported.constants[str(spec.target)]
                if not isinstance(value, Tensor):
                    raise CaptureError(f"constant {node.name} is a {type(value).__name__}")
                sources[node.name] = Source("constant", "", value)
            case _:
                raise CaptureError(f"input {node.name} is a {spec.kind.name.lower()}")
    return Traced(exported.graph_module.graph, sources, exported.graph_module)
