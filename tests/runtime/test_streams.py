"""Sections of a tape: they keep every dependency, whichever branch runs first."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgo.runtime.accelerator import Host, accelerator_for
from cgo.runtime.streams import Overlap, divide, forked, forked_calls, plans
from cgo.runtime.tape import compile_tape, record

CPU = torch.device("cpu")


class Shuffled(Host):
    """Runs branches in any order, as streams may."""

    def __init__(self, seed):
        super().__init__(CPU)
        self.dice = random.Random(seed)

    def side_by_side(self, branches):
        for branch in self.dice.sample(branches, len(branches)):
            branch()


def networks(count, depth=3):
    """A step of independent networks over one batch, with state that is written in place."""
    torch.manual_seed(0)
    weights = [torch.randn(6, 6, requires_grad=True) for _ in range(count)]
    means = [torch.zeros(6) for _ in range(count)]

    def step(x):
        for weight in weights:
            weight.grad = None
        outputs = []
        for weight, mean in zip(weights, means):
            value = x
            for _ in range(depth):
                value = (value @ weight).tanh()
                mean.mul_(0.9).add_(value.detach().mean(0), alpha=0.1)
                value = value - mean
            outputs.append(value)
        loss = torch.stack([value.square().mean() for value in outputs]).sum()
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in weights)]

    return step, means


def test_independent_networks_run_side_by_side():
    step, _ = networks(4)
    x = torch.randn(5, 6)
    _, tape = record(step, [x])
    sections = divide(tape, [x], width=4)
    wide = [section for section in sections if len(section.branches) == 4]
    assert sum(sum(map(len, section.branches)) for section in wide) > 0.7 * len(tape.calls)
    assert forked_calls(sections) <= len(tape.calls)


def test_a_chain_stays_on_one_stream():
    def step(x):
        for _ in range(20):
            x = x.tanh() * 2
        return [x]

    x = torch.randn(3)
    _, tape = record(step, [x])
    assert all(len(section.branches) == 1 for section in divide(tape, [x]))


def test_each_call_stands_in_one_branch():
    step, _ = networks(3)
    x = torch.randn(5, 6)
    _, tape = record(step, [x])
    listed = [c for s in divide(tape, [x]) for branch in s.branches for c in branch]
    assert len(listed) == len(tape.calls)
    assert set(map(id, listed)) == set(map(id, tape.calls))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 4), st.integers(2, 4))
def test_any_order_of_branches_gives_the_same_bits(seed, count, depth, width):
    step, means = networks(count, depth)
    x, other = torch.randn(5, 6), torch.randn(5, 6)
    _, tape = record(step, [x])
    before = [mean.clone() for mean in means]
    expected = [value.clone() for value in step(other)] + [mean.clone() for mean in means]
    for mean, value in zip(means, before):
        mean.copy_(value)
    run = forked(tape, divide(tape, [x], width), Shuffled(seed))
    found = [*run(other), *means]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_writes_through_views_keep_their_order():
    memory = torch.zeros(8)
    left, right = memory[:4], memory[2:6]

    def step(x):
        left.add_(x)
        first = (left * 2).sum().exp().log()
        right.mul_(x + 1)
        second = (memory * 3).sum().exp().log()
        left.sub_(0.5)
        return [first, second, memory.clone()]

    x = torch.full((4,), 0.25)
    _, tape = record(step, [x])
    for seed in range(20):
        memory.zero_()
        expected = [value.clone() for value in step(x)]
        memory.zero_()
        found = forked(tape, divide(tape, [x], 4), Shuffled(seed))(x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_draws_from_one_generator_keep_their_order():
    generator = torch.Generator()

    def step(x):
        first = torch.empty(4).normal_(generator=generator) + x
        second = torch.empty(4).uniform_(generator=generator) * x
        return [first.tanh().exp().sin(), second.tanh().exp().sin()]

    x = torch.ones(4)
    generator.manual_seed(1)
    expected, tape = record(step, [x])
    for seed in range(10):
        generator.manual_seed(1)
        found = forked(tape, divide(tape, [x], 2), Shuffled(seed))(x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_crosses_branches_is_freed_between_sections():
    """Memory that a stream frees must not be taken while another still reads it."""
    step, _ = networks(3)
    x = torch.randn(5, 6)
    _, tape = record(step, [x])
    late = 0
    for branches, gone in plans(tape, divide(tape, [x])):
        late += len(gone)
        for branch in branches:
            made = {value for call, _ in branch for value in call.outputs}
            assert all(value in made for _, freed in branch for value in freed)
    assert late > 0


def test_the_faster_form_is_kept_and_told():
    step, _ = networks(4)
    x = torch.randn(5, 6)
    _, tape = record(step, [x])
    heard = []

    class Clock(Host):
        times = iter([2.0] * 5 + [1.0] * 5 + [1.0] * 5 + [2.0] * 5)

        def seconds(self, replay):
            replay()
            return next(self.times)

    overlap = Overlap(Clock(CPU), lambda what, **figures: heard.append((what, figures)))
    assert overlap("train/5", tape, compile_tape(tape), [x]) is not None
    assert overlap("train/5", tape, compile_tape(tape), [x]) is None
    assert [figures["forked"] > 0 for _, figures in heard] == [True, False]
    assert heard[0][1]["before_s"] == 2.0


def test_a_form_that_gives_other_values_is_not_kept():
    """Branches that write memory which nobody told of, for one: here, a batch in other order."""
    step, _ = networks(4)
    x = torch.randn(5, 6)
    _, tape = record(step, [x])
    heard = []
    overlap = Overlap(Host(CPU), lambda what, **figures: heard.append(figures))
    replay = compile_tape(tape)
    assert overlap("train/5", tape, lambda given: replay(given.flip(0) + 1), [x]) is None
    assert heard[0]["reason"] == "streams give other values"


def test_running_statistics_that_two_norms_share_keep_their_order():
    """The operator's schema does not say that it writes them."""
    mean, var = torch.zeros(3), torch.ones(3)

    def step(x, y):
        found = []
        for batch in (x, y):
            value = torch.ops.aten.native_batch_norm(batch, None, None, mean, var, True, 0.3, 1e-5)
            found.append(value[0].tanh().exp().sin().cos())
        return found

    given = [torch.randn(4, 3), torch.randn(4, 3) + 2]
    _, tape = record(step, given)
    outcomes = set()
    for seed in range(20):
        mean.zero_()
        var.fill_(1.0)
        forked(tape, divide(tape, given, 2), Shuffled(seed))(*given)
        outcomes.add((tuple(mean.tolist()), tuple(var.tolist())))
    assert len(outcomes) == 1


@pytest.mark.gpu
def test_streams_of_a_gpu_give_the_same_values(cuda):
    weights = [torch.randn(6, 6, device=cuda, requires_grad=True) for _ in range(4)]

    def there(batch):
        for weight in weights:
            weight.grad = None
        values = [(batch @ weight).tanh() for weight in weights]
        loss = torch.stack([value.square().mean() for value in values]).sum()
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in weights)]

    batch = torch.randn(5, 6, device=cuda)
    plain, tape = record(there, [batch])
    accelerator = accelerator_for(cuda)
    run = forked(tape, divide(tape, [batch]), accelerator)
    captured = accelerator.capture(lambda: run(batch))
    for _ in range(3):
        captured.replay()
        for found, wanted in zip(captured.results, plain):
            torch.testing.assert_close(found, wanted)
