"""Data sets, their order and the shared loader."""

import random

import numpy as np
import pytest
import torch
from support import small

import cgo
from cgo.errors import DataError
from cgo.runtime.data import Loader, call_arguments, epoch_order, flatten, open_data, target_of

CPU = torch.device("cpu")


def loader(source="support.small:points", kwargs=None, **spec):
    spec.setdefault("batch_size", 16)
    return Loader(open_data(cgo.DataSpec(source, kwargs or {}, **spec)), CPU)


def test_epochs_visit_samples_in_the_documented_order():
    found = [leaves["input"] for _, leaves in loader(seed=7).train(3)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(7 + 3))
    train, _ = small.points()
    assert torch.equal(torch.cat(found), train.tensors[0][order])


def test_without_shuffling_the_order_is_the_data_sets():
    assert epoch_order(cgo.DataSpec("support.small:points", shuffle=False), 5, 2).tolist() == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [16, 16, 8]), (True, [16, 16])])
def test_the_last_training_batch_follows_drop_last(drop_last, sizes):
    assert [size for size, _ in loader(drop_last=drop_last).train(0)] == sizes


def test_validation_is_complete_and_in_order():
    batches = list(loader(batch_size=5).validation())
    assert [size for size, _ in batches] == [5, 5, 2]
    _, validation = small.points()
    found = torch.cat([leaves["target"] for _, leaves in batches])
    assert torch.equal(found, validation.tensors[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(workers):
    reference = loader("support.small:noisy_points", shuffle=False, batch_size=20)
    other = loader("support.small:noisy_points", shuffle=False, batch_size=8, num_workers=workers)

    def epoch(which, number):
        return torch.cat([leaves["input"] for _, leaves in which.train(number)])

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    first = epoch(reference, 0)
    assert torch.equal(first, epoch(other, 0))
    assert torch.equal(first, epoch(reference, 0))
    assert not torch.equal(first, epoch(other, 1))


def test_loading_leaves_the_global_streams_alone():
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    list(loader("support.small:noisy_points").train(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_raising_sample_is_named(workers):
    broken = loader("support.small:broken_points", {"bad": 23}, num_workers=workers)
    with pytest.raises(DataError, match="sample 23 of the train data raised OSError: disk on fire"):
        list(broken.train(0))


def test_dict_inputs_become_named_leaves_and_keyword_arguments():
    _, leaves = next(loader("support.small:named_points").train(0))
    assert set(leaves) == {"input.x", "input.scale", "target"}
    positional, named = call_arguments(leaves)
    assert positional == ()
    assert set(named) == {"x", "scale"}


def test_tuples_become_positional_arguments_in_order():
    leaves = flatten(((torch.ones(2),) * 11, (torch.zeros(2), torch.ones(2))))
    assert len(call_arguments(leaves)[0]) == 11
    assert len(target_of(leaves)) == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("support.bad_data:one", "expected two data sets"),
        ("support.bad_data:iterable", "training data set is a generator"),
        ("support.bad_data:empty", "validation data set is empty"),
    ],
)
def test_bad_sources_are_refused(returned, message):
    with pytest.raises(DataError, match=message):
        open_data(cgo.DataSpec(returned))


def test_samples_that_are_no_pairs_are_refused():
    with pytest.raises(DataError, match=r"must be an \(input, target\) pair"):
        flatten(torch.ones(3))
    with pytest.raises(DataError, match=r"target\.0 is a list"):
        flatten((torch.ones(2), ([1, 2],)))
