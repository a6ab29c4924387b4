"""Steps as tapes: what is recorded, what is refused, and that a replay gives the same bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cgo.runtime.tape import Tape, Taped, TapeError, _source, compile_tape, record


def learning(*shape):
    return torch.randn(shape, requires_grad=True)


def step_of(function):
    """A forward and backward over the tensors that learn, as lanes take it."""

    def step(*given):
        leaves = [value for value in given if value.requires_grad]
        for leaf in leaves:
            leaf.grad = None
        loss = function(*given)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return step


def layer(x, weight, bias, y):
    return F.cross_entropy(F.linear(x, weight, bias).relu(), y)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator)
    return x, torch.randint(0, 2, (4,), generator=generator)


def source(step, *inputs):
    tape = record(step, inputs)[1]
    return _source(tape, list(tape.constants))


def test_a_tape_is_straight_line_code():
    x, weight = torch.randn(4, 3), learning(2, 3)
    assert source(step_of(lambda x, w: (x @ w.t()).relu().sum()), x, weight) == (
        "def step(i0: Tensor, i1: Tensor) -> List[Tensor]:\n"
        "  v0 = torch.ops.aten.t(i1)\n"
        "  v1 = torch.ops.aten.mm(i0, v0)\n"
        "  v2 = torch.ops.aten.relu(v1)\n"
        "  v4 = torch.ops.aten.sum(v2)\n"
        "  v5 = torch.ops.aten.ones_like(v4, pin_memory=False, "
        "memory_format=torch.preserve_format)\n"
        "  v6 = torch.ops.aten.expand(v5, torch.jit.annotate(List[int], [4, 2]))\n"
        "  v8 = torch.ops.aten.threshold_backward(v6, v2, 0)\n"
        "  v9 = torch.ops.aten.t(v8)\n"
        "  v10 = torch.ops.aten.mm(v9, i0)\n"
        "  v11 = torch.ops.aten.t(v10)\n"
        "  v12 = torch.ops.aten.t(v11)\n"
        "  return [v4, v12]\n"
    )


def test_a_replay_gives_the_bits_of_other_batches_and_other_weights():
    weight, bias = learning(2, 3), learning(2)
    step = step_of(lambda x, y, w, b: layer(x, w, b, y))
    replay = compile_tape(record(step, (*batch(0), weight, bias))[1])
    for seed in range(1, 4):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        given = (*batch(seed), weight, bias)
        for found, expected in zip(replay(*given), step(*given), strict=True):
            assert torch.equal(found, expected)


def test_a_replay_writes_what_the_step_writes():
    norm = nn.BatchNorm2d(3)
    state = [norm.weight, norm.bias, norm.running_mean, norm.running_var]

    def step(x, weight, bias, mean, var):
        F.batch_norm(x, mean, var, weight, bias, training=True).square().mean().backward()
        return [weight.grad, bias.grad]

    x = torch.randn(4, 3, 2, 2)
    replay = compile_tape(record(step, (x, *state))[1])
    expected = norm.running_mean * 0.9 + 0.1 * x.mean((0, 2, 3))
    replay(x, *state)
    torch.testing.assert_close(norm.running_mean, expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sum() * x.sum().item(), "depends on values"),
        (lambda x: x[x > 0].sum(), "depends on values"),
        (lambda x: F.dropout(x).sum(), "random stream"),
        (lambda x: (x + torch.rand_like(x)).sum(), "random stream"),
    ],
)
def test_what_differs_from_step_to_step_is_refused(function, reason):
    with pytest.raises(TapeError, match=reason):
        record(step_of(function), [learning(4)])


def test_random_numbers_from_a_generator_of_ones_own_are_no_secret_of_the_process():
    given = torch.Generator().manual_seed(0)
    with pytest.raises(TapeError, match="TorchScript"):
        compile_tape(record(step_of(lambda x: (x * x.new_empty(4).normal_(generator=given)).sum()),
                            [learning(4)])[1])  # fmt: skip


def test_a_result_that_no_call_gave_is_refused():
    kept = torch.ones(2)
    with pytest.raises(TapeError, match="no recorded call"):
        record(lambda x: [kept], [torch.ones(2)])


def test_tensors_that_nobody_hands_over_are_constants():
    scale = torch.tensor([1.0, 2.0])
    tape = record(lambda x: [x * scale], [torch.ones(2)])[1]
    assert [value.tolist() for value in tape.constants.values()] == [[1.0, 2.0]]
    assert compile_tape(tape)(torch.full((2,), 3.0))[0].tolist() == [3.0, 6.0]


def test_calls_that_nobody_needs_are_left_out():
    def step(x):
        x.exp()
        return [x.detach().cos()]

    tape = record(step, [torch.ones(2)])[1]
    assert [str(call.op) for call in tape.calls] == ["aten.cos.default"]


def test_lists_of_tensors_and_special_numbers():
    def step(x, y):
        left, right = torch.cat([x, y]).split([1, 3])
        masked = right.masked_fill(right > 1, float("-inf"))
        index = torch.tensor([0, 2])
        return [left, masked, right[None, index], torch.nan_to_num(masked, neginf=-1e30)]

    given = torch.arange(2.0), torch.arange(2.0) + 1
    replay = compile_tape(record(step, given)[1])
    for found, expected in zip(replay(*given), step(*given), strict=True):
        assert torch.equal(found, expected)


def running(taped, times, given):
    return [[value.clone() for value in taped(given(index))] for index in range(times)]


def test_a_taped_step_is_run_recorded_checked_and_replayed():
    count = torch.zeros(())
    plain = []

    def step(x, count):
        plain.append(1)
        count.add_(1)
        return [x * count]

    taped = Taped(step, [count], wanted=True)
    given = torch.arange(3.0)
    for index in range(1, 7):
        assert taped.replaying is (index > 3)
        assert torch.equal(taped([given, count])[0], given * index)
        assert count == index
    assert len(plain) == 3
    assert taped.reason == ""


def test_a_step_that_cannot_be_recorded_runs_plainly_and_writes_once():
    count = torch.zeros(())

    def step(x, count):
        count.add_(1)
        return [x * float(x.sum())]

    taped = Taped(step, [count], wanted=True)
    for index in range(1, 6):
        assert taped([torch.full((2,), float(index)), count])[0].tolist() == [2 * index**2] * 2
        assert count == index
    assert "depends on values" in taped.reason


def test_a_step_whose_replay_differs_is_not_trusted():
    numbers = iter(range(10))
    taped = Taped(lambda x: [x + next(numbers)], [], wanted=True)  # a counter in Python
    for index in range(5):
        assert taped([torch.zeros(1)])[0].item() == index
    assert "same bits" in taped.reason


def test_nan_is_no_difference():
    taped = Taped(lambda x: [x / 0], [], wanted=True)
    for _ in range(4):
        taped([torch.zeros(2)])
    assert taped.replaying


def test_what_is_not_wanted_is_not_recorded():
    taped = Taped(lambda x: [x + 1], [], wanted=False)
    for _ in range(5):
        taped([torch.zeros(2)])
    assert not taped.replaying
    assert "too few" in taped.reason


def test_errors_of_a_step_are_its_own_and_recording_is_tried_again():
    def step(x, y):
        return [F.binary_cross_entropy(x, y)]

    taped = Taped(step, [], wanted=True)
    good, bad, target = torch.full((2,), 0.5), torch.full((2,), 2.0), torch.zeros(2)
    taped([good, target])
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        taped([bad, target])
    for _ in range(3):
        taped([good, target])
    assert taped.replaying
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        taped([bad, target])


def test_one_tensor_as_two_inputs_is_refused():
    one = torch.ones(2)
    with pytest.raises(TapeError, match="two inputs are one tensor"):
        record(lambda x, y: [x + y], [one, one])


def test_another_form_takes_the_replays_place():
    heard = []

    def compiled(tape, replay, inputs):
        assert isinstance(tape, Tape)
        heard.append(replay(*inputs)[0].item())
        return lambda *values: [torch.tensor(42.0)]

    count = torch.zeros(())
    taped = Taped(lambda x, c: [x + c.add_(1)], [count], wanted=True, compiled=compiled)
    found = [taped([torch.zeros(()), count])[0].item() for _ in range(5)]
    assert found == [1, 2, 3, 42, 42]
    assert heard == [3]
