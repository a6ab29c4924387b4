"""Data that stay on the device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small import Listed

import cgo
from cgo.errors import DataError
from cgo.runtime.accelerator import free_memory
from cgo.runtime.leaves import flatten
from cgo.runtime.resident import Resident, bytes_of
from cgo.runtime.samples import Samples

CPU = torch.device("cpu")
SPEC = cgo.DataSpec("support.small:points")


def images(samples, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 3, 4, 5, generator=generator).to(memory_format=layout)
    return x, torch.randint(0, 9, (samples,), generator=generator)


def loaded(tensors, order, sizes):
    """The batches of the ordinary loader."""
    samples = Samples(Listed(tensors), "train", SPEC, pin=False)
    return list(samples.batches(0, order, sizes))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert list(one) == list(other)
        for name, leaf in one.items():
            assert torch.equal(leaf, other[name])
            assert leaf.dtype == other[name].dtype
            assert leaf.stride() == other[name].stride(), name


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 7),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 2**20),
)
def test_batches_are_those_of_the_ordinary_loader_bit_for_bit(sizes, chunk, layout, seed):
    samples = sum(sizes)
    tensors = images(samples, layout)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    expected = loaded(tensors, order, sizes)
    parts = [chunk] * (samples // chunk) + [samples % chunk] * (samples % chunk > 0)
    chunks = loaded(tensors, torch.arange(samples), parts)
    read = Resident.read(iter(chunks), samples, CPU)
    assert_same(list(read.batches(7, order, sizes)), expected)
    whole = Resident(flatten(tensors), CPU)
    indexed = [flatten(tuple(t[index] for t in tensors)) for index in order.split(sizes)]
    assert_same(list(whole.batches(0, order, sizes)), indexed)


def test_tensors_that_are_there_already_are_not_copied():
    tensors = images(4)
    assert Resident(flatten(tensors), CPU).leaves["input"] is tensors[0]


def test_a_batch_is_a_copy_that_a_model_may_write_into():
    tensors = images(4)
    before = tensors[0].clone()
    (batch,) = Resident(flatten(tensors), CPU).batches(0, torch.arange(4), (4,))
    batch["input"].zero_()
    assert torch.equal(tensors[0], before)


def test_what_does_not_fit_is_refused_with_both_sizes_before_it_is_read():
    leaves = flatten(images(2**10))
    needed = bytes_of(leaves)
    assert needed == 2**10 * (3 * 4 * 5 * 4 + 8)
    Resident(leaves, CPU, limit_bytes=needed)
    message = "takes 0.242 MiB and may take 0.242 MiB on cpu; leave `resident` unset"
    with pytest.raises(DataError, match=message):
        Resident(leaves, CPU, limit_bytes=needed - 1)

    def chunks():
        yield {name: leaf[:16] for name, leaf in leaves.items()}
        pytest.fail("a second batch was read")

    with pytest.raises(DataError, match=message):
        Resident.read(chunks(), 2**10, CPU, limit_bytes=needed - 1)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[:, :1]])
def test_batches_that_are_unlike_the_first_are_refused(change):
    x, y = images(4)
    chunks = [{"input": x[:2], "target": y[:2]}, {"input": change(x[2:]), "target": y[2:]}]
    with pytest.raises(DataError, match=r"samples from 2 on are input torch\.float.* one kind"):
        Resident.read(iter(chunks), 4, CPU)


def test_the_host_has_memory():
    assert free_memory(CPU) > 2**20


@pytest.mark.gpu
def test_batches_on_cuda_are_those_on_the_host(cuda):
    tensors = images(40, torch.channels_last)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = list(Resident(flatten(tensors), cuda).batches(0, order, (16, 16, 8)))
    assert all(leaf.is_cuda for batch in found for leaf in batch.values())
    on_host = [{name: leaf.cpu() for name, leaf in batch.items()} for batch in found]
    assert_same(on_host, list(Resident(flatten(tensors), CPU).batches(0, order, (16, 16, 8))))
    assert free_memory(cuda) > 2**20
