"""Normalisation: per channel over M*C channels, per sample on stacked lanes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.nn import functional as F

from cgo.graph import Ref
from cgo.runtime.emitter import Column, Emitter, Group, Packed, item
from cgo.runtime.forms import form
from cgo.runtime.operators import batch_norm, batch_norm_copying
from cgo.tuning import CHANNELS, STACKED


@form("batch norm over channels", "cgo.batch_norm", layouts="channels")
def batch_norm_training(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Training mode: one batch norm over M*C channels; packed statistics are written in place."""
    given = group.arguments
    if given["input"].ndim < 2:
        return None
    statistics = [given["mean"], given["var"]]
    in_place = all(emitter.is_leaf(column) for column in statistics)
    if in_place:
        emitter.written |= {ref for index in (1, 2) for ref in group.refs(index)}
    several = emitter.call(
        batch_norm if in_place else batch_norm_copying,
        emitter.channels(given["input"]),
        emitter.optional(given["weight"]),
        emitter.optional(given["bias"]),
        *(emitter.joined(column) for column in statistics),
        given["momentum"],
        given["eps"],
    )
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
