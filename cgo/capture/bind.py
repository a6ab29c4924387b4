"""From captured programs, which name no model, to the graph of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from cgo.capture.convert import Program
from cgo.capture.validate import program_graph
from cgo.graph import Argument, Graph, Node, Output, Ref, prune, with_inputs
from cgo.model import Model
from cgo.weights import tensor_hash


def bind(programs: Mapping[str, Program], model: Model, module: nn.Module) -> Graph:
    """All programs of one model as one graph; they share its parameters and buffers.

    Names become "<model>/<path>" for state and "<model>/<program>/<name>" for the rest (an id may
    hold dots, but no slash); sources learn whose they are and the content of frozen values.
    """
    return _Binder(model, module).run(programs)


class _Binder:
    def __init__(self, model: Model, module: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        self.tensors |= dict(module.named_buffers(remove_duplicate=False))
        self.nodes: dict[str, Node] = {}

    def run(self, programs: Mapping[str, Program]) -> Graph:
        outputs: list[Output] = []
        for name, program in programs.items():
            part = program_graph(program, name, self.model.model_id)
            names = {node.name: self._name(node, name) for node in part.nodes}
            for node in part.nodes:
                self._place(node, name, names)
            outputs += [
                replace(output, ref=Ref(names[output.ref.name], output.ref.index))
                for output in part.outputs
            ]
        return prune(Graph(tuple(self.nodes.values()), tuple(outputs)))

    def _name(self, node: Node, program: str) -> str:
        if node.op in ("cgo.parameter", "cgo.buffer"):
            return f"{self.model.model_id}/{node.keyword('path')}"
        return f"{self.model.model_id}/{program}/{node.name}"

    def _place(self, node: Node, program: str, names: Mapping[str, str]) -> None:
        name = names[node.name]
        if name in self.nodes:
            return
        bound = with_inputs(node, lambda ref: Ref(names[ref.name], ref.index))
        kwargs = dict(bound.kwargs) | self._facts(node, program)
        owners = frozenset({self.model.model_id})
        self.nodes[name] = replace(
            bound, name=name, kwargs=tuple(sorted(kwargs.items())), owners=owners
        )

    def _facts(self, node: Node, program: str) -> dict[str, Argument]:
        split, _, size = program.partition("/")
        match node.op:
            case "cgo.input":
                return {"data": self.model.data.digest, "split": split, "size": int(size)}
            case "cgo.parameter":
                tensor = self.tensors[str(node.keyword("path"))]
                content = "" if tensor.requires_grad else tensor_hash(tensor)
                facts: dict[str, Argument] = {"trainable": tensor.requires_grad}
                return facts | {"content": content, "model": self.model.model_id}
            case "cgo.buffer":
                tensor = self.tensors[str(node.keyword("path"))]
                return {"content": tensor_hash(tensor), "model": self.model.model_id}
            case "cgo.random":
                return {"model": self.model.model_id}
        return {}
