"""Reading a data set sample by sample."""

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
