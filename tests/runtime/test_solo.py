"""Other kernels for single operators against ATen's own."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cgo.graph import Node, Ref, TensorType
from cgo.runtime.emitter import make_group
from cgo.runtime.solo import KERNELS, attention, kernel_for, pointwise, pool_same


def compare(ours, theirs, *given):
    torch.manual_seed(0)
    values = []
    for function in (ours, theirs):
        leaves = [g.detach().clone().requires_grad_() for g in given]
        result = function(*leaves)
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        values.append([result, *torch.autograd.grad((result * weights).sum(), leaves)])
    for left, right in zip(*values):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def images(channels, size=5):
    return torch.randn(2, channels, size, size, dtype=torch.float64)


@pytest.mark.parametrize("last", [False, True])
def test_pointwise_is_a_convolution_over_one_pixel(last):
    x = images(3)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(4, 3, 1, 1).double(), torch.randn(4).double()
    compare(pointwise, F.conv2d, x, weight, bias)
    compare(pointwise, F.conv2d, x, weight)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("include", [False, True])
def test_pooling_of_stride_one_is_a_box_filter(size, include):
    given = {"kernel_size": (size, size), "stride": (1, 1), "padding": (size // 2, size // 2)}
    compare(
        lambda x: pool_same(x, **given, count_include_pad=include),
        lambda x: F.avg_pool2d(x, **given, count_include_pad=include),
        images(3, 6),
    )


def test_infinities_stay_where_pooling_has_them():
    x = images(2, 6).float()
    x[0, 1, 2, 2] = torch.inf
    x[1, 0, 0, 0] = torch.nan
    ours = pool_same(x, (3, 3), (1, 1), (1, 1), False, False)
    theirs = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_spelled_out(scale):
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    compare(
        lambda *x: attention(*x, scale=scale),
        lambda *x: F.scaled_dot_product_attention(*x, scale=scale),
        q, k, v,
    )  # fmt: skip


def node(op, shapes, *literals, **kwargs):
    """A node over tensors of these shapes, as a group of one."""
    refs = tuple(Ref(f"x{number}") for number in range(len(shapes)))
    types = {ref: TensorType("float32", shape) for ref, shape in zip(refs, shapes)}
    given = tuple(sorted(kwargs.items()))
    made = Node("n", op, (*refs, *literals), given, (types[refs[0]],), frozenset("m"))
    return make_group([made], types)


CONV = "aten.conv2d.default"
POOL = "aten.avg_pool2d.default"
SDPA = "aten.scaled_dot_product_attention.default"
HEADS = [(2, 4, 8, 16)] * 3


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (node(CONV, [(2, 4, 6, 6), (8, 4, 1, 1)], None), "product of pixels"),
        (node(CONV, [(2, 4, 6, 6), (8, 4, 1, 1)], None, (2, 2)), None),
        (node(CONV, [(2, 4, 6, 6), (8, 4, 1, 1)], None, (1, 1), (1, 1)), None),
        (node(CONV, [(2, 4, 6, 6), (8, 4, 3, 3)], None), None),
        (node(CONV, [(2, 4, 6, 6), (8, 2, 1, 1)], None, (1, 1), (0, 0), (1, 1), 2), None),
        (node(POOL, [(2, 8, 32, 32)], (3, 3), (1, 1), (1, 1), False, False), "box filter"),
        (node(POOL, [(2, 16, 32, 32)], (3, 3), (1, 1), (1, 1), False, False), None),
        (node(POOL, [(2, 8, 4, 4)], (3, 3), (1, 1), (1, 1), False, False), None),
        (node(POOL, [(2, 8, 32, 32)], (3, 3), (2, 2), (1, 1), False, False), None),
        (node(POOL, [(2, 8, 32, 32)], (2, 2), (2, 2)), None),
        (node(POOL, [(2, 8, 32, 32)], (3, 3), (1, 1), (1, 1), True, False), None),
        (node(POOL, [(2, 8, 32, 32)], (3, 3), (1, 1), (1, 1), False, False, 7), None),
        (node(SDPA, HEADS), "explicit attention"),
        (node(SDPA, HEADS, None, 0.1), None),
        (node(SDPA, HEADS, None, 0.0, True), None),
        (node(SDPA, [(2, 4, 512, 16)] * 3), None),
    ],
)
def test_kernels_apply_where_they_compute_the_same_and_pay(given, name):
    found = kernel_for(given, torch.device("cpu"))
    assert (None if found is None else found.name) == name
    assert kernel_for(given, torch.device("cuda")) is None  # these are slow on a CPU alone


def test_every_kernel_is_tested_above():
    assert {kernel.name for kernel in KERNELS} == {
        "product of pixels", "box filter", "explicit attention",
    }  # fmt: skip


def test_what_is_kept_between_calls_has_numbers_though_first_wanted_in_a_rehearsal():
    shape = 3, 11, 11  # of no other test
    with FakeTensorMode(allow_non_fake_inputs=True):
        pool_same(torch.empty(2, *shape), (3, 3), (1, 1), (1, 1), False, False)
    assert type(pool_same(torch.ones(2, *shape), (3, 3), (1, 1), (1, 1), False, False)) is Tensor
