"""Reading a data set sample by sample."""

import gc
import os

import pytest
import torch
from support import small

import cgo
from cgo.errors import DataError
from cgo.runtime.samples import Samples, collate

ORDER = torch.arange(40)


def samples(source, workers=0, keep=True, **kwargs):
    spec = cgo.DataSpec("support.small:points", num_workers=workers)
    train, _ = getattr(small, source)(**kwargs)
    return Samples(train, "train", spec, pin=False, keep_workers=keep)


def inputs(which, epoch, order=ORDER, sizes=(16, 16, 8)):
    return torch.cat([leaves["input"] for leaves in which.batches(epoch, order, sizes)])


def test_a_sample_is_the_same_in_any_order_batch_and_number_of_workers():
    expected = inputs(samples("noisy_points"), 1)
    assert not torch.equal(expected, inputs(samples("noisy_points"), 0))
    found = inputs(samples("noisy_points"), 1, ORDER.flip(0), (1, 39)).flip(0)
    assert torch.equal(found, expected)
    assert torch.equal(inputs(samples("noisy_points", workers=2), 1), expected)


@pytest.mark.parametrize("keep", [True, False])
def test_workers_serve_epoch_after_epoch(keep):
    which = samples("noisy_points", workers=1, keep=keep)
    alone = samples("noisy_points")
    next(which.batches(0, ORDER, (16, 16, 8)))  # an epoch that ends early
    for epoch in range(2):
        assert torch.equal(inputs(which, epoch), inputs(alone, epoch))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_raising_sample_is_named(workers):
    broken = samples("broken_points", bad=23, workers=workers)
    with pytest.raises(DataError, match="sample 23 of the train data raised OSError: disk on fire"):
        list(broken.batches(0, ORDER, (20, 20)))


def test_samples_of_different_shapes_are_refused():
    with pytest.raises(DataError, match="samples cannot be stacked into a batch"):
        collate([(torch.ones(2), 0), (torch.ones(3), 0)])


class Collecting:
    """A data set whose reading collects garbage, in whichever process it is read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        gc.collect()
        return torch.zeros(2), torch.tensor(index)


class Foreign:
    """What belongs to a device: must be given back by the process that took it."""

    def __init__(self, notes):
        self.notes, self.itself = notes, self

    def __del__(self):
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_do_not_collect_what_their_parent_left(tmp_path):
    notes = tmp_path / "given back"
    gc.disable()
    try:
        Foreign(notes)  # garbage in a cycle, not yet collected
        spec = cgo.DataSpec("support.small:points", batch_size=2, num_workers=1)
        samples = Samples(Collecting(), "train", spec, pin=False, keep_workers=False)
        batches = samples.batches(0, torch.arange(4), (2, 2))
        assert len(list(batches)) == 2
    finally:
        gc.enable()
    gc.collect()
    assert set(notes.read_text().split()) == {str(os.getpid())}
