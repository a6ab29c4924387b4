from __future__ import annotations

import pytest
import torch

from cgo.graph import SOURCES
from cgo.operators import CGO_OPERATORS, aten, known


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
