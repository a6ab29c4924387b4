"""A call of any operator, with arguments of its schema's types, put into a document.

Its result becomes part of the loss, so that what the document asks for is run, forward and
backward, wherever the checks at the door let it through.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cgo.dtypes import DTYPES
from cgo.operators import aten
from cgo.runtime.admission import silent
from cgo.runtime.watching import Limits, Refused, Watch
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


def types_of(op: str, args: Any, kwargs: Any, nodes: dict[str, Any]) -> list[Any] | None:
    """What torch says that a call gives, as a document's types; None where it refuses it.

    A call that has to be refused gets some type: torch takes it, if it ever ends.
    """

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(item) for item in value]
        if isinstance(value, dict) and "ref" in value:
            name, index = value["ref"]
            type_ = nodes[name]["types"][index]
            return torch.empty(type_["shape"], dtype=getattr(torch, type_["dtype"]))
        if isinstance(value, dict):
            found = decode_argument(value)
            return torch.device("cpu") if found.kind == "device" else getattr(torch, found.value)
        return value

    try:
        with silent(), torch.no_grad(), FakeTensorMode(), Watch(Limits()):
            result = aten(op)(*map(real, args), **{k: real(v) for k, v in kwargs.items()})
    except Refused:
        return [{"dtype": "float32", "shape": []}]
    except Exception:
        return None
    several = result if isinstance(result, (list, tuple)) else [result]
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
    for _ in range(tries):
        op = dice.choice(operators)
        if aten(op) is None:
            continue
        args, kwargs = drawn_call(op, dice, values)
        types = types_of(op, args, kwargs, nodes)
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
