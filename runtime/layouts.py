"""How packed values lie in memory, and the copies between layouts.

Images lie with their channels last wherever the device prefers that (a CPU does): stacked ones as
(M, N, H, W, C) in memory, those in channels as (N, H, W, M*C). So a lane of a stacked value is a
whole block, and taking lanes out or bringing them together moves blocks, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cgo.tuning import STACKED

#: Dimensions of a batch of images.
IMAGES = 4


def channels_last(value: Tensor) -> Tensor:
    """(N, C, H, W) with channels last in memory; others, and what lies so already, unchanged."""
    if value.ndim != IMAGES:
        return value
    return value.contiguous(memory_format=torch.channels_last)


def contiguous(value: Tensor) -> Tensor:
    """As torch has it by itself, last dimension last in memory.

    Also where one channel or pixel makes several formats one: by its strides torch would take such
    an image for one with channels last.
    """
    return value.contiguous().flatten().view(value.shape)


def reformatted(value: Tensor, last: bool) -> Tensor:
    """Images with channels last in memory or not; the gradient is as the value was before."""
    result: Tensor = _Reformatted.apply(value, last)
    return result


class _Reformatted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, last: bool) -> Tensor:
        ctx.before = value.is_contiguous(memory_format=torch.channels_last)
        found = channels_last(value) if last else contiguous(value)
        return found.view_as(found) if found is value else found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return channels_last(gradient) if ctx.before else contiguous(gradient), None


def stack(lanes: list[Tensor]) -> Tensor:
    """M times (...) to (M, ...)."""
    if lanes[0].ndim != IMAGES:
        return torch.stack(lanes, 0)
    # `stack` would lose the lanes' memory format.
    return torch.cat(lanes, 0).unflatten(0, (len(lanes), -1))


def gather(lanes: list[Tensor], layout: str) -> Tensor:
    """M tensors as one, in a layout."""
    if layout == STACKED:
        return stack(lanes)
    alike = len({lane.shape for lane in lanes}) == 1
    if alike and _are_images(lanes[0]):
        joined: Tensor = _JoinChannels.apply(*lanes)
        return joined
    return torch.cat(lanes, 1)


def unstack(value: Tensor) -> Sequence[Tensor]:
    """(M, ...) to M times (...), all at once: the backward of one alone fills all with zeros."""
    if value.ndim != IMAGES + 1:
        return value.unbind(0)
    # As for `stack`: the backward of `split` is a `cat`, which keeps the memory format.
    return value.flatten(0, 1).split(value.shape[1], 0)


def keep_images(value: Tensor) -> Tensor:
    """The same value; its gradient gets the memory format that the value has.

    For images that are flattened or averaged next: the gradients of that come in another format,
    and elementwise kernels that meet both are several times slower.
    """
    if not _are_images(value):
        return value
    result: Tensor = _KeepImages.apply(value)
    return result


def to_channels(value: Tensor, size: int) -> Tensor:
    """(M, N, C, ...) to (N, M*C, ...)."""
    result: Tensor = _ToChannels.apply(value, size)
    return result


def to_stacked(value: Tensor, size: int) -> Tensor:
    """(N, M*C, ...) to (M, N, C, ...), each lane a block."""
    result: Tensor = _ToStacked.apply(value, size)
    return result


class _ToChannels(torch.autograd.Function):
    """With a backward that gives blocks, too; autograd's own would give strided views."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _to_channels(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _to_stacked(gradient, ctx.size), None


class _JoinChannels(torch.autograd.Function):
    """Images side by side in channels; each gets a block of the gradient, not a part of each row.

    With strided parts, everything that follows in the backward would be several times slower.
    """

    @staticmethod
    def forward(ctx: Any, *lanes: Tensor) -> Tensor:
        ctx.size = len(lanes)
        return torch.cat(lanes, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return _to_stacked(gradient, ctx.size).unbind(0)


class _KeepImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if gradient.ndim == IMAGES:
            return channels_last(gradient)
        blocks = gradient.flatten(0, -IMAGES)
        return channels_last(blocks).unflatten(0, gradient.shape[: 1 - IMAGES])


class _ToStacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, size: int) -> Tensor:
        return _to_stacked(value, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _to_channels(gradient), None


def _to_channels(value: Tensor) -> Tensor:
    if value.ndim != IMAGES + 1 or not _channels_last(value):
        return value.transpose(0, 1).flatten(1, 2).contiguous()
    return torch.cat(value.unbind(0), 1)  # faster than to copy what is permuted


def _to_stacked(value: Tensor, size: int) -> Tensor:
    if value.ndim != IMAGES or not value.is_contiguous(memory_format=torch.channels_last):
        return value.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
    lanes = value.permute(0, 2, 3, 1).unflatten(3, (size, -1)).permute(3, 0, 1, 2, 4)
    return lanes.contiguous().permute(0, 1, 4, 2, 3)


def _channels_last(value: Tensor) -> bool:
    return value.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def _are_images(value: Tensor) -> bool:
    """Whether channels lie last: (..., C, H, W), and not just any tensor of four dimensions."""
    if value.ndim not in (IMAGES, IMAGES + 1) or value.is_contiguous():
        return False
    return value.movedim(-3, -1).is_contiguous()
