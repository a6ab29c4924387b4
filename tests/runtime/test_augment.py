"""Augmentation by a module."""

import random

import numpy as np
import pytest
import torch
from support import augments

import cgo
from cgo.errors import DataError
from cgo.runtime.augment import Augmentation

CPU = torch.device("cpu")


def augmentation(name, device=CPU, seed=3, **kwargs):
    spec = cgo.DataSpec(
        "support.small:points", seed=seed, augment=f"support.augments:{name}", augment_kwargs=kwargs
    )
    return Augmentation(spec, device)


def batch(device=CPU):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).to(device)
    return {"input": x, "target": torch.arange(8, device=device)}


def by_hand(x, seed, epoch, number):
    """What `DataSpec` documents, in a plain loop."""
    torch.manual_seed(seed)
    module = augments.Jitter(0.5)
    key = int(np.random.SeedSequence((seed, epoch, number)).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(key), np.random.seed(key % 2**32), random.seed(key)
    with torch.no_grad():
        return module(x)


def test_a_plain_loop_can_reproduce_it():
    augment = augmentation("Jitter", scale=0.5)
    for epoch, number in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        leaves = batch()
        found = augment(leaves, epoch, number)
        assert torch.equal(found["input"], by_hand(leaves["input"], 3, epoch, number))
        assert found["target"] is leaves["target"]


def test_each_batch_of_each_epoch_and_seed_draws_its_own():
    drawn = [
        augmentation("Jitter", seed=seed)(batch(), epoch, number)["input"] - batch()["input"]
        for seed in (3, 4)
        for epoch in (0, 1)
        for number in (0, 1)
    ]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 8


def test_the_processs_streams_are_left_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    augmentation("Jitter")(batch(), 0, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_shapes_may_change_and_no_gradient_is_recorded():
    found = augmentation("Widen")(batch(), 0, 0)
    assert found["input"].shape == (8, 7)
    spec = cgo.DataSpec(
        "support.small:points",
        augment="torch.nn:Linear",
        augment_kwargs={"in_features": 6, "out_features": 2},
    )
    assert not Augmentation(spec, CPU)(batch(), 0, 0)["input"].requires_grad


def test_dicts_are_given_and_returned_by_name():
    leaves = {"input.x": torch.ones(4, 6), "input.scale": torch.ones(4), "target": torch.ones(4)}
    found = augmentation("Named")(leaves, 0, 0)
    assert list(found) == list(leaves)
    assert torch.equal(found["input.x"], torch.full((4, 6), 2.0))
    with pytest.raises(DataError, match=r"returned input\.x; it was given input\.x, input\.scale"):
        augmentation("Named", returned=["x"])(leaves, 0, 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "augments:Bad, in batch 5 of epoch 2, raised ValueError: no such colour"),
        ("pair", r"returned input\.0, input\.1; it was given input and must return the same"),
        ("fewer", r"returned input of shape \[7, 6\], was given \[8, 6\]; the number of samples"),
        ("list", r"input\.0 is a list, not a tensor"),
        ("number", "augments:Bad returned: input is a int, not a tensor"),
    ],
)
def test_what_a_module_must_not_do_is_named(kind, message):
    with pytest.raises(DataError, match=message):
        augmentation("Bad", kind=kind)(batch(), 2, 5)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(DataError, match=r"no_module returned a function, no nn\.Module"):
        augmentation("no_module")
    with pytest.raises(DataError, match="unbuildable raised OSError: no table of size 3"):
        augmentation("unbuildable", size=3)


@pytest.mark.gpu
def test_on_cuda_a_batch_depends_on_its_key_alone_and_the_device_stream_stays(cuda):
    augment = augmentation("Jitter", cuda)
    first = augment(batch(cuda), 0, 1)["input"]
    torch.cuda.manual_seed(8)
    before = torch.cuda.get_rng_state(cuda)
    assert torch.equal(augment(batch(cuda), 0, 1)["input"], first)
    assert torch.equal(torch.cuda.get_rng_state(cuda), before)
    assert not torch.equal(augment(batch(cuda), 0, 2)["input"], first)
