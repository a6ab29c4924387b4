"""A call of any operator, with arguments of its schema's types, put into a document.

Its result becomes part of the loss, so that what the document asks for is run, forward and
backward, wherever the checks at the door let it through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from torch import Tensor

from cgo.dtypes import DTYPES
from cgo.graph import Node, TensorType, inputs_of
from cgo.operators import aten
from cgo.runtime.admission import Calls
from cgo.runtime.unchecked import refusal
from cgo.runtime.watching import Limits, Refused
from cgo.wire import decode_argument

SMALL = [-2, -1, 0, 1, 1, 2, 2, 3, 4, 5]
LARGE = [-(2**63), -(2**31), 100, 1000, 2**15, 2**20, 2**31 - 1, 2**40, 2**62, 2**63 - 1]
NUMBERS = [0.0, 0.5, 1.0, 2.0, -1.0, 1e-30, 1e30, 3]
TEXTS = ["mean", "sum", "none", "floor", "trunc", "reflect", "constant", "replicate", "circular",
         "ij,jk->ik", "...->", "i->", "same", "valid", "tanh", "nearest", "linear", "ortho", "fro",
         "nuc", "bilinear", "amax", "prod", "reduced", "L", ""]  # fmt: skip


def _int(dice: Random) -> int:
    return dice.choice(SMALL) if dice.random() < 0.93 else dice.choice(LARGE)


def argument(kind: str, dice: Random, values: list[Any]) -> Any:
    """A JSON argument of a schema's type; None where there is none."""
    if kind.startswith("Optional["):
        return None if dice.random() < 0.5 else argument(kind[9:-1], dice, values)
    if kind.startswith("List["):
        count = dice.choice([0, 1, 1, 2, 2, 2, 3, 4])
        return [argument(kind[5:-1], dice, values) for _ in range(count)]
    match kind:
        case "Tensor":
            return {"ref": list(dice.choice(values))}
        case "int":
            return _int(dice)
        case "bool":
            return dice.random() < 0.5
        case "float":
            return float(dice.choice(NUMBERS))
        case "number":
            return dice.choice(NUMBERS)
        case "str":
            return dice.choice(TEXTS)
        case "Device":
            return {"symbol": ["device", "trial"]}
    return None


#: Arguments that are numbers in schemas, and names in documents, by what they really are.
_NAMED = {
    "ScalarType": lambda dice: {"symbol": ["dtype", dice.choice(sorted(DTYPES))]},
    "Layout": lambda dice: {"symbol": ["layout", "strided"]},
    "MemoryFormat": lambda dice: {
        "symbol": ["memory_format", dice.choice(["contiguous_format", "channels_last"])]
    },
}


def drawn_call(op: str, dice: Random, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and keyword arguments for an operator."""
    args, kwargs = [], {}
    for given in aten(op)._schema.arguments:
        if given.has_default_value() and dice.random() < 0.4:
            if not given.kwarg_only and not kwargs:
                break
            continue
        real = str(given.real_type).removeprefix("Optional[").removesuffix("]")
        named = _NAMED.get(real)
        value = argument(str(given.type), dice, values) if named is None else named(dice)
        if given.kwarg_only:
            kwargs[given.name] = value
        else:
            args.append(value)
    return args, kwargs


def call_of(op: str, args: list[Any], kwargs: dict[str, Any], types: Any = ()) -> Node:
    """The node that a document says so."""
    named = tuple((key, decode_argument(value)) for key, value in sorted(kwargs.items()))
    made = tuple(
        None if type_ is None else TensorType(type_["dtype"], tuple(type_["shape"]))
        for type_ in types
    )
    return Node("drawn", op, decode_argument(args), named, made, frozenset({"a"}))


def types_read(node: Node, types: Mapping[Any, Any]) -> list[TensorType]:
    """Types of what it reads, in order, by what documents say of (node, index)."""
    return [
        TensorType(types[ref.name, ref.index]["dtype"], tuple(types[ref.name, ref.index]["shape"]))
        for ref in inputs_of(node)
    ]


#: Types of a call that has to be refused: what torch says of it may take for ever, or end it all.
_ANY = [{"dtype": "float32", "shape": []}]
CALLS = Calls(Limits())


def types_of(node: Node, given: Sequence[TensorType]) -> list[Any] | None:
    """What torch says that a call gives, as a document's types; None where it refuses it."""
    if refusal(node, given) is not None:
        return _ANY
    try:
        several = CALLS.results(node, given)
    except Refused:
        return _ANY
    except Exception:
        return None
    return [
        {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if isinstance(value, Tensor)
        else None
        for value in several
    ]


def insert_call(document: Any, dice: Random, operators: list[str], tries: int = 40) -> str | None:
    """Add a call to one model's first training program and its sum to the loss; the operator."""
    output = next(o for o in document["outputs"] if o["role"] == "loss" and "train" in o["program"])
    model, program = output["model"], output["program"]
    nodes = {node["name"]: node for node in document["nodes"]}
    loss = output["ref"]["ref"]
    before = document["nodes"][: [*nodes].index(loss[0]) + 1]
    values = [
        (node["name"], index)
        for node in before
        if model in node["owners"] and node.get("autocast") == nodes[loss[0]].get("autocast")
        for index, type_ in enumerate(node["types"])
        if type_ is not None and (node["name"].count("/") < 2 or f"/{program}/" in node["name"])
    ]
    shapes = {(name, index): nodes[name]["types"][index] for name, index in values}
    for _ in range(tries):
        op = dice.choice(operators)
        if aten(op) is None:
            continue
        args, kwargs = drawn_call(op, dice, values)
        node = call_of(op, args, kwargs)
        types = types_of(node, types_read(node, shapes))
        if types is None or not types or types[0] is None:
            continue
        index = dice.choice([i for i, type_ in enumerate(types) if type_ is not None])
        _append(document, nodes, output, op, args, kwargs, types, index)
        return op
    return None


def _append(
    document: Any, nodes: Any, output: Any, op: str, args: Any, kwargs: Any, types: Any, index: int
) -> None:
    model, program = output["model"], output["program"]
    scalar = [nodes[output["ref"]["ref"][0]]["types"][output["ref"]["ref"][1]]]
    dtype = {"symbol": ["dtype", scalar[0]["dtype"]]}
    name = f"{model}/{program}/drawn"
    more = [
        {"name": name, "op": op, "args": args, "kwargs": kwargs, "types": types},
        {"name": f"{name}_sum", "op": "aten.sum.default", "args": [{"ref": [name, index]}],
         "kwargs": {"dtype": dtype}, "types": scalar},
        {"name": f"{name}_add", "op": "aten.add.Tensor",
         "args": [output["ref"], {"ref": [f"{name}_sum", 0]}], "types": scalar},
    ]  # fmt: skip
    autocast = nodes[output["ref"]["ref"][0]].get("autocast")
    for node in more:
        node["owners"] = [model]
        if autocast is not None:
            node["autocast"] = autocast
        if "kwargs" in node:
            node["kwargs"] = dict(sorted(node["kwargs"].items()))
    # What it reads is now of one model more, where it was shared or dead before: named anew below.
    document["nodes"] += more
    output["ref"] = {"ref": [f"{name}_add", 0]}
    own_again(document)


def own_again(document: Any) -> None:
    """Owners as the outputs now ask for them."""
    owners: dict[str, set[str]] = {}
    for output in document["outputs"]:
        owners.setdefault(output["ref"]["ref"][0], set()).add(output["model"])
    for node in reversed(document["nodes"]):
        for name in _read([node.get("args", []), node.get("kwargs", {})]):
            owners.setdefault(name, set()).update(owners.get(node["name"], ()))
    for node in document["nodes"]:
        node["owners"] = sorted(owners.get(node["name"], ()))


def _read(value: Any) -> list[str]:
    if isinstance(value, dict):
        if "ref" in value:
            return [value["ref"][0]]
        return [name for item in value.values() for name in _read(item)]
    return [name for item in value for name in _read(item)] if isinstance(value, list) else []
