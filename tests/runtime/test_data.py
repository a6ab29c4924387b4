"""Data sets, their order and the shared loader."""

import random
import threading

import numpy as np
import pytest
import torch
from support import small

import cgo
from cgo.errors import DataError
from cgo.runtime.accelerator import free_memory
from cgo.runtime.data import Loader, epoch_order, open_data

CPU, META = torch.device("cpu"), torch.device("meta")  # META stands for a device with own memory

#: Bytes of the training points: 40 samples of 6 float32 and one int64.
POINTS_BYTES = 40 * (6 * 4 + 8)


def loader(source="support.small:points", kwargs=None, *, device=CPU, free=None, **spec):
    spec.setdefault("batch_size", 16)
    data = open_data(cgo.DataSpec(source, kwargs or {}, **spec))
    return Loader(data, device, free_bytes=free_memory if free is None else lambda device: free)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (size, leaves), (other_size, others) in zip(found, expected):
        assert size == other_size
        assert list(leaves) == list(others)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.cpu(), others[name])


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


def fetching():
    return any(thread.name == "cgo-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("resident", "free", "stays"),
    [
        (None, 4 * POINTS_BYTES, True),
        (None, 4 * POINTS_BYTES - 1, False),
        (True, 2 * POINTS_BYTES, True),
        (False, 2**40, False),
    ],
)
def test_tensors_that_fit_stay_on_the_device_and_others_are_copied_ahead(resident, free, stays):
    which = loader(device=META, free=free, resident=resident)
    batches = which.train(0)
    size, leaves = next(batches)
    assert fetching() is not stays  # a thread has room for two more, and may then end by itself
    assert leaves["input"].device == META
    assert leaves["input"].shape == (size, 6)
    assert [size for size, _ in batches] == [16, 8]
    assert not fetching()


@pytest.mark.parametrize("source", ["points", "named_points"])
def test_data_that_must_stay_but_do_not_fit_are_refused(source):
    which = loader(f"support.small:{source}", device=META, free=2 * POINTS_BYTES - 2, resident=True)
    with pytest.raises(DataError, match=r"takes 0\.00\d MiB and may take 0\.001 MiB on meta"):
        next(which.train(0))


@pytest.mark.parametrize(("workers", "ahead"), [(0, False), (1, True)])
def test_only_what_draws_in_other_processes_is_fetched_by_a_thread(workers, ahead):
    which = loader("support.small:noisy_points", device=META, num_workers=workers, free=2**40)
    batches = which.train(0)
    next(batches)
    assert fetching() is ahead
    del batches
    assert not fetching()


@pytest.mark.parametrize("workers", [0, 2])
def test_resident_samples_are_those_that_the_loader_reads(workers):
    spec = {"num_workers": workers, "batch_size": 7}
    found = loader("support.small:named_points", resident=True, **spec)
    expected = loader("support.small:named_points", **spec)
    for epoch in range(2):
        assert_same(list(found.train(epoch)), list(expected.train(epoch)))
    assert_same(list(found.validation()), list(expected.validation()))


def test_resident_samples_are_read_once_as_in_epoch_0():
    found = loader("support.small:noisy_points", resident=True, shuffle=False)
    loaded = loader("support.small:noisy_points", shuffle=False)
    first = list(loaded.train(0))
    for epoch in range(2):
        assert_same(list(found.train(epoch)), first)


def test_an_example_reads_one_batch_only():
    which = loader(
        "support.small:broken_points", {"bad": 23}, resident=True, shuffle=False, batch_size=20
    )
    assert which.example("train", 20)["input"].shape == (20, 6)
    with pytest.raises(DataError, match="sample 23 of the train data raised"):
        next(which.train(0))


@pytest.mark.parametrize("resident", [None, True])
def test_training_batches_are_augmented_after_they_are_loaded(resident):
    plain = loader(shuffle=False)
    which = loader(shuffle=False, augment="support.augments:Widen", resident=resident)
    for _ in range(2):  # what is kept is not what was augmented
        for (_, found), (size, given) in zip(which.train(1), plain.train(1)):
            assert found["input"].shape == (size, 7)
            assert torch.equal(found["input"][:, :6], 2 * given["input"])
            assert torch.equal(found["target"], given["target"])
    assert_same(list(which.validation()), list(plain.validation()))


def test_an_example_is_the_first_batch_augmented():
    which = loader(augment="support.augments:Jitter")
    _, first = next(which.train(0))
    assert torch.equal(which.example("train", 16)["input"], first["input"])
    assert which.example("train", 8)["input"].shape == (8, 6)
    _, validation = next(which.validation())
    assert torch.equal(which.example("validation", 12)["input"], validation["input"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("source", "spec"),
    [
        ("points", {}),
        ("points", {"resident": False}),
        ("noisy_points", {}),
        ("noisy_points", {"num_workers": 2}),
        ("named_points", {"resident": True}),
    ],
)
def test_batches_on_cuda_are_those_on_the_host(cuda, source, spec):
    found = loader(f"support.small:{source}", device=cuda, **spec)
    expected = loader(f"support.small:{source}", **spec)
    for epoch in range(3):
        assert_same(list(found.train(epoch)), list(expected.train(epoch)))
        assert_same(list(found.validation()), list(expected.validation()))
    assert not fetching()
