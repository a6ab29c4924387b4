"""Gradients held as factors: who notes them, and that they are the gradients."""

import pytest
import torch

from cgo.runtime.kernels import batched_linear
from cgo.runtime.products import Product, Products, collecting, note


def backward(rows=2, inputs=6, outputs=8, dtype=torch.float64, turned=False):
    """Of a batched layer: its weight, and what was noted."""
    torch.manual_seed(0)
    weight = torch.randn(3, outputs, inputs, dtype=dtype, requires_grad=True)
    x = torch.randn(3, rows, inputs, dtype=dtype)
    with collecting() as noted:
        batched_linear(x, weight, None, turned=turned).square().sum().backward()
    return weight, noted.found()


@pytest.mark.parametrize(("rows", "outputs", "turned"), [(2, 8, False), (16, 24, True)])
def test_the_product_is_the_gradient(rows, outputs, turned):
    weight, found = backward(rows, 64, outputs, turned=turned)
    product = found[id(weight)]
    assert torch.equal(product.dense(), weight.grad)
    assert torch.equal(product.lanes(slice(1, 3)).dense(), weight.grad[1:3])


def test_factors_that_are_larger_than_their_product_are_not_kept():
    assert backward(rows=4)[1] == {}  # (8 + 6) * 4 > 8 * 6


def test_half_precision_is_rounded_before_it_is_added():
    assert backward(dtype=torch.bfloat16)[1] == {}


def test_nobody_collects_by_default():
    weight = torch.zeros(1, 4, 4)
    note(weight, torch.zeros(1, 4, 1), torch.zeros(1, 1, 4))
    with collecting() as outer:
        with collecting() as inner:
            note(weight, torch.zeros(1, 4, 1), torch.zeros(1, 1, 4))
        note(torch.zeros(2), torch.zeros(9), torch.zeros(9))
    assert list(inner.found()) == [id(weight)]
    assert outer.found() == {}


def test_a_weight_that_is_read_twice_has_no_product():
    weight = torch.zeros(1, 4, 4)
    with collecting() as noted:
        for _ in range(3):
            note(weight, torch.zeros(1, 4, 1), torch.zeros(1, 1, 4))
    assert noted.found() == {}


def test_a_gradient_is_computed_where_somebody_reads_it():
    leaf = torch.zeros(2, 3, 4, requires_grad=True)
    products, product = Products(), Product(torch.randn(2, 3, 1), torch.randn(2, 1, 4))
    products.hold(leaf, product)
    assert leaf.grad is None
    products.compute(leaf)
    assert torch.equal(leaf.grad, product.dense())
    assert products.of(leaf) is product
    products.drop(leaf)
    assert products.of(leaf) is None
    assert leaf.grad is not None
    products.compute(leaf)  # nothing is held: nothing is done


def test_what_is_dropped_was_computed():
    leaf = torch.zeros(1, 2, 2, requires_grad=True)
    products = Products()
    products.hold(leaf, Product(torch.ones(1, 2, 1), torch.ones(1, 1, 2)))
    products.drop(leaf)
    assert leaf.grad.tolist() == [[[1, 1], [1, 1]]]
    products.hold(leaf, Product(torch.ones(1, 2, 1), torch.ones(1, 1, 2)))
    products.clear()
    assert products.of(leaf) is None
