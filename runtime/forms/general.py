"""The general rule: what `torch.vmap` makes of an operator, traced once into plain ATen.

Nothing of functorch is left in the step; the traced graph is called like any function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cgo.dtypes import torch_dtype
from cgo.graph import TensorType
from cgo.operators import aten
from cgo.runtime.emitter import Column, Emitter, Group, Packed, item
from cgo.tuning import STACKED

_Traced = Callable[..., Sequence[Tensor]]
_traced: dict[object, _Traced | str] = {}


def vectorise(emitter: Emitter, group: Group) -> tuple[list[Packed] | None, str]:
    """The group as one call of its operator under `vmap`, or why that cannot be."""
    overload = aten(group.nodes[0].op)
    if overload is None:
        return None, "the operator is not torch's"
    if not group.columns:
        return None, "it reads no tensor"
    if any(type_ is None for type_ in group.types):
        return None, "some of its results are no tensors"
    key = _key(emitter, group)
    if key not in _traced:
        _traced[key] = _trace(emitter, group, overload)
    found = _traced[key]
    if isinstance(found, str):
        return None, found
    values = [
        emitter.value(column.refs[0]) if column.shared else emitter.stacked(column)
        for column in group.columns
    ]
    several = emitter.call(found, *values)
    return [
        Packed(emitter.call(item, several, index), STACKED) for index in range(len(group.types))
    ], ""


def _key(emitter: Emitter, group: Group) -> object:
    columns = tuple((c.shared, c.type.dtype, c.shape) for c in group.columns)
    literals = tuple((name, _literal_key(value)) for name, value in sorted(group.arguments.items()))
    return group.nodes[0].op, group.size, columns, literals, str(emitter.device)


def _literal_key(value: Any) -> object:
    if isinstance(value, Column):
        return Column
    if isinstance(value, tuple):
        return tuple(_literal_key(part) for part in value)
    return type(value), repr(value)


def _trace(emitter: Emitter, group: Group, overload: Any) -> _Traced | str:
    columns = group.columns
    alone = _operator(emitter, group, overload)
    try:
        with FakeTensorMode(), _no_slow_fallback():
            examples = [_example(c.type, c.shared, group.size, emitter.device) for c in columns]
            several = torch.vmap(alone, tuple(None if c.shared else 0 for c in columns))
            module = make_fx(several)(*(example.contiguous() for example in examples))
    except Exception as error:
        return f"torch.vmap cannot batch it: {str(error).partition(chr(10))[0][:160]}"
    forward: _Traced = type(module).forward

    def traced(*values: Tensor) -> Sequence[Tensor]:
        return forward(module, *(value.contiguous() for value in values))

    return traced


def _operator(emitter: Emitter, group: Group, overload: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of its tensor arguments alone, giving a tuple."""
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]

    def alone(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        given = {name: _filled(emitter, v, left) for name, v in group.arguments.items()}
        args = [given.pop(name) for name in names]
        result = overload(*args, **given)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return alone


def _filled(emitter: Emitter, value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Column):
        return next(tensors)
    if isinstance(value, tuple):
        return [_filled(emitter, part, tensors) for part in value]
    return emitter.literal(value)


def _example(type_: TensorType, shared: bool, size: int, device: torch.device) -> Tensor:
    shape = type_.shape if shared else (size, *type_.shape)
    return torch.empty(shape, dtype=torch_dtype(type_.dtype), device=device)


@contextmanager
def _no_slow_fallback() -> Iterator[None]:
    """Operators without a batching rule raise instead of becoming a loop inside the trace."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
