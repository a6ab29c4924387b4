"""The general rule: what `torch.vmap` makes of an operator, traced once into plain ATen.

Nothing of functorch is left in the step; the traced graph is called like any function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cgo.dtypes import torch_dtype
from cgo.graph import TensorType
from cgo.operators import aten
from cgo.private.fake_tensors import FakeTensorMode
from cgo.private.vmap_fallback import forbidden
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
        with FakeTensorMode(), forbidden():
            examples = [_example(c.type, c.shared, group.size, emitter.device) for c in columns]
            several = torch.vmap(alone, tuple(None if c.shared else 0 for c in columns))
            module = make_fx(several)(*(example.contiguous() for example in examples))
        if not _agrees(several, alone, columns, emitter.device):
            return "torch.vmap gives other values or gradients than its members"
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


#: Members that a batching rule is compared on.
_COMPARED = 2


def _agrees(
    several: Callable[..., tuple[Tensor, ...]],
    alone: Callable[..., tuple[Tensor, ...]],
    columns: Sequence[Column],
    device: torch.device,
) -> bool:
    """Whether torch's batching rule gives what two members give, and their gradients.

    Not all do: that of `select_scatter` (torch 2.13) multiplies the gradient of what is put in
    place by the size of the dimension.
    """
    draw = torch.Generator().manual_seed(0)
    values = [_value(c, draw).to(device).requires_grad_(_learns(c)) for c in columns]
    members = [
        [value if c.shared else value[lane] for c, value in zip(columns, values)]
        for lane in range(_COMPARED)
    ]
    apart = [torch.stack(parts) for parts in zip(*(alone(*member) for member in members))]
    return all(
        torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE, equal_nan=True)
        for one, other in zip(_with_gradients(several(*values), values),
                              _with_gradients(apart, values))
    )  # fmt: skip


#: Relative difference allowed of numbers around one, in whatever precision they are.
_CLOSE = 1e-2


def _value(column: Column, draw: torch.Generator) -> Tensor:
    shape = column.shape if column.shared else (_COMPARED, *column.shape)
    dtype = getattr(torch, column.type.dtype)
    if not dtype.is_floating_point:  # as an index it has to be there
        return torch.zeros(shape, dtype=dtype)
    return (torch.rand(shape, generator=draw) + 0.1).to(dtype)


def _learns(column: Column) -> bool:
    return bool(getattr(torch, column.type.dtype).is_floating_point)


def _with_gradients(results: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """The results, and the gradients of a weighted sum of them."""
    learning = [value for value in values if value.requires_grad]
    reached = [result for result in results if result.requires_grad]
    if not learning or not reached:
        return [result.detach() for result in results]
    weights = [torch.linspace(0.5, 1.5, r.numel()).view(r.shape).to(r) for r in reached]
    gradients = torch.autograd.grad(reached, learning, weights, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]
