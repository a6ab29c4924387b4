"""How packed values lie in memory, and the copies between layouts."""

import pytest
import torch

from cgo.runtime.layouts import (
    channels_last,
    gather,
    keep_images,
    reformatted,
    stack,
    to_channels,
    to_stacked,
    unstack,
)
from cgo.tuning import CHANNELS

SHAPES = pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 4, 5), (2, 6, 2, 3, 4)])


def is_last(value):
    return value.is_contiguous(memory_format=torch.channels_last)


@SHAPES
@pytest.mark.parametrize("last", [False, True])
def test_layouts_hold_the_same_values(shape, last):
    lanes = [torch.randn(shape) for _ in range(3)]
    if last:
        lanes = list(map(channels_last, lanes))
    stacked = stack(lanes)
    assert torch.equal(stacked, torch.stack(lanes))
    channels = to_channels(stacked, 3)
    assert torch.equal(channels, torch.cat(lanes, 1))
    assert torch.equal(to_stacked(channels, 3), stacked)
    assert all(torch.equal(a, b) for a, b in zip(unstack(stacked), lanes, strict=True))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_the_gradient_of_reformatted_images_is_as_these_were(before, last):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    x = (channels_last(x) if before else x).requires_grad_()
    y = reformatted(x, last)
    assert y is not x
    assert is_last(y) == last
    assert torch.equal(y, x)
    factor = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * factor).sum(), x)
    assert torch.equal(gradient, factor)
    assert is_last(gradient) == before


def test_images_keep_channels_last_through_every_copy_and_its_backward():
    lanes = [channels_last(torch.randn(2, 4, 3, 3)).requires_grad_() for _ in range(3)]
    stacked = stack(lanes)
    channels = to_channels(stacked, 3)
    assert is_last(channels)
    back = to_stacked(channels, 3)
    out = unstack(back)
    assert all(is_last(lane) for lane in out)
    heard = []
    stacked.register_hook(lambda gradient: heard.append(gradient))
    torch.autograd.backward(out, [channels_last(torch.randn(2, 4, 3, 3)) for _ in out])
    assert is_last(heard[0].flatten(0, 1))
    assert all(is_last(lane.grad) for lane in lanes)


def test_what_is_no_image_is_left_as_it_is():
    value = torch.randn(3, 4, 5)
    assert channels_last(value) is value


def test_images_joined_in_channels_get_blocks_of_the_gradient():
    lanes = [channels_last(torch.randn(2, 4, 3, 3)).requires_grad_() for _ in range(3)]
    joined = gather(lanes, CHANNELS)
    assert torch.equal(joined, torch.cat(lanes, 1))
    gradient = channels_last(torch.randn(2, 12, 3, 3))
    joined.backward(gradient)
    for lane, expected in zip(lanes, gradient.chunk(3, 1), strict=True):
        assert torch.equal(lane.grad, expected)
        assert is_last(lane.grad)


def test_lanes_of_other_widths_are_joined_as_well():
    lanes = [channels_last(torch.randn(2, c, 3, 3)) for c in (1, 2)]
    assert torch.equal(gather(lanes, CHANNELS), torch.cat(lanes, 1))


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (5, 2, 4, 3, 3)])
def test_the_gradient_of_images_that_are_flattened_lies_as_the_images(shape):
    value = torch.randn(*shape[:-3], 3, 3, 4).movedim(-1, -3).requires_grad_()
    heard = []
    kept = keep_images(value * 1)
    kept.register_hook(heard.append)
    value_hook = []
    value.register_hook(value_hook.append)
    weight = torch.randn(shape)
    (kept.flatten(1) * weight.flatten(1)).sum().backward()
    assert torch.equal(value.grad, weight)
    assert heard[0].is_contiguous()
    assert value_hook[0].movedim(-3, -1).is_contiguous()


def test_four_dimensions_alone_make_no_images():
    value = torch.randn(2, 4, 3, 5)
    assert keep_images(value) is value
    assert keep_images(value[0, 0]).ndim == 2
