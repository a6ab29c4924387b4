"""What Python keeps between calls: what is seen of it, and what is not."""

import itertools
import logging
import random
from collections import deque

import numpy as np
import pytest
import torch
from support import peculiar
from torch import nn

from cgo.capture.python_state import Watched, moved


class Kept:
    """An object of the user's own."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def draw(generator):
    generator.random()


MOVES = {
    "a number": (0, lambda net: setattr(net, "kept", net.kept + 1)),
    "a tiny number": (1.0, lambda net: setattr(net, "kept", net.kept + 1e-12)),
    "a list": ([1], lambda net: net.kept.append(2)),
    "an item": ([1, 2], lambda net: net.kept.__setitem__(1, 5)),
    "a nested item": ({"a": {"b": [1]}}, lambda net: net.kept["a"]["b"].append(1)),
    "a set": ({1}, lambda net: net.kept.add(2)),
    "a deque": (deque([1, 2]), lambda net: net.kept.rotate(1)),
    "an array": (np.zeros(3), lambda net: net.kept.__setitem__(1, 5)),
    "an object": (Kept(1), lambda net: setattr(net.kept, "value", 2)),
    "an iterator": (itertools.count(), lambda net: next(net.kept)),
    "Python's generator": (random.Random(1), lambda net: draw(net.kept)),
    "NumPy's generator": (np.random.default_rng(1), lambda net: draw(net.kept)),
    "torch's generator": (torch.Generator(), lambda net: torch.rand(1, generator=net.kept)),
    "a tensor of one": (torch.zeros(()), lambda net: net.kept.add_(1)),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_is_named(name):
    kept, move = MOVES[name]
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].kept = kept
    watched = Watched(net)
    before = watched.snapshot()
    assert moved(before, watched.snapshot()) is None
    move(net[0])
    assert moved(before, watched.snapshot()) == "attribute `kept` of part '0'"


def test_attributes_that_come_and_go_move():
    net = nn.Linear(2, 2)
    watched = Watched(net)
    before = watched.snapshot()
    net.fresh = None
    assert moved(before, watched.snapshot()) == "attribute `fresh` of the module"


def test_parameters_buffers_modes_and_kept_features_are_no_state_of_pythons():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.LSTM(3, 3))
    watched = Watched(net)
    net.features = torch.zeros(4)
    before = watched.snapshot()
    net[0](torch.randn(4, 3))
    net.features = torch.ones(4)
    net.eval()
    assert moved(before, watched.snapshot()) is None


def test_a_logger_keeps_nothing_that_counts():
    """Its cache of levels fills when it is asked first, and through its manager hang all others."""
    net = nn.Linear(2, 2)
    net.log = logging.getLogger("tests.kept")
    watched = Watched(net)
    before = watched.snapshot()
    net.log.debug("asked")
    logging.getLogger("tests.kept.another")
    assert moved(before, watched.snapshot()) is None


def test_a_loop_of_objects_ends():
    net = nn.Linear(2, 2)
    net.itself = [net]
    net.circle = circle = []
    circle.append(circle)
    watched = Watched(net)
    assert moved(watched.snapshot(), watched.snapshot()) is None


def test_globals_classes_and_closures_are_seen_and_put_back():
    counted = [0]

    def loss(output, target):
        counted[0] += 1
        return output.sum()

    for build, place in (
        (peculiar.CountingGlobally, "global `CALLS`"),
        (peculiar.CountingInClass, "class attribute `calls`"),
        (peculiar.counting_closure, "variable `count`"),
    ):
        net = build()
        watched = Watched(net)
        before = watched.snapshot()
        with watched.preserved():
            net(torch.randn(2, *peculiar.SHAPE))
            assert moved(before, watched.snapshot()).startswith(place)
        assert moved(before, watched.snapshot()) is None
    watched = Watched(nn.Linear(2, 2), (loss,))
    before = watched.snapshot()
    loss(torch.zeros(1), None)
    assert moved(before, watched.snapshot()).startswith("variable `counted` around")
