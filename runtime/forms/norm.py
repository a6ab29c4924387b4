"""Normalisation: per channel over M*C channels, per sample on stacked lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from cgo.dtypes import torch_dtype
from cgo.graph import Ref
from cgo.runtime.emitter import Column, Emitter, Group, Packed, item
from cgo.runtime.forms import form
from cgo.runtime.fused_norms import evaluated, trained
from cgo.runtime.operators import batch_norm, batch_norm_copying
from cgo.runtime.triton_kernels import usable
from cgo.tuning import CHANNELS, STACKED


@form("batch norm over channels", "cgo.batch_norm", layouts="channels")
def batch_norm_training(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Training mode: one batch norm over M*C channels; packed statistics are written in place."""
    if group.arguments["input"].ndim < 2:
        return None
    in_place = _in_place(emitter, group)
    if in_place:
        emitter.written |= {ref for index in (1, 2) for ref in group.refs(index)}
    function = batch_norm if in_place else batch_norm_copying
    several = emitter.call(function, *_given(emitter, group, "mean", "var"))
    found = [Packed(emitter.call(item, several, 0), CHANNELS)]
    for index in (1, 2):
        if any(emitter.readers[Ref(node.name, index)] for node in group.nodes):
            joined = emitter.call(item, several, index)
            found.append(
                Packed(emitter.call(torch.unflatten, joined, 0, (group.size, -1)), STACKED)
            )
        else:
            found.append(found[0])  # nobody reads it
    return found


def _in_place(emitter: Emitter, group: Group) -> bool:
    """Whether nothing else reads the old statistics, which then may be written."""
    return all(emitter.is_leaf(group.arguments[name]) for name in ("mean", "var"))


def _given(emitter: Emitter, group: Group, mean: str, var: str) -> list[Any]:
    """What norms over M*C channels take; statistics by the names that they have."""
    given = group.arguments
    return [
        emitter.channels(given["input"]),
        emitter.optional(given["weight"]),
        emitter.optional(given["bias"]),
        emitter.joined(given[mean]),
        emitter.joined(given[var]),
        given["momentum"],
        given["eps"],
    ]


@form("evaluated batch norm over channels", "batch_norm", layouts="channels")
def batch_norm_evaluation(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Evaluation mode: one batch norm over M*C channels."""
    given = group.arguments
    if given["training"] or given["input"].ndim < 2 or given["running_mean"] is None:
        return None
    value = emitter.call(
        F.batch_norm,
        emitter.channels(given["input"]),
        emitter.joined(given["running_mean"]),
        emitter.joined(given["running_var"]),
        emitter.optional(given["weight"]),
        emitter.optional(given["bias"]),
        False,
        given["momentum"],
        given["eps"],
    )
    return [Packed(value, CHANNELS)]


@form(
    "batch norm in one kernel",
    "cgo.batch_norm",
    layouts="channels",
    offered=usable,
    takes_over=True,
)
def batch_norm_kernel(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Training mode, in Triton, with an addition and an activation that follow."""
    if not _fits_kernel(emitter, group):
        return None
    given = _given(emitter, group, "mean", "var")
    if _in_place(emitter, group):
        emitter.written |= {ref for index in (1, 2) for ref in group.refs(index)}
        value = emitter.call(trained, *given)
        value.meta["follow"] = torch_dtype(group.arguments["input"].type.dtype)
    else:
        given[3:5] = [emitter.call(torch.clone, statistics) for statistics in given[3:5]]
        value = emitter.call(trained, *given)
    parts = [emitter.call(torch.unflatten, node, 0, (group.size, -1)) for node in given[3:5]]
    return [Packed(value, CHANNELS), *(Packed(part, STACKED) for part in parts)]


@form(
    "evaluated batch norm in one kernel",
    "batch_norm",
    layouts="channels",
    offered=usable,
    takes_over=True,
)
def batch_norm_evaluation_kernel(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Evaluation mode, in Triton, with an addition and an activation that follow."""
    given = group.arguments
    if given["training"] or given["running_mean"] is None or not _fits_kernel(emitter, group):
        return None
    value = emitter.call(evaluated, *_given(emitter, group, "running_mean", "running_var"))
    value.meta["follow"] = torch_dtype(given["input"].type.dtype)
    return [Packed(value, CHANNELS)]


def _fits_kernel(emitter: Emitter, group: Group) -> bool:
    x, result = group.arguments["input"], group.types[0]
    alike = result is not None and result.dtype == x.type.dtype
    return alike and x.ndim >= 2 and usable(emitter.device, True)


@form("group norm over channels", "group_norm", layouts="channels")
def group_norm(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """One group norm with M times as many groups."""
    given = group.arguments
    value = emitter.call(
        F.group_norm,
        emitter.channels(given["input"]),
        given["num_groups"] * group.size,
        emitter.optional(given["weight"]),
        emitter.optional(given["bias"]),
        given["eps"],
    )
    return [Packed(value, CHANNELS)]


@form("instance norm over channels", "instance_norm", layouts="channels")
def instance_norm(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """One instance norm over M*C channels, where it keeps no statistics."""
    given = group.arguments
    if given["running_mean"] is not None or not given["use_input_stats"]:
        return None
    value = emitter.call(
        F.instance_norm,
        emitter.channels(given["input"]),
        weight=emitter.optional(given["weight"]),
        bias=emitter.optional(given["bias"]),
        eps=given["eps"],
    )
    return [Packed(value, CHANNELS)]


@form("stacked layer norm", "layer_norm", layouts="stacked")
def layer_norm(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Normalise all members at once, then scale and shift each by its own weights."""
    given = group.arguments
    x = emitter.stacked(given["input"])
    shape = list(given["normalized_shape"])
    value = emitter.call(F.layer_norm, x, shape, None, None, given["eps"])
    return [Packed(_affine(emitter, group, value), STACKED)]


@form("stacked RMS norm", "rms_norm", layouts="stacked")
def rms_norm(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Normalise all members at once, then scale each by its own weight."""
    given = group.arguments
    x = emitter.stacked(given["input"])
    shape = list(given["normalized_shape"])
    value = emitter.call(F.rms_norm, x, shape, None, given["eps"])
    return [Packed(_affine(emitter, group, value), STACKED)]


def _affine(emitter: Emitter, group: Group, value: fx.Node) -> fx.Node:
    ndim = group.arguments["input"].ndim
    weight: Column | None = group.arguments.get("weight")
    bias: Column | None = group.arguments.get("bias")
    scale = None if weight is None else emitter.leading(weight, ndim)
    shift = None if bias is None else emitter.leading(bias, ndim)
    if scale is not None and shift is not None:
        return emitter.call(torch.addcmul, shift, value, scale)
    if scale is not None:
        return emitter.call(torch.mul, value, scale)
    return value if shift is None else emitter.call(torch.add, value, shift)
