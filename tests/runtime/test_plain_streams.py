"""What a plain loop draws from keyed streams: by any operator, what NumPy says."""

import doctest

import pytest
import torch
from support.keyed import KeyedStreams as ByNumpy
from torch import nn
from torch.nn import functional as F

import cgo
from cgo.errors import CgoError
from cgo.runtime import plain_streams

X = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 4, 6)
CALLS = {
    "dropout": lambda: F.dropout(X, 0.3),
    "everything dropped": lambda: F.dropout(X, 1.0) + F.dropout(X, 0.5),
    "channels": lambda: F.dropout1d(X, 0.5),
    "alpha dropout": lambda: F.alpha_dropout(X, 0.2),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.2),
    "fused dropout": lambda: torch.native_dropout(X, 0.3, True)[0],
    "between layers": lambda: nn.GRU(6, 3, 2, dropout=0.5).double()(X)[0],
    "rand": lambda: torch.rand(3, 4) + torch.rand_like(X.float()[0, :3, :4]),
    "randn": lambda: torch.randn_like(X) + torch.randn(6, dtype=torch.float64),
    "bernoulli": lambda: torch.bernoulli(X.abs()) + torch.zeros_like(X).bernoulli_(0.3),
    "probabilities": lambda: torch.zeros_like(X).bernoulli_(X.abs()),
    "in place": lambda: [torch.empty(40).uniform_(-1, 2), torch.empty(40).normal_(1, 0.1),
                         torch.empty(40).exponential_(2.0), torch.empty(40).log_normal_(0.1, 0.2),
                         torch.empty(40).cauchy_(0.1, 0.2), torch.empty(40).geometric_(0.3),
                         torch.empty(40).random_(3, 9), torch.empty(40).random_(7)],
    "integers": lambda: [torch.randint(9, (40,)), torch.randint(-3, 9, (40,)), torch.randperm(20),
                         torch.randint_like(X, 5)],
}  # fmt: skip


def both(call):
    """Two steps of training and one of evaluation, by the engine's streams and by NumPy's."""
    found = []
    for kind in (cgo.KeyedStreams, ByNumpy):
        streams = kind(seed=5)
        mine = []
        for split in ("train", "train", "validation"):
            torch.manual_seed(0)
            with streams.forward(split):
                given = call()
            mine += given if isinstance(given, list) else [given]
        assert streams.steps == {"train": 2, "validation": 1}
        found.append(mine)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_operators_draw_what_numpy_draws(name):
    for found, wanted in zip(*both(CALLS[name]), strict=True):
        torch.testing.assert_close(found, wanted)


def test_steps_and_kinds_of_program_differ():
    first, second, evaluation = both(CALLS["dropout"])[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, evaluation)


def test_gradients_follow_what_was_drawn():
    x = X.clone().requires_grad_()
    with cgo.KeyedStreams(5).forward():
        out = torch.native_dropout(x, 0.3, True)[0] + F.dropout(x, 0.4)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_what_streams_do_not_have_is_refused():
    streams = cgo.KeyedStreams(5)
    with pytest.raises(CgoError, match="multinomial"), streams.forward():
        torch.multinomial(torch.ones(3), 1)


def test_the_example_is_true():
    assert doctest.testmod(plain_streams).failed == 0
    assert doctest.testmod(plain_streams).attempted == 8
