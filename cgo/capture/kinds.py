"""Kinds of recorded calls: the same operator on the same types, of other sizes.

What can go wrong in a capture lies in the code of modules, in the operators it calls, and in
constants, which may be what a single run had; not in widths, depths or batch sizes. So of each
model one training program is compared with its module; and another program only where it holds a
call that no program of the same classes held which was found to be right.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

from cgo.capture.traced import Source, Traced
from cgo.model import TrainingSpec, as_json, digest_of
from cgo.private.operators import OpOverload
from cgo.weights import tensor_hash


class Kinds:
    """Calls that were found to be captured rightly, by whose code made them."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] = {}

    def knows(self, traced: Traced, module: nn.Module, training: TrainingSpec, split: str) -> bool:
        """Whether every call of a recording is of a known kind.

        Args:
            traced: The recording.
            module: What was recorded: classes, modes and functions of its parts count.
            training: Its loss and precision count.
            split: "train" or "validation".
        """
        return _calls(traced) <= self._known.get(_code(module, training, split), set())

    def learn(self, traced: Traced, module: nn.Module, training: TrainingSpec, split: str) -> None:
        """Add the calls of a recording that was found to be right."""
        self._known.setdefault(_code(module, training, split), set()).update(_calls(traced))


def skeleton(traced: Traced) -> list[str]:
    """A recording without its sizes: equal for two that do the same with the same."""
    places = {node.name: place for place, node in enumerate(traced.graph.nodes)}
    read = [str([places[n.name] for n in node.all_input_nodes]) for node in traced.graph.nodes]
    calls = (_call(node, traced) for node in traced.graph.nodes)
    sources = (f"{source.kind} {_key(source)}" for source in traced.sources.values())
    return [*map("".join, zip(calls, read)), *sources]


def _code(module: nn.Module, training: TrainingSpec, split: str) -> str:
    """Whose code runs: classes of parts, each once, and functions that were hung onto them."""
    found = {repr(_part(part)) for part in module.modules()}
    spec = as_json(training)
    return digest_of([sorted(found), split, spec["loss"], spec["precision"]])


def _part(part: nn.Module) -> list[Any]:
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    functions = [value for value in vars(part).values() if callable(value)]
    named = [getattr(f, "__qualname__", type(f).__qualname__) for f in (*hooks, *functions)]
    backward = len(part._backward_hooks) + len(part._backward_pre_hooks)
    return [type(part).__module__, type(part).__qualname__, part.training, named, backward]


def _calls(traced: Traced) -> set[str]:
    return {_call(node, traced) for node in traced.graph.nodes if node.op == "call_function"}


def _call(node: fx.Node, traced: Traced) -> str:
    """A call without its sizes, made once: a skeleton and a set of calls are made of them."""
    found: str | None = node.meta.get("call")
    if found is None:
        found = node.meta["call"] = _made_call(node, traced)
    return found


def _made_call(node: fx.Node, traced: Traced) -> str:
    sizes = _sizes(node.target) if isinstance(node.target, OpOverload) else frozenset()
    given = [_argument(value, traced, index in sizes) for index, value in enumerate(node.args)]
    named = [(k, _argument(v, traced, k in sizes)) for k, v in sorted(node.kwargs.items())]
    return repr((str(node.target), given, named, node.meta.get("setting")))


def _argument(value: Any, traced: Traced, size: bool) -> Any:
    if isinstance(value, fx.Node):
        source = traced.sources.get(value.name)
        if source is None:
            return _types(value.meta.get("val"))
        named = source.kind in ("input", "constant")
        return source.kind, _key(source) if named else "", _types(source.value)
    if isinstance(value, (tuple, list)):
        return [_argument(item, traced, size) for item in value]
    if size and type(value) is int:
        return "size" if value >= 0 else value
    return value


def _types(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.requires_grad, value.is_contiguous()
    if isinstance(value, (tuple, list)):
        return [_types(item) for item in value]
    return value


def _key(source: Source) -> str:
    return tensor_hash(source.value) if source.kind == "constant" else source.key


_NAME = re.compile(r"SymInt(?:\[\d*\])?\??\s+(\w+)")


@cache
def _sizes(overload: OpOverload) -> frozenset[int | str]:
    """Arguments that are sizes, by place and name; torch's schemas call these `SymInt`."""
    names = set(_NAME.findall(str(overload._schema)))
    places = {i for i, a in enumerate(overload._schema.arguments) if a.name in names}
    return frozenset(places | names)
