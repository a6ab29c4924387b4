"""Kernels with a backward of their own against what autograd derives."""

import pytest
import torch

from cgo.runtime.kernels import batched_linear


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
