"""The process's random streams: seeded for one purpose, and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global random streams (torch, numpy, random) back afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_all(seed: int) -> None:
    """Seed torch, numpy and random.

    As `torch.manual_seed`, which takes a millisecond where CUDA is not in use yet: for each device
    it keeps a note of who asked.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def mixed_seed(*key: int) -> int:
    """A seed below 2^63 from several numbers.

    SeedSequence mixes them so that no two keys collide by sum.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global streams, CUDA devices' too, and put all of them back afterwards."""
    # Each CUDA device draws from a generator of its own; `seed_all` seeds those of all devices.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    states = [torch.cuda.get_rng_state(index) for index in devices]
    with preserved_random_state():
        try:
            seed_all(seed)
            yield
        finally:
            for index, state in zip(devices, states):
                torch.cuda.set_rng_state(state, index)
