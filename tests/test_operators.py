from __future__ import annotations

import pytest
import torch

from cgo.graph import SOURCES
from cgo.operators import CGO_OPERATORS, aten, draws, known, named_arguments


def test_an_operator_is_found_by_name():
    assert aten("aten.add.Tensor") is torch.ops.aten.add.Tensor
    assert aten("aten.__and__.Tensor") is torch.ops.aten.__and__.Tensor


@pytest.mark.parametrize("op", ["aten.linear.default", "aten.add.Tensor", *sorted(CGO_OPERATORS)])
def test_known(op):
    assert known(op)


@pytest.mark.parametrize(
    "op",
    [
        "aten.no_such_operator.default",
        "aten.add.NoSuchOverload",
        "aten.add",
        "aten.add.Tensor.more",
        "aten..default",
        "aten.add_.Tensor",  # writes its input
        "aten.add.out",
        "aten.align_to.ellipsis_idx",  # of named tensors, where torch has them
        "aten.softmax.Dimname",
        "aten.name.upper",  # attributes of the namespace and of a packet, no operators
        "aten._dir.append",
        "aten.__class__.__name__",
        "aten.add.op",
        "aten.add.overloads",
        "aten.add.__class__",
        "prims.add.default",
        "os.system.default",
        "cgo.no_such_operator",
        "",
    ],
)
def test_unknown(op):
    assert not known(op)


def test_sources_are_ours():
    assert SOURCES < CGO_OPERATORS


def test_arguments_have_names_and_defaults():
    found = named_arguments("aten.conv2d.default", ("x", "w", None, (2, 2)), {"groups": 3})
    assert found == {
        "input": "x", "weight": "w", "bias": None, "stride": (2, 2), "padding": (0, 0),
        "dilation": (1, 1), "groups": 3,
    }  # fmt: skip
    assert list(found) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]


def test_arguments_of_our_own_operators_have_names():
    found = named_arguments("cgo.batch_norm", ("x", None, None, "m", "v", 0.1, 1e-5), {})
    assert found["var"] == "v"
    assert found["eps"] == 1e-5
    assert named_arguments("cgo.input", (), {"leaf": "input"}) == {"leaf": "input"}


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "drawn"),
    [
        ("aten.add.Tensor", (X, X), {}, False),
        ("aten.rand_like.default", (X,), {}, True),
        ("aten.bernoulli.p", (X, 0.0), {}, True),
        ("aten.scaled_dot_product_attention.default", (X, X, X), {}, False),
        ("aten.scaled_dot_product_attention.default", (X, X, X, None, 0.5), {}, True),
        ("aten.scaled_dot_product_attention.default", (X, X, X), {"dropout_p": 0.5}, True),
        ("aten.lstm.input", (X, [X], [X], True, 1, 0.0, False, False, True), {}, False),
        ("aten.lstm.input", (X, [X], [X], True, 1, 0.1, True, False, True), {}, True),
    ],
)
def test_calls_that_draw_random_numbers(op, args, kwargs, drawn):
    assert draws(aten(op), args, kwargs) is drawn
