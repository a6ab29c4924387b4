"""What an operator takes, seen without taking it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cgo.runtime.watching import Limits, Refused, Watch, flops_of

aten = torch.ops.aten


def fake(*shape, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


def counted(op, *args):
    return flops_of(op, args, {}, op(*args))


@pytest.mark.parametrize(
    ("op", "args", "least", "most"),
    [
        (aten.add.Tensor, (fake(10), fake(10)), 30, 30),
        (aten.mm.default, (fake(8, 16), fake(16, 4)), 1024, 1024),
        (aten.max_pool2d_with_indices.default, (fake(1, 1, 8, 8), [3, 3], [1, 1]), 324, 400),
        (aten._adaptive_avg_pool2d.default, (fake(1, 2, 8, 8), [2, 2]), 32, 200),
        (aten.linalg_inv_ex.default, (fake(5, 10, 10),), 150_000, 150_000),
        (aten._cdist_forward.default, (fake(10, 7), fake(20, 7), 2.0, None), 5600, 5600),
    ],
)
def test_operations_are_counted(op, args, least, most):
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(torch.empty(a.shape)) if isinstance(a, torch.Tensor) else a
                for a in args]  # fmt: skip
        assert least <= counted(op, *args) <= most


def test_a_window_counts_as_far_as_it_lies_in_the_input():
    with FakeTensorMode():
        x = torch.empty(1, 1, 16)
        result = aten.avg_pool1d.default(x, [16], [1], [8])
        assert flops_of(aten.avg_pool1d.default, (x, [2**40], [1], [8]), {}, result) == 17 * 16


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(inner_bytes=1000), "bytes on its way; at most 1,000 are taken"),
        (Limits(flops=1000), "operations; at most 1,000 are taken"),
        (Limits(calls=2), "more than 2 operators in one"),
    ],
)
def test_an_operator_is_stopped_at_a_limit(limits, message):
    with FakeTensorMode(), Watch(limits), pytest.raises(Refused, match=message):
        torch.cartesian_prod(*[torch.empty(20)] * 3)


@pytest.mark.parametrize("name", ["view", "repeat", "expand"])
def test_a_tensor_of_endless_dimensions_is_stopped_before_it_is_made(name):
    with FakeTensorMode(), Watch(Limits()), pytest.raises(Refused, match="32,768 numbers"):
        getattr(torch.empty(1), name)([1] * 2**15)


def test_random_numbers_are_not_drawn():
    with FakeTensorMode(), Watch(Limits()), pytest.raises(Refused, match="random stream"):
        torch.nn.functional.dropout(torch.empty(4), 0.5)


def test_lists_with_a_number_for_each_part_may_be_long():
    with FakeTensorMode(), Watch(Limits()):
        assert len(torch.empty(1000).split_with_sizes([1] * 1000)) == 1000


def test_an_operator_within_limits_is_let_through():
    with FakeTensorMode(), Watch(Limits.of_memory(2**30)):
        assert torch.cartesian_prod(torch.empty(20), torch.empty(20)).shape == (400, 2)


def test_limits_follow_the_memory():
    limits = Limits.of_memory(1000)
    assert (limits.tensor_bytes, limits.inner_bytes, limits.graph_bytes) == (1000, 4000, 8000)
