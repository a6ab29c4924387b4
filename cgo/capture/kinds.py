"""Kinds of recordings: the same calls, of other sizes.

What can go wrong in a capture lies in the code of a module and in the operators it calls, not in
widths and batch sizes. So one program of a kind is compared with its eager module, and what was
recorded of another is taken as it is: it holds its own sizes, read off its own run.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from cgo.capture.traced import Traced
from cgo.model import TrainingSpec, as_json, digest_of
from cgo.private.operators import OpOverload


def kind_of(traced: Traced, module: nn.Module, training: TrainingSpec, split: str) -> str:
    """A digest that is equal for recordings which differ in nothing but sizes.

    Args:
        traced: A recording.
        module: What was recorded: classes, modes and hooks of its parts count.
        training: Its loss and precision count.
        split: "train" or "validation".
    """
    places = {node: index for index, node in enumerate(traced.graph.nodes)}
    calls = [_call(node, places, traced) for node in traced.graph.nodes]
    spec = as_json(training)
    return digest_of([split, calls, _code(module), spec["loss"], spec["precision"]])


def _code(module: nn.Module) -> list[list[Any]]:
    """Whose code runs: classes of parts, each once, and functions that were hung onto them."""
    found = {repr(_part(part)): _part(part) for part in module.modules()}
    return [found[key] for key in sorted(found)]


def _part(part: nn.Module) -> list[Any]:
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    functions = [value for value in vars(part).values() if callable(value)]
    named = [getattr(f, "__qualname__", type(f).__qualname__) for f in (*hooks, *functions)]
    backward = len(part._backward_hooks) + len(part._backward_pre_hooks)
    return [type(part).__module__, type(part).__qualname__, part.training, named, backward]


def _call(node: fx.Node, places: dict[fx.Node, int], traced: Traced) -> list[Any]:
    source = traced.sources.get(node.name)
    if source is not None:
        trained = source.seen is not None and source.seen.requires_grad
        key = source.key if source.kind == "input" else ""
        return [source.kind, key, trained, *_type(source.value)]
    values = [node.meta.get("val")] if not isinstance(node.meta.get("val"), (tuple, list)) else [
        *node.meta["val"]
    ]  # fmt: skip
    setting = node.meta.get("setting")
    sizes = _sizes(node.target) if isinstance(node.target, OpOverload) else frozenset()
    given = [_argument(value, places, index in sizes) for index, value in enumerate(node.args)]
    named = [[k, _argument(v, places, k in sizes)] for k, v in sorted(node.kwargs.items())]
    types = [_type(value) for value in values if isinstance(value, Tensor)]
    return [str(node.target), given, named, types, repr(setting)]


def _type(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), tensor.dim(), tensor.requires_grad, tensor.is_contiguous()]


def _argument(value: Any, places: dict[fx.Node, int], size: bool) -> Any:
    if isinstance(value, fx.Node):
        return ["node", places[value]]
    if isinstance(value, (tuple, list)):
        return [_argument(item, places, size) for item in value]
    if size and type(value) is int:
        return "size" if value >= 0 else value
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    return [type(value).__name__, repr(value)]


_NAME = re.compile(r"SymInt(?:\[\d*\])?\??\s+(\w+)")


@cache
def _sizes(overload: OpOverload) -> frozenset[int | str]:
    """Arguments that are sizes, by place and name; torch's schemas call these `SymInt`."""
    names = set(_NAME.findall(str(overload._schema)))
    places = {i for i, a in enumerate(overload._schema.arguments) if a.name in names}
    return frozenset(places | names)
