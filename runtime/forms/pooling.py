"""Operators that treat each channel of each sample by itself: over M*C channels or M*N samples."""

from __future__ import annotations

from collections.abc import Sequence

from cgo.operators import aten
from cgo.runtime.emitter import Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.runtime.forms.folding import fold, unfold
from cgo.tuning import CHANNELS, STACKED

_POOLING = """
max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
"""
_RESIZING = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
upsample_bicubic2d upsample_trilinear3d pixel_shuffle pixel_unshuffle
"""
_PADDING = """
pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
replication_pad2d replication_pad3d
"""

#: Dimensions of a batch, by the digit in an operator's name.
_NDIM = {"1": 3, "2": 4, "3": 5}


@form("pooling over channels", _POOLING, layouts="either")
def pooling(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Pooling of (N, M*C, ...)."""
    return _per_channel(emitter, group)


@form("resizing over channels", _RESIZING, layouts="either")
def resizing(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Up-sampling and pixel shuffling of (N, M*C, ...); a member's channels stay together."""
    return _per_channel(emitter, group)


@form("padding over channels", _PADDING, layouts="either")
def padding(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Padding of (N, M*C, ...) along axes behind the channels."""
    (x,) = group.columns
    if len(group.arguments["pad" if "pad" in group.arguments else "padding"]) > 2 * (x.ndim - 2):
        return None
    return _per_channel(emitter, group)


def _per_channel(emitter: Emitter, group: Group) -> list[Packed] | None:
    (x,) = group.columns
    digits = [_NDIM[letter] for letter in group.operator if letter in _NDIM]
    if x.ndim < 3 or (digits and x.ndim != digits[0]) or x.shared:
        return None
    if not digits and x.ndim != 4 and "pixel" in group.operator:
        return None
    values = emitter.literals(group)
    column_name = next(name for name, value in group.arguments.items() if value is x)
    overload = aten(group.nodes[0].op)
    assert overload is not None
    channels = emitter.wants_channels(x)
    given = emitter.channels(x) if channels else fold(emitter, emitter.stacked(x))
    result = emitter.call(overload, **{column_name: given}, **values)
    found = emitter.outputs(group, result, CHANNELS if channels else STACKED)
    if not channels:
        for packed in found:
            packed.node = unfold(emitter, packed.node, group.size)
    return found
