"""What a part of a tape computes, as JSON values: equal parts are equal texts.

Names are numbers in the order of their appearance, so that parts of two trials, or of two blocks of
one network, are one structure. It can be built again, as a graph of torch's, in a process that has
never seen the tape.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from cgo.errors import CgoError
from cgo.runtime.tape import Call, Tape, Value


class StructureError(CgoError):
    """A part that cannot be written down, as it holds a generator, say; it stays as it is."""


@dataclass(frozen=True)
class Part:
    """Calls of a tape that are to become one function: what it reads, in order, and gives."""

    calls: tuple[Call, ...]
    reads: tuple[Value, ...]
    gives: tuple[Value, ...]


@dataclass(frozen=True)
class Structure:
    """A part without its names, for inputs of known types; JSON values."""

    document: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Names it in caches."""
        text = json.dumps(self.document, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    @property
    def calls(self) -> int:
        """How many there are."""
        return len(self.document["calls"])


def whole(tape: Tape) -> Part:
    """All of a tape as one part."""
    return Part(tape.calls, (*tape.inputs, *tape.constants), tape.results)


def structure_of(part: Part, inputs: Sequence[Tensor]) -> Structure:
    """The structure of a part.

    Args:
        part: What to write down.
        inputs: What it reads, in order.

    Raises:
        StructureError: it has arguments that are no plain values.
    """
    numbers = {value: number for number, value in enumerate(part.reads)}
    calls = []
    for call in part.calls:
        arguments = {name: _written(given, numbers) for name, given in call.arguments.items()}
        outputs = []
        for output in call.outputs:
            if output is not None:
                numbers.setdefault(output, len(numbers))
            outputs.append(None if output is None else numbers[output])
        calls.append([str(call.op), arguments, outputs, call.listed])
    return Structure(
        {
            "inputs": [_type_of(tensor) for tensor in inputs],
            "calls": calls,
            "gives": [numbers[value] for value in part.gives],
        }
    )


def _type_of(tensor: Tensor) -> list[Any]:
    return [_name(tensor.dtype), list(tensor.shape), list(tensor.stride()), str(tensor.device)]


def _name(of: object) -> str:
    return str(of).rpartition(".")[2]


_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def _written(given: Any, numbers: Mapping[Value, int]) -> Any:
    if isinstance(given, Value):
        return {"value": numbers[given]}
    if isinstance(given, tuple):
        return [_written(item, numbers) for item in given]
    if isinstance(given, float):  # with its bits, and where it is no finite number
        return {"float": given.hex()}
    if isinstance(given, torch.device):
        return {"device": str(given)}
    if isinstance(given, _NAMED):
        return {"torch": _name(given)}
    if given is None or type(given) in (bool, int, str):
        return given
    raise StructureError(f"an argument is a {type(given).__name__}")


def _read(written: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(written, list):
        return [_read(item, values) for item in written]
    if not isinstance(written, dict):
        return written
    ((kind, held),) = written.items()
    if kind == "value":
        return values[held]
    if kind == "float":
        return float.fromhex(held)
    return torch.device(held) if kind == "device" else getattr(torch, held)


def module_of(structure: Structure) -> fx.GraphModule:
    """A structure as a graph of torch's."""
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    for number in range(len(structure.document["inputs"])):
        nodes[number] = graph.placeholder(f"i{number}")
    for name, arguments, outputs, listed in structure.document["calls"]:
        op = _operator(name)
        keywords = {a.name for a in op._schema.arguments if a.kwarg_only}
        given = {key: _read(value, nodes) for key, value in arguments.items()}
        args = tuple(value for key, value in given.items() if key not in keywords)
        kwargs = {key: value for key, value in given.items() if key in keywords}
        result = graph.call_function(op, args, kwargs)
        several = listed or len(outputs) > 1
        for index, output in enumerate(outputs):
            if output is not None and output not in nodes:
                part = graph.call_function(operator.getitem, (result, index)) if several else result
                nodes[output] = part
    graph.output([nodes[number] for number in structure.document["gives"]])
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


def _operator(name: str) -> Any:
    space, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def examples_of(structure: Structure) -> list[Tensor]:
    """Tensors of the types that a structure reads, full of zeros."""
    found = []
    for dtype, shape, stride, device in structure.document["inputs"]:
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        whole = torch.zeros(max(0, extent), dtype=getattr(torch, dtype), device=device)
        found.append(whole.as_strided(shape, stride))
    return found
