"""Kernels with a backward of their own against what autograd derives."""

import pytest
import torch
from torch.nn import functional as F

from cgo.runtime.kernels import batched_linear, summed_cross_entropy


@pytest.mark.parametrize("bias", [False, True])
def test_batched_linear_and_its_gradients(bias):
    torch.manual_seed(0)
    given = [torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.randn(3, 6) if bias else None]
    given = [None if g is None else g.double().requires_grad_() for g in given]
    leaves = [g for g in given if g is not None]
    assert torch.autograd.gradcheck(lambda *x: batched_linear(*x, *[None] * (3 - len(x))), leaves)
    rows, weight, shift = given
    expected = torch.einsum("mri,moi->mro", rows, weight)
    expected = expected if shift is None else expected + shift.unsqueeze(1)
    torch.testing.assert_close(batched_linear(rows, weight, shift), expected)


def test_the_gradient_of_a_weight_lies_as_the_weight():
    weight = torch.randn(3, 6, 4, requires_grad=True)
    batched_linear(torch.randn(3, 5, 4), weight, None).sum().backward()
    assert weight.grad.is_contiguous()


def test_no_gradient_is_computed_for_what_does_not_learn():
    rows, weight = torch.randn(2, 5, 4), torch.randn(2, 6, 4, requires_grad=True)
    batched_linear(rows, weight, None).sum().backward()
    assert rows.grad is None


def test_autocast_casts():
    rows, weight = torch.randn(2, 5, 4), torch.randn(2, 6, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = batched_linear(rows, weight, torch.zeros(2, 6))
    assert result.dtype is torch.bfloat16
    result.float().sum().backward()
    assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "turns"),
    [(20, 10, True), (3, 10, False), (20, 16, False), (20, 40, False)],
)
def test_a_narrow_result_is_turned_in_memory_alone(rows, outputs, turns, bias):
    torch.manual_seed(0)
    given = [torch.randn(2, rows, 4), torch.randn(2, outputs, 4), torch.randn(2, outputs)]
    leaves = [g.double().requires_grad_() for g in given[: 3 if bias else 2]]
    shift = leaves[2] if bias else None
    found = batched_linear(*leaves[:2], shift, turned=True)
    assert found.transpose(1, 2).is_contiguous() is turns
    assert batched_linear(*leaves[:2], shift).is_contiguous()
    expected = torch.einsum("mri,moi->mro", *leaves[:2])
    expected = expected if shift is None else expected + shift.unsqueeze(1)
    torch.testing.assert_close(found, expected)
    seed = torch.randn(2, rows, outputs, dtype=torch.float64)
    several = [torch.autograd.grad(value, leaves, seed) for value in (found, expected)]
    torch.testing.assert_close(*several)
    assert several[0][1].is_contiguous()


@pytest.mark.parametrize("turned", [False, True])
def test_summed_cross_entropy_and_its_gradient(turned):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, dtype=torch.float64).transpose(1, 2)
    x = (x if turned else x.contiguous()).requires_grad_()
    target = torch.randint(0, 5, (3, 7))
    target[0, 2:4] = target[1] = -100  # of one member all are ignored
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    expected = [F.cross_entropy(x[m], target[m], reduction="sum") for m in range(3)]
    found = summed_cross_entropy(x, target, -100)
    torch.testing.assert_close(found, torch.stack(expected))
    several = [
        torch.autograd.grad((weights * value).sum(), x) for value in (found, torch.stack(expected))
    ]
    torch.testing.assert_close(*several)
    assert not several[0][0][1].any()


def test_a_member_that_is_not_finite_changes_no_bit_of_others():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 20, 4), torch.randn(3, 10, 4), torch.randn(3, 10)
    target = torch.randint(0, 10, (20,)).expand(3, 20)

    def step(x):
        leaves = [value.clone().requires_grad_() for value in (weight, bias)]
        loss = summed_cross_entropy(batched_linear(x, *leaves, turned=True), target, -100)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    bad = x.clone()
    bad[1, 3] = float("nan")
    for one, other in zip(step(x), step(bad)):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert other[1].isnan().any()


def test_a_class_that_is_none_is_refused():
    with pytest.raises(IndexError, match="out of bounds"):
        summed_cross_entropy(torch.randn(2, 3, 4), torch.full((2, 3), 4), -100)
