"""From a program of the graph to a Python function over tensors.

Lowering writes a `torch.fx` graph and lets fx generate straight-line code, so that a training step
pays for its operators and for nothing that walks a graph.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cgo.errors import GraphError
from cgo.graph import SOURCES, Argument, Graph, Node, Output, Ref, Symbol, inputs_of, restrict
from cgo.operators import aten
from cgo.runtime.operators import batch_norm, batch_norm_copying, symbol_value

#: Nodes whose value is handed to the program.
HANDED = SOURCES | {"cgo.random"}


@dataclass(frozen=True)
class Lowered:
    """One program, ready to run.

    Calling it with one tensor for each of `sources`, in order, gives one tensor for each of
    `outputs`, in order.
    """

    sources: tuple[Node, ...]
    outputs: tuple[Output, ...]
    regions: tuple[_Region, ...]
    device: torch.device

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Run the program."""
        if len(self.regions) == 1 and self.regions[0].autocast is None:
            region = self.regions[0]  # reads all sources and writes all outputs, in order
            return list(region.function(*values))
        results: list[Tensor] = [None] * len(self.outputs)  # type: ignore[list-item]
        for region in self.regions:
            with region.context(self.device):
                returned = region.function(*[values[index] for index in region.reads])
            for index, value in zip(region.writes, returned):
                results[index] = value
        return results


@dataclass(frozen=True)
class _Region:
    """The nodes of a program that run under one autocast setting; regions are independent."""

    autocast: str | None
    function: Callable[..., Sequence[Tensor]]
    reads: tuple[int, ...]  # positions in sources
    writes: tuple[int, ...]  # positions in outputs

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.autocast))


def lower(graph: Graph, program: str, device: torch.device) -> Lowered:
    """Make one program of a graph executable.

    Args:
        graph: The merged graph, restricted to the models that are to run.
        program: The program's name, such as "train/64".
        device: Where its tensors are.

    Raises:
        GraphError: the graph has no such program, or nodes of different autocast settings feed
            each other.
    """
    part = restrict(graph, program=program)
    if not part.outputs:
        raise GraphError(f"the graph has no program {program!r}")
    sources = tuple(node for node in part.nodes if node.op in HANDED)
    settings = _settings(part)
    regions = tuple(
        _region(part, sources, settings, setting, device)
        for setting in dict.fromkeys(settings.values())
    )
    return Lowered(sources, part.outputs, regions, device)


def _settings(part: Graph) -> dict[str, str | None]:
    """The autocast setting under which each node runs; a source alone has none."""
    settings: dict[str, str | None] = {}
    for node in part.nodes:
        if node.op in HANDED:
            continue
        for ref in inputs_of(node):
            if settings.get(ref.name, node.autocast) != node.autocast:
                raise GraphError(
                    f"%{node.name} (autocast {node.autocast}) reads %{ref.name} "
                    f"(autocast {settings[ref.name]})"
                )
        settings[node.name] = node.autocast
    for output in part.outputs:  # an output that is a source itself
        settings.setdefault(output.ref.name, None)
    return settings


def _region(
    part: Graph,
    sources: tuple[Node, ...],
    settings: dict[str, str | None],
    setting: str | None,
    device: torch.device,
) -> _Region:
    nodes = [n for n in part.nodes if n.op not in HANDED and settings[n.name] == setting]
    writes = tuple(
        index for index, output in enumerate(part.outputs) if settings[output.ref.name] == setting
    )
    needed = {ref.name for node in nodes for ref in inputs_of(node)}
    needed |= {part.outputs[index].ref.name for index in writes}
    reads = tuple(index for index, source in enumerate(sources) if source.name in needed)
    builder = _Builder(device, _readers(part))
    builder.place([sources[index] for index in reads])
    for node in nodes:
        builder.call(node)
    function = builder.finish([part.outputs[index].ref for index in writes])
    return _Region(setting, function, reads, writes)


def _readers(part: Graph) -> Counter[Ref]:
    readers = Counter(ref for node in part.nodes for ref in inputs_of(node))
    for ref in {output.ref for output in part.outputs}:
        readers[ref] += 1
    return readers


class _Builder:
    def __init__(self, device: torch.device, readers: Counter[Ref]) -> None:
        self.graph = fx.Graph()
        self.device = device
        self.readers = readers
        self.values: dict[Ref, fx.Node] = {}

    def place(self, sources: Sequence[Node]) -> None:
        for index, source in enumerate(sources):
            self.values[Ref(source.name)] = self.graph.placeholder(f"s{index}")

    def call(self, node: Node) -> None:
        args = tuple(self._argument(argument) for argument in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs}
        result = self.graph.call_function(self._kernel(node), args, kwargs)
        if len(node.types) == 1 and not _returns_list(node):
            self.values[Ref(node.name)] = result
            return
        for index in range(len(node.types)):
            ref = Ref(node.name, index)
            if self.readers[ref]:
                self.values[ref] = self.graph.call_function(_item, (result, index))

    def finish(self, results: Sequence[Ref]) -> Callable[..., Sequence[Tensor]]:
        self.graph.output(tuple(self.values[ref] for ref in results))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        # The plain function: a module call costs more than several small operators.
        forward: Callable[..., Sequence[Tensor]] = type(module).forward

        def run(*values: Tensor) -> Sequence[Tensor]:
            return forward(module, *values)

        return run

    def _kernel(self, node: Node) -> Callable[..., Any]:
        if node.op == "cgo.batch_norm":
            alone = all(
                isinstance(argument, Ref) and self.readers[argument] == 1
                for argument in node.args[3:5]
            )
            return batch_norm if alone else batch_norm_copying
        overload = aten(node.op)
        if overload is None:
            raise GraphError(f"%{node.name}: operator {node.op} has no kernel")
        return overload  # type: ignore[no-any-return]

    def _argument(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return self.values[argument]
        if isinstance(argument, Symbol):
            return symbol_value(argument, self.device)
        if isinstance(argument, tuple):
            return [self._argument(item) for item in argument]
        return argument


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def _returns_list(node: Node) -> bool:
    """Whether an operator with one output returns it in a list (`split` into one piece)."""
    overload = aten(node.op)
    return overload is not None and str(overload._schema.returns[0].type).startswith("List")
