"""The operators of our own convolutions, as the machinery around a step sees them."""

from collections import Counter

import pytest
import torch
from support.fakes import assert_fakes_are_alike

from cgo.graph import Node, Ref, TensorType
from cgo.runtime.emitter import Emitter, make_group
from cgo.runtime.forms import forms_of
from cgo.runtime.grouped_convolutions import convolved
from cgo.runtime.precision import tf32
from cgo.runtime.tape import compile_tape, interpreted, record
from cgo.runtime.triton_kernels import usable

CPU = torch.device("cpu")

interpreting = pytest.mark.skipif(
    not usable(CPU, True), reason="Triton interprets no kernels here: it is missing, or for a GPU"
)


def given(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 3), (6, 2, 3, 3), (6,))
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def step(x, weight, bias):
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
    result = convolved(*leaves, 2, 2, 1, x.dtype)
    return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]


@interpreting
@pytest.mark.parametrize("replayed", [compile_tape, interpreted], ids=["TorchScript", "Python"])
def test_a_step_is_recorded_and_replayed_with_its_bits(replayed):
    expected, tape = record(step, given())
    for ours, theirs in zip(replayed(tape)(*given()), expected, strict=True):
        assert torch.equal(ours, theirs)


@interpreting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_fake_tensors_get_what_true_ones_get(dtype):
    assert_fakes_are_alike(step, lambda: given(dtype))


@interpreting
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_what_torch_allows_convolutions(allowed):
    with tf32(allowed):
        _, tape = record(step, given())
    calls = [call for call in tape.calls if call.op._schema.name.startswith("cgo::")]
    assert [call.arguments["tf32"] for call in calls] == [allowed] * 3


@interpreting
def test_only_wanted_gradients_are_computed():
    x, weight, bias = given()
    weight.requires_grad_()

    def backward(x, weight, bias):
        result = convolved(x, weight, bias, 2, 1, 1, x.dtype)
        return torch.autograd.grad(result.sum(), [weight])

    _, tape = record(backward, [x, weight, bias])
    called = {call.op._schema.name for call in tape.calls}
    assert "cgo::grouped_convolution_to_weight" in called
    assert "cgo::grouped_convolution_to_input" not in called


X, DOUBLE = TensorType("float32", (2, 4, 6, 6)), TensorType("float64", (2, 4, 6, 6))


def taken(weight, *rest, op="aten.conv2d.default", type_=X, last=False, device=CPU):
    """Whether the form writes a group of two convolutions."""
    types = {Ref(f"{m}{name}"): t for m in "ab" for name, t in (("x", type_), ("w", weight))}
    nodes = [
        Node(f"{m}y", op, (Ref(f"{m}x"), Ref(f"{m}w"), None, *rest), (), (type_,), frozenset({m}))
        for m in "ab"
    ]
    emitter = Emitter(device, types, Counter(), last)
    for m in "ab":
        for name in "xw":
            emitter.set(Ref(f"{m}{name}"), emitter.graph.placeholder(m + name))
    (form,) = [f for f in forms_of("aten.conv2d") if f.name == "grouped convolution in one kernel"]
    return form.rule(emitter, make_group(nodes, types)) is not None


def weight(*shape):
    return TensorType("float32", shape)


@interpreting
def test_the_kernel_takes_square_convolutions_of_contiguous_images():
    three = weight(4, 4, 3, 3)
    assert taken(three)
    assert taken(three, (2, 2), (1, 1))
    assert taken(three, (1, 1), "same", op="aten.conv2d.padding")
    assert taken(three, (2, 2), "valid", op="aten.conv2d.padding")
    assert taken(three, type_=DOUBLE)


@interpreting
def test_the_kernel_leaves_the_others():
    three = weight(4, 4, 3, 3)
    assert not taken(three, last=True)
    assert not taken(weight(4, 4, 3, 1))
    assert not taken(weight(4, 2, 3, 3), (1, 1), (0, 0), (1, 1), 2)
    assert not taken(three, (1, 1), (1, 1), (2, 2))
    assert not taken(three, (2, 1))
    assert not taken(three, (1, 1), (1, 0))
    assert not taken(weight(4, 4, 2, 2), (1, 1), "same", op="aten.conv2d.padding")
    assert not taken(weight(256, 4, 3, 3))
    assert not taken(three, type_=DOUBLE, device=torch.device("cuda"))  # no products in float64
