"""Operators that work element by element, in whatever layout their inputs already have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from cgo.graph import Node, Ref, TensorType
from cgo.operators import aten
from cgo.runtime.emitter import Column, Emitter, Group, Packed, Types
from cgo.runtime.forms import form
from cgo.tuning import CHANNELS, STACKED

_ARITHMETIC = """
add sub rsub subtract mul multiply div divide true_divide floor_divide remainder fmod pow square
sqrt rsqrt reciprocal neg negative abs absolute sign exp exp2 expm1 log log2 log10 log1p logaddexp
logaddexp2 xlogy sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh erf erfc ceil
floor round trunc frac clamp clamp_min clamp_max clip lerp addcmul addcdiv maximum minimum fmax fmin
nan_to_num eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or
bitwise_xor bitwise_not isnan isinf isfinite where masked_fill
"""
_ACTIVATIONS = """
relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid log_sigmoid hardsigmoid hardswish
hardtanh hardshrink softshrink softplus threshold
"""
_COPIES = "clone lift_fresh_copy detach to _to_copy zeros_like ones_like full_like"


def adds_nothing(node: Node, types: Types) -> bool:
    """Whether a node is `x + 0` with a literal integer zero, and of x's own type."""
    if node.op != "aten.add.Tensor" or node.kwargs or type(node.args[0]) is not Ref:
        return False
    added = node.args[1]
    return type(added) is int and added == 0 and _like(types[node.args[0]], node.types[0])


def _like(left: TensorType | None, right: TensorType | None) -> bool:
    return left is not None and right is not None and left.dtype == right.dtype


#: Arguments that are no value: which tensor has which dtype does not matter to the others.
_MASKS = {"aten.where": "condition", "aten.masked_fill": "mask"}


@form("sum from zero", "add", layouts="either")
def sum_from_zero(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """`0 + x`, with which Python's `sum` begins: the value itself."""
    column = group.arguments["self"]
    if not isinstance(column, Column) or not adds_nothing(group.nodes[0], emitter.types):
        return None
    if emitter.wants_channels(column):
        return [Packed(emitter.channels(column), CHANNELS)]
    return [Packed(emitter.stacked(column), STACKED)]


@form("elementwise", f"{_ARITHMETIC} {_ACTIVATIONS} {_COPIES}", layouts="either")
def elementwise(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """One call on packed values; smaller operands broadcast within their lane."""
    if not _one_dtype(group):
        return None  # promotion looks at the number of dimensions, which packing changes
    channels = _in_channels(emitter, group)
    layout = STACKED if channels is None else CHANNELS
    values = channels or _in_stacked(emitter, group)
    literals = emitter.literals(group, "memory_format")
    overload = aten(group.nodes[0].op)
    assert overload is not None
    result = emitter.call(overload, **values, **literals)
    own = _named_columns(group).values()
    result.meta["alike"] = all(not c.shared and c.shape == group.shape for c in own)
    return [Packed(result, layout)]


@form("same value", "contiguous alias", layouts="either")
def same(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """What changes nothing but memory: the value itself."""
    (x,) = group.columns
    if emitter.wants_channels(x):
        return [Packed(emitter.channels(x), CHANNELS)]
    return [Packed(emitter.stacked(x), STACKED)]


@form("per-channel slope", "prelu _prelu_kernel", layouts="stacked")
def prelu(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Leaky ReLU with a learned slope: positive where above zero, else slope times the value."""
    x, weight = group.columns
    if x.ndim < 2 or weight.ndim != 1:
        return None
    shape = (group.size, 1, weight.shape[0], *[1] * (x.ndim - 2))
    slope = emitter.call(torch.reshape, emitter.stacked(weight), shape)
    value = emitter.stacked(x)
    kept = emitter.call(torch.gt, value, 0)
    scaled = emitter.call(torch.mul, value, slope)
    return [Packed(emitter.call(torch.where, kept, value, scaled), STACKED)]


def _one_dtype(group: Group) -> bool:
    mask = _MASKS.get(group.operator)
    values = [value for name, value in group.arguments.items() if name != mask]
    dtypes = {value.type.dtype for value in values if isinstance(value, Column)}
    return len(dtypes) == 1 and all(not isinstance(value, tuple) for value in values)


def _named_columns(group: Group) -> dict[str, Column]:
    return {name: v for name, v in group.arguments.items() if isinstance(v, Column)}


def _in_stacked(emitter: Emitter, group: Group) -> dict[str, Any]:
    ndim = len(group.shape)
    return {name: emitter.leading(column, ndim) for name, column in _named_columns(group).items()}


def _in_channels(emitter: Emitter, group: Group) -> dict[str, Any] | None:
    """The operands side by side along axis 1, where each can be had so."""
    columns = _named_columns(group)
    if len(group.shape) < 2 or not any(map(emitter.wants_channels, columns.values())):
        return None
    found: dict[str, Any] = {}
    for name, column in columns.items():
        if (value := _operand(emitter, column, group.shape)) is None:
            return None
        found[name] = value
    return found


def _operand(emitter: Emitter, column: Column, shape: tuple[int, ...]) -> fx.Node | None:
    if column.shared:  # broadcasts over all channels, so over the members
        alike = column.ndim == 0 or (column.ndim == len(shape) and column.shape[1] == 1 < shape[1])
        return emitter.value(column.refs[0]) if alike else None
    if column.ndim == len(shape) and column.shape[1] == shape[1]:
        return emitter.channels(column)
    if column.ndim == len(shape) - 1 and column.shape[0] == shape[1]:
        return emitter.joined(column)
    return None
