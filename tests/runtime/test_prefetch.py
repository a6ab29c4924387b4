"""Batches made ahead of their use."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgo.runtime.leaves import flatten
from cgo.runtime.prefetch import Copied, Prefetcher
from cgo.runtime.resident import Resident

CPU = torch.device("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "cgo-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


class Counted:
    """Counts up; raises at `bad`, and says whenever it has `due` items made."""

    def __init__(self, end, bad=None, due=None):
        self.made, self.end, self.bad, self.due = 0, end, bad, due
        self.reached = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        if self.made == self.bad:
            raise OSError("disk on fire")
        if self.made == self.end:
            raise StopIteration
        self.made += 1
        if self.made == self.due:
            self.reached.set()
        return self.made - 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 4))
def test_items_come_complete_and_in_order(count, depth):
    with Prefetcher(Counted(count), depth) as ahead:
        assert list(ahead) == list(range(count))
        assert list(ahead) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.integers(1, 4))
def test_an_error_comes_in_its_place(bad, depth):
    found = []
    with Prefetcher(Counted(20, bad), depth) as ahead:
        with pytest.raises(OSError, match="disk on fire"):
            found.extend(iter(ahead.__next__, None))
        assert list(ahead) == []


def test_items_before_an_error_are_given():
    found = []

    def take():
        with Prefetcher(Counted(20, 5)) as ahead:
            for item in ahead:
                found.append(item)

    with pytest.raises(OSError, match="disk on fire"):
        take()
    assert found == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("depth", [1, 3])
def test_items_are_made_ahead_but_no_more_than_asked(depth):
    items = Counted(20, due=depth)
    with Prefetcher(items, depth) as ahead:
        assert items.reached.wait(60)  # though nothing was asked for
        time.sleep(0.05)  # for one too many
        assert items.made == depth
        for taken in range(5):
            assert next(ahead) == taken
            assert items.made <= taken + 1 + depth
    assert items.made <= 5 + depth


def test_a_consumer_that_raises_ends_the_thread():
    ahead = Prefetcher(Counted(20))

    def consume():
        with ahead:
            raise KeyError(next(ahead))

    with pytest.raises(KeyError, match="0"):
        consume()
    assert list(ahead) == []


def test_leaving_waits_for_the_item_that_is_being_made():
    began = threading.Event()

    def slow():
        yield 0
        began.set()
        time.sleep(0.2)
        yield 1

    with Prefetcher(slow()) as ahead:
        assert next(ahead) == 0
        assert began.wait(60)
    assert not threads()


def source():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 6, generator=generator)
    return Resident(flatten((x, torch.arange(40))), CPU)


ORDER, SIZES = torch.randperm(40, generator=torch.Generator().manual_seed(1)), (16, 16, 8)


@pytest.mark.parametrize("ahead", [True, False])
def test_copies_are_those_of_the_source(ahead):
    expected = list(source().batches(0, ORDER, SIZES))
    found = list(Copied(source(), CPU, ahead=ahead).batches(0, ORDER, SIZES))
    assert len(found) == 3
    for one, other in zip(found, expected):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_an_epoch_that_ends_early_leaves_no_thread():
    batches = Copied(source(), CPU, ahead=True).batches(0, ORDER, SIZES)
    assert not threads()  # none before a batch is asked for
    for _ in batches:
        assert len(threads()) == 1
        break
    del batches  # as the end of a loop does it


def test_what_the_source_raises_reaches_the_consumer():
    class Broken:
        def batches(self, epoch, order, sizes):
            yield from source().batches(epoch, order, sizes[:2])
            raise OSError("disk on fire")

    batches = Copied(Broken(), CPU, ahead=True).batches(0, ORDER[:32], SIZES)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(OSError, match="disk on fire"):
        next(batches)


@pytest.mark.gpu
def test_memory_of_a_batch_is_not_reused_while_it_is_computed_with(cuda):
    x = torch.arange(64.0).repeat_interleave(2**16).reshape(64 * 2**8, 2**8)
    data = Resident(flatten((x, torch.arange(len(x)))), CPU)
    sums = []
    order, sizes = torch.arange(len(x)), (2**8,) * 64
    for leaves in Copied(data, cuda, ahead=True).batches(0, order, sizes):
        torch.cuda._sleep(10**6)  # the copies overtake the computation
        sums.append(leaves["input"].mean())
    assert [float(value) for value in sums] == [float(n) for n in range(64)]
