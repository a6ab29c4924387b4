"""Convolutions: separate inputs as one grouped convolution, a shared input as one wide one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cgo.dtypes import torch_dtype
from cgo.operators import aten
from cgo.runtime.emitter import Column, Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.runtime.forms.folding import fold, unfold
from cgo.runtime.grouped_convolutions import convolved
from cgo.runtime.kernels import batched_linear
from cgo.runtime.layouts import IMAGES, reformatted
from cgo.runtime.solo import is_pointwise
from cgo.runtime.triton_kernels import usable
from cgo.runtime.unsafe import needs_contiguous
from cgo.tuning import CHANNELS, STACKED

_CONVOLUTIONS = "conv1d conv2d conv3d"
_TRANSPOSED = "conv_transpose1d conv_transpose2d conv_transpose3d"


@form("wide convolution", _CONVOLUTIONS, layouts="channels")
def wide(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """A shared input and separate weights: one convolution with M*O output channels."""
    given = group.arguments
    if not _usual(group) or not given["input"].shared or given["groups"] != 1:
        return None
    return [_call(emitter, group, emitter.value(given["input"].refs[0]), groups=1)]


@form("product of pixels", "conv2d", layouts="stacked")
def product(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """1x1 convolutions: batched products over (M, N*H*W, C), with channels last in memory."""
    given = group.arguments
    if not emitter.images_last or given["weight"].shared or not is_pointwise(group):
        return None
    shift = None if given["bias"] is None else emitter.stacked(given["bias"])
    x, weight = emitter.stacked(given["input"]), emitter.stacked(given["weight"])
    return [Packed(emitter.call(product_of_pixels, x, weight, shift), STACKED)]


def product_of_pixels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, N, C, H, W) and (M, O, C, 1, 1) to (M, N, O, H, W)."""
    members, samples, channels, height, width = x.shape
    rows = x.permute(0, 1, 3, 4, 2).reshape(members, -1, channels)
    result = batched_linear(rows, weight.flatten(2), bias)
    return result.view(members, samples, height, width, -1).permute(0, 1, 4, 2, 3)


@form("grouped convolution", f"{_CONVOLUTIONS} {_TRANSPOSED}", layouts="channels")
def grouped(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Separate weights: one convolution with M times as many groups."""
    if not _usual(group):
        return None
    given = group.arguments
    x = emitter.channels(given["input"])
    return [_call(emitter, group, x, groups=given["groups"] * group.size)]


def _on_cuda(device: torch.device, kernels: bool | None) -> bool:
    return device.type == "cuda"


@form("grouped convolution, reformatted", "conv2d", layouts="channels", offered=_on_cuda)
def reformatting(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """A grouped convolution in the other format of images, with copies before and behind."""
    given = group.arguments
    if not _usual(group) or given["input"].ndim != IMAGES:
        return None
    last, groups = not emitter.images_last, given["groups"] * group.size
    if emitter.device.type == "cpu" and last and _fails(group, groups):
        return None
    x = emitter.call(reformatted, emitter.channels(given["input"]), last)
    result = _result(emitter, group, x, groups=groups)
    return [Packed(emitter.call(reformatted, result, not last), CHANNELS)]


#: Beyond so many channels torch's kernels are as good as products of that size can be.
_MOST_CHANNELS = 128


@form("grouped convolution in one kernel", "conv2d", layouts="channels", offered=usable)
def kernel(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Square kernels over contiguous images, in Triton."""
    given, type_ = group.arguments, group.types[0]
    geometry = _square(group)
    if emitter.images_last or not _usual(group) or geometry is None or type_ is None:
        return None
    on_gpu = emitter.device.type == "cuda"
    if not usable(emitter.device, True) or (on_gpu and type_.dtype == "float64"):
        return None
    x, weight = emitter.channels(given["input"]), emitter.joined(given["weight"])
    bias, dtype = emitter.optional(given["bias"]), torch_dtype(type_.dtype)
    value = emitter.call(convolved, x, weight, bias, group.size, *geometry, dtype)
    return [Packed(value, CHANNELS)]


def _square(group: Group) -> tuple[int, int] | None:
    """Stride and padding, if both are the same in both directions and nothing else is set."""
    given, weight = group.arguments, group.arguments["weight"]
    if weight.ndim != IMAGES or given["groups"] != 1 or set(given["dilation"]) != {1}:
        return None
    stride, kernel, pads = {*given["stride"]}, {*weight.shape[2:]}, given["padding"]
    if max(weight.shape[:2]) > _MOST_CHANNELS or len(stride) > 1 or len(kernel) > 1:
        return None
    (step,), (size,) = stride, kernel
    if pads == "same" and step == 1 and size % 2:
        return step, size // 2
    if isinstance(pads, str):
        return (step, 0) if pads == "valid" else None
    return (step, pads[0]) if len({*pads}) == 1 else None


@form("products of channels", "conv2d", layouts="channels", offered=_on_cuda)
def products(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """1x1 convolutions as a matrix product for each sample and member, of contiguous images."""
    given = group.arguments
    if emitter.images_last or given["weight"].shared or not is_pointwise(group):
        return None
    shift = None if given["bias"] is None else emitter.joined(given["bias"])
    x, weight = emitter.channels(given["input"]), emitter.stacked(given["weight"])
    return [Packed(emitter.call(products_of_channels, x, weight, shift), CHANNELS)]


def products_of_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, M*C, H, W) and (M, O, C, 1, 1) to (N, M*O, H, W), with a bias of (M*O)."""
    columns = x.unflatten(1, (len(weight), -1)).flatten(3)
    result = torch.matmul(weight.flatten(2), columns).flatten(1, 2).unflatten(2, x.shape[2:])
    return result if bias is None else result + bias.to(result.dtype)[:, None, None]


@form("folded convolution", f"{_CONVOLUTIONS} {_TRANSPOSED}", layouts="stacked")
def folded(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Shared weights and separate inputs: one convolution over M*N samples."""
    given = group.arguments
    if not _batched(group) or not given["weight"].shared or given["input"].shared:
        return None
    if given["bias"] is not None and not given["bias"].shared:
        return None
    values = {
        name: emitter.value(value.refs[0]) if isinstance(value, Column) else emitter.literal(value)
        for name, value in given.items()
        if name != "input"
    }
    x = fold(emitter, emitter.stacked(given["input"]))
    x = emitter.convolved(x, group, given["groups"])
    result = emitter.call(aten(group.nodes[0].op), x, **values)  # type: ignore[arg-type]
    return [Packed(unfold(emitter, result, group.size), STACKED)]


def _batched(group: Group) -> bool:
    """Whether the inputs have a batch axis: torch takes a single sample, too."""
    given = group.arguments
    return bool(given["input"].ndim == given["weight"].ndim)


def _fails(group: Group, groups: int) -> bool:
    type_ = group.types[0]
    dtype = "" if type_ is None else type_.dtype
    return needs_contiguous(group.operator, group.arguments, groups, dtype)


def _usual(group: Group) -> bool:
    return _batched(group) and not group.arguments["weight"].shared


def _call(emitter: Emitter, group: Group, x: fx.Node, *, groups: int) -> Packed:
    result = _result(emitter, group, emitter.convolved(x, group, groups), groups=groups)
    # Of one channel both formats are one, and the kernel takes the other.
    return Packed(emitter.images(result), CHANNELS)


def _result(emitter: Emitter, group: Group, x: fx.Node, *, groups: int) -> fx.Node:
    given: dict[str, Any] = dict(group.arguments)
    del given["input"]
    weight = emitter.joined(given.pop("weight"))
    bias = emitter.optional(given.pop("bias"))
    rest = {name: emitter.literal(value) for name, value in given.items()} | {"groups": groups}
    return emitter.call(aten(group.nodes[0].op), x, weight, bias, **rest)  # type: ignore[arg-type]
