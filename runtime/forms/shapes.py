"""Operators that move values without changing them; views where torch can make one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cgo.operators import aten
from cgo.runtime.emitter import Column, Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.tuning import CHANNELS, STACKED


@form(
    "reshape",
    "view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as",
    layouts="either",
)
def reshape(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Whatever keeps the order of elements; in channels where the batch axis stays."""
    x = group.columns[0]
    if group.nodes[0].op == "aten.view.dtype":
        return None
    shape = group.shape
    if emitter.wants_channels(x) and len(shape) >= 2 and shape[0] == x.shape[0]:
        sizes = (shape[0], group.size * shape[1], *shape[2:])
        return [Packed(emitter.call(torch.reshape, emitter.channels(x), sizes), CHANNELS)]
    value = emitter.call(torch.reshape, emitter.stacked(x), (group.size, *shape))
    return [Packed(value, STACKED)]


@form("permutation", "permute transpose t numpy_T mT", layouts="stacked")
def permutation(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Axes in another order; the members' axis stays first."""
    given = group.arguments
    (x,) = group.columns
    order = list(range(x.ndim))
    if "dims" in given:
        order = [d % x.ndim for d in given["dims"]]
    elif x.ndim < 2:
        return None
    else:
        a, b = (given[key] % x.ndim if key in given else -1 for key in ("dim0", "dim1"))
        if group.operator == "aten.numpy_T":
            order.reverse()
        else:
            a, b = (a, b) if "dim0" in given else (x.ndim - 2, x.ndim - 1)
            order[a], order[b] = order[b], order[a]
    value = emitter.call(torch.permute, emitter.stacked(x), (0, *(d + 1 for d in order)))
    return [Packed(value, STACKED)]


@form("part", "select slice narrow chunk split split_with_sizes unbind roll", layouts="either")
def part(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Parts along a dimension; in channels where it lies behind these."""
    given = group.arguments
    (x,) = group.columns
    name = "dims" if "dims" in given else "dim"
    dims = given[name] if isinstance(given[name], tuple) else (given[name],)
    if not dims or x.ndim == 0:
        return None
    positive = [d % x.ndim for d in dims]
    channels = emitter.wants_channels(x) and min(positive) >= 2
    shifted = positive if channels else [d + 1 for d in positive]
    overload = aten(group.nodes[0].op)
    assert overload is not None
    result = emitter.call(
        overload,
        emitter.channels(x) if channels else emitter.stacked(x),
        **{name: shifted if isinstance(given[name], tuple) else shifted[0]},
        **emitter.literals(group, name),
    )
    return emitter.outputs(group, result, CHANNELS if channels else STACKED)


@form("written part", "select_scatter slice_scatter diagonal_scatter", layouts="stacked")
def written_part(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Parts put in place along a dimension; torch's rule for `vmap` gets a gradient wrong."""
    given = group.arguments
    whole, new = given["self"], given["src"]
    dims = {name: given[name] % whole.ndim + 1 for name in ("dim", "dim1", "dim2") if name in given}
    overload = aten(group.nodes[0].op)
    assert overload is not None
    value = emitter.call(
        overload,
        emitter.stacked(whole),
        emitter.stacked(new),
        **emitter.literals(group, *dims),
        **dims,
    )
    return [Packed(value, STACKED)]


@form("concatenation", "cat concat concatenate", layouts="either")
def concatenation(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Members' tensors end to end within their lanes."""
    columns = group.columns
    ndim = len(group.shape)
    if any(column.ndim != ndim for column in columns) or not _one_dtype(columns):
        return None
    dim = group.arguments["dim"] % ndim
    if ndim >= 2 and dim >= 1 and any(map(emitter.wants_channels, columns)):
        parts = [emitter.channels(column) for column in columns]
        if dim > 1:
            return [Packed(emitter.call(torch.cat, parts, dim), CHANNELS)]
        return [Packed(emitter.call(cat_channels, parts, group.size), CHANNELS)]
    value = emitter.call(torch.cat, [emitter.stacked(column) for column in columns], dim + 1)
    return [Packed(value, STACKED)]


@form("stack", "stack", layouts="stacked")
def stack(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Members' tensors along a new axis of their lanes."""
    columns = group.columns
    if not _one_dtype(columns):
        return None
    dim = group.arguments["dim"] % len(group.shape)
    value = emitter.call(torch.stack, [emitter.stacked(column) for column in columns], dim + 1)
    return [Packed(value, STACKED)]


@form("expansion", "expand expand_as broadcast_to", layouts="stacked")
def expansion(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Broadcasting without a copy."""
    value = emitter.leading(group.columns[0], len(group.shape))
    return [Packed(emitter.call(_expand, value, (group.size, *group.shape)), STACKED)]


@form("repetition", "repeat", layouts="stacked")
def repetition(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Tiling within each lane."""
    repeats = group.arguments["repeats"]
    (x,) = group.columns
    value = emitter.leading(x, len(repeats))
    return [Packed(emitter.call(torch.Tensor.repeat, value, (1, *repeats)), STACKED)]


@form("last axes", "tril triu constant_pad_nd pad", layouts="stacked")
def last_axes(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Triangles and constant padding count axes from the last, so lanes are not touched."""
    given = group.arguments
    (x,) = group.columns
    if given.get("mode", "constant") != "constant":
        return None
    return [_call(emitter, group, emitter.stacked(x))]


@form("shared index", "index_select", layouts="stacked")
def shared_index(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Rows at indices that all members share."""
    x, index = group.columns
    if not index.shared or x.ndim == 0:
        return None
    dim = group.arguments["dim"] % x.ndim + 1
    value = emitter.call(torch.index_select, emitter.stacked(x), dim, emitter.value(index.refs[0]))
    return [Packed(value, STACKED)]


def _call(emitter: Emitter, group: Group, value: fx.Node) -> Packed:
    overload = aten(group.nodes[0].op)
    assert overload is not None
    literals: dict[str, Any] = emitter.literals(group)
    return Packed(emitter.call(overload, value, **literals), STACKED)


def _one_dtype(columns: Sequence[Column]) -> bool:
    return len({column.type.dtype for column in columns}) == 1


def _expand(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return value.expand(shape)


def cat_channels(parts: Sequence[Tensor], size: int) -> Tensor:
    """(N, M*C1, ...), (N, M*C2, ...) to (N, M*(C1+C2), ...)."""
    return torch.cat([part.unflatten(1, (size, -1)) for part in parts], 2).flatten(1, 2)
