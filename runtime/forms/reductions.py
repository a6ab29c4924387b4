"""Operators along dimensions: sums, softmax, searches; each member's axes shifted by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cgo.operators import aten
from cgo.runtime.emitter import Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.tuning import CHANNELS, STACKED

_REDUCTIONS = """
sum mean prod amax amin logsumexp var std linalg_vector_norm argmax argmin max min any all nansum
"""
_ALONG = "softmax log_softmax cumsum cumprod logcumsumexp glu flip sort argsort topk"


@form("whole sum", "sum mean", layouts="either")
def whole(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Sum or mean of everything a member has."""
    given = group.arguments
    (x,) = group.columns
    if "dim" in given or x.ndim == 0:
        return None
    function = torch.sum if group.operator == "aten.sum" else torch.mean
    flat = emitter.call(torch.flatten, emitter.stacked(x), 1)
    value = emitter.call(function, flat, 1, dtype=emitter.literal(given["dtype"]))
    return [Packed(value, STACKED)]


@form("along dimensions", f"{_REDUCTIONS} {_ALONG}", layouts="either")
def along(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """The same operator with its dimensions shifted; in channels where they lie behind these."""
    given = group.arguments
    name = "dims" if "dims" in given else "dim"
    dims = given.get(name)
    if len(group.columns) != 1 or dims is None or dims == () or isinstance(dims, str):
        return None
    (x,) = group.columns
    if x.ndim == 0:
        return None
    positive = tuple(d % x.ndim for d in (dims if isinstance(dims, tuple) else (dims,)))
    channels = emitter.wants_channels(x) and min(positive) >= 2
    shifted = positive if channels else tuple(d + 1 for d in positive)
    column_name = next(key for key, value in given.items() if value is x)
    overload = aten(group.nodes[0].op)
    assert overload is not None
    result = emitter.call(
        overload,
        **{column_name: emitter.channels(x) if channels else emitter.stacked(x)},
        **{name: list(shifted) if isinstance(dims, tuple) else shifted[0]},
        **emitter.literals(group, name),
    )
    return emitter.outputs(group, result, CHANNELS if channels else STACKED)
