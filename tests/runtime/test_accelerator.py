"""The seam to a device: the CPU's side of it here, CUDA's where there is one."""

import weakref

import pytest
import torch
from support.fake_cuda import FakeCuda, Generator

from cgo.runtime import accelerator
from cgo.runtime.accelerator import (
    Captured,
    CaptureRefused,
    Cuda,
    accelerator_for,
    captured_seconds,
    is_out_of_memory,
    numbered,
    without_frames,
)

CPU = torch.device("cpu")


class Uneven:
    """A device whose launches take 9 us more than what is taken off, and calls 1 us each."""

    def __init__(self):
        self.calls = []

    def capture(self, body, generators=(), undone=()):
        before = len(self.calls)
        results = body()
        return Captured(results, range(len(self.calls) - before).__len__)

    def seconds(self, replay):
        return 9e-6 + 1e-6 * replay()


@pytest.mark.parametrize(
    ("calls", "short", "seconds"),
    [(1, False, 10e-6), (1, True, 17e-6 / 8), (60, True, 69e-6)],
)
def test_what_is_short_is_timed_several_times_in_a_row(calls, short, seconds):
    device = Uneven()

    def form(value):
        device.calls += [value] * calls
        return [value]

    assert captured_seconds(device, form, [0], short=short) == pytest.approx(seconds)


def too_much():
    torch.empty(2**50)


def test_an_allocation_that_fails_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        too_much()
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_an_error_lets_go_of_what_its_frames_hold():
    seen = []

    def fails():
        held = torch.ones(3)
        seen.append(weakref.ref(held))
        raise ValueError("as planned")

    try:
        fails()
    except ValueError as error:
        kept = without_frames(error)
    assert seen[0]() is None
    assert str(kept) == "as planned"


def test_there_is_one_accelerator_for_a_device():
    assert accelerator_for(CPU) is accelerator_for(torch.device("cpu"))


def test_numbers_are_uploaded_in_the_tensors_own_type():
    into = torch.zeros(2, dtype=torch.float64)
    accelerator_for(CPU).upload([0.1, 0.2], into)
    assert into.tolist() == [0.1, 0.2]


def test_captured_forms_are_timed_on_what_they_write():
    count = torch.zeros(())
    assert captured_seconds(accelerator_for(CPU), lambda x: [x + count.add_(1)], [count + 1]) > 0
    assert float(count) == 5  # five rounds; capturing itself has left no trace


def test_draws_from_a_stream_of_ones_own_are_captured_others_refused():
    generator = torch.Generator().manual_seed(0)
    host = accelerator_for(CPU)
    captured = host.capture(lambda: [torch.empty(3).normal_(generator=generator)], [generator])
    captured.replay()
    first = captured.results[0].clone()
    captured.replay()
    assert not torch.equal(first, captured.results[0])
    generator.manual_seed(0)
    assert torch.equal(first, torch.empty(3).normal_(generator=generator))
    with pytest.raises(CaptureRefused, match="process's random stream"):
        host.capture(lambda: [torch.rand(3)])


@pytest.mark.gpu
def test_a_cuda_graph_reads_and_writes_where_tensors_lie(cuda):
    device = torch.device("cuda", 0)
    accelerator = accelerator_for(device)
    weights, batch = torch.ones(4, 4, device=device), torch.ones(8, 4, device=device)
    rate = torch.zeros(1, device=device)
    generator = torch.Generator(device).manual_seed(3)

    def body():
        noise = torch.empty(8, 4, device=device).normal_(generator=generator)
        weights.add_(rate)
        return [batch @ weights, noise]

    accelerator.capture(lambda: [batch @ weights])  # chooses kernels
    captured = accelerator.capture(body, [generator])
    assert torch.equal(weights, torch.ones_like(weights))
    accelerator.upload([2.0], rate)
    seen = []
    for _ in range(2):
        captured.replay()
        seen.append([result.clone() for result in captured.results])
    assert seen[0][0].unique().tolist() == [12.0]
    assert seen[1][0].unique().tolist() == [20.0]
    plain = torch.Generator(device).manual_seed(3)
    for _, noise in seen:
        assert torch.equal(noise, torch.empty(8, 4, device=device).normal_(generator=plain))
    assert accelerator.seconds(captured.replay) > 0


@pytest.mark.gpu
def test_who_synchronises_is_refused_by_cuda_and_later_captures_work(cuda):
    device = torch.device("cuda", 0)
    accelerator = accelerator_for(device)
    values = torch.ones(3, device=device)
    generator = torch.Generator(device).manual_seed(3)
    stream = torch.cuda.current_stream(device)

    def looks():
        noise = torch.empty(3, device=device).normal_(generator=generator)
        return [values * float(values.sum()) + noise]

    for _ in range(2):
        with pytest.raises(CaptureRefused, match="cannot be captured"):
            accelerator.capture(looks, [generator])
        assert torch.cuda.current_stream(device) == stream
        torch.cuda.empty_cache()
        torch.empty(3, device=device).normal_(generator=generator)
        captured = accelerator.capture(lambda: [values * 2])
        captured.replay()
        assert captured.results[0].tolist() == [2.0, 2.0, 2.0]
        del captured  # the pool goes with its last graph, and the next has another


@pytest.mark.gpu
def test_what_runs_beside_is_waited_for(cuda):
    device = torch.device("cuda", 0)
    accelerator = accelerator_for(device)
    values = torch.rand(2048, 2048, device=device)
    accelerator.begin()
    with accelerator.beside(0):
        found = values
        for _ in range(20):
            found = (found @ values).tanh()
    accelerator.join()
    expected = values
    for _ in range(20):
        expected = (expected @ values).tanh()
    torch.testing.assert_close(found, expected)
    assert accelerator.free_bytes() > 0
    assert accelerator.peak_bytes() > 0


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert numbered(torch.device("cuda")) == torch.device("cuda", 3)
    assert numbered(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert numbered(CPU) == CPU
    assert accelerator_for(torch.device("cuda")) is accelerator_for(torch.device("cuda", 3))


@pytest.fixture
def faked(monkeypatch):
    """A device whose graphs behave as torch 2.11's do, and the pools that were abandoned."""
    abandoned = []
    monkeypatch.setattr(
        accelerator, "abandon", lambda device, pool: abandoned.append((device, pool))
    )
    return FakeCuda().install(monkeypatch), Cuda(torch.device("cpu", 0)), abandoned


def test_a_capture_that_does_not_end_leaves_no_generator_behind(faked):
    cuda, device, abandoned = faked
    registered, stream = Generator(), cuda.current

    def looks():
        registered.draw(cuda)
        cuda.read()
        return []

    for attempt in range(1, 3):
        with pytest.raises(CaptureRefused, match="the step cannot be captured"):
            device.capture(looks, [registered])
        registered.draw(cuda)
        cuda.default.draw(cuda)
        assert cuda.current is stream
        assert len(abandoned) == attempt
        assert abandoned[-1][0] == 0
    captured = device.capture(lambda: [torch.ones(2)], [registered])
    captured.replay()
    assert captured.results[0].tolist() == [1.0, 1.0]
    assert all(pool != cuda.pools for _, pool in abandoned)  # what is captured now has another


def test_a_body_that_raises_leaves_the_pool_to_the_graphs_that_are_there(faked):
    _, device, abandoned = faked

    def fails():
        raise ValueError("no such thing")

    with pytest.raises(CaptureRefused, match="no such thing"):
        device.capture(fails, [Generator()])
    assert abandoned == []
    assert device.capture(lambda: [torch.ones(1)]).results[0].item() == 1.0


def test_a_device_that_refuses_to_capture_says_why(faked):
    cuda, device, _ = faked
    cuda.refuses = "CUDA error: operation not supported"
    with pytest.raises(CaptureRefused, match="operation not supported"):
        device.capture(lambda: [torch.ones(1)])
    cuda.refuses = ""
    assert device.capture(lambda: [torch.ones(1)]).results[0].item() == 1.0
