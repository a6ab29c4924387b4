"""The process's random streams."""

import random

import numpy as np
import pytest
import torch

from cgo.runtime.randomness import mixed_seed, preserved_random_state, seed_all, seeded


def draws():
    return float(torch.rand(())), float(np.random.rand()), random.random()


@pytest.mark.parametrize("context", [preserved_random_state, lambda: seeded(5)])
def test_the_streams_are_put_back_also_after_an_error(context):
    seed_all(1)
    expected = draws()
    seed_all(1)

    def fail():
        with context():
            raise KeyError(draws())

    with pytest.raises(KeyError):
        fail()
    assert draws() == expected


def test_within_the_streams_are_seeded():
    seed_all(9)
    expected = draws()
    with seeded(9):
        assert draws() == expected


def test_keys_do_not_collide_by_sum_or_order():
    keys = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert len({mixed_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= mixed_seed(*key) < 2**63 for key in keys)


@pytest.mark.gpu
def test_the_devices_own_stream_is_seeded_and_put_back(cuda):
    def draw():
        return torch.rand(3, device=cuda)

    torch.manual_seed(1)
    expected = draw()
    torch.manual_seed(9)
    inside = draw()
    torch.manual_seed(1)
    with seeded(9):
        assert torch.equal(draw(), inside)
    assert torch.equal(draw(), expected)
