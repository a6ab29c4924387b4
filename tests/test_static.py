"""Which operators give shapes that follow from shapes."""

import pytest
import torch

from cgo.capture.static import is_static

A = torch.ops.aten
X, P, J = torch.randn(3, 4), torch.rand(3, 4) > 0.5, torch.tensor([0, 2])

STATIC = {
    "add": (A.add.Tensor, (X, X)),
    "linear": (A.linear.default, (X, torch.ones(2, 4))),
    "places": (A.index.Tensor, (X, [J])),
    "no place first": (A.index.Tensor, (X, [None, J])),
    "count": (A.count_nonzero.default, (X,)),
    "largest": (A.topk.default, (X, 2)),
    "so many classes": (A.one_hot.default, (J, 5)),
    "repeated so often": (A.repeat_interleave.self_int, (X, 2)),
    "of that size at most": (A.nonzero_static.default, (P,), {"size": 3}),
    "written": (A.add_.Tensor, (X, 1)),
    "made": (A.zeros.default, ([2, 3],)),
    "several": (A.split.Tensor, (X, 2)),
    "factors": (A.linalg_qr.default, (X,)),
}
NOT = {
    "a number": (A.item.default, (X[0, 0],)),
    "whether": (A.is_nonzero.default, (X[0, 0],)),
    "equal": (A.equal.default, (X, X)),
    "a mask": (A.index.Tensor, (X, [P])),
    "where": (A.nonzero.default, (P,)),
    "selected": (A.masked_select.default, (X, P)),
    "distinct": (A.unique_dim.default, (X, 0)),
    "as many classes as there are": (A.one_hot.default, (J,)),
    "as many as counted": (A.bincount.default, (J,)),
    "repeated": (A.repeat_interleave.Tensor, (J,)),
    "does not fit": (A.index.Tensor, (X, [J, torch.arange(3)])),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr("cgo.capture.static._KNOWN", set())


def asked(overload, args, kwargs=None):
    return is_static(overload, args, kwargs or {})


@pytest.mark.parametrize("name", STATIC)
def test_shapes_alone_decide(name):
    before = X.clone()
    assert asked(*STATIC[name])
    assert torch.equal(X, before)  # nothing is run on it


@pytest.mark.parametrize("name", NOT)
def test_values_decide(name):
    assert not asked(*NOT[name])


def test_shapes_that_do_not_fit_say_nothing_of_those_that_do():
    assert not asked(A.index.Tensor, (X, [J, torch.arange(3)]))
    assert asked(A.index.Tensor, (X, [J, torch.arange(2)]))


def test_a_size_of_minus_one_is_another_call_than_a_size():
    assert asked(A.one_hot.default, (J, 3))
    assert not asked(A.one_hot.default, (J, -1))
