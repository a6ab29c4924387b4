"""Steps as tapes: what is recorded, what is refused, and that a replay gives the same bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cgo.runtime.forms.embedding import look_up
from cgo.runtime.tape import (
    TapeError,
    _refuse,
    _source,
    compile_tape,
    interpreted,
    record,
)
from cgo.runtime.taped import fastest


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
        "  return [v4, v10]\n"  # turned twice
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


def test_a_view_that_lies_where_another_does_is_the_same():
    def step(x):
        once = (x + 1).view(2, 3)
        again = once.view(-1).view(2, 3)
        return [again.t().t() * once.unsqueeze(0).squeeze(0)]

    text = source(step, torch.randn(6))
    assert text.splitlines()[1:] == [
        "  v0 = torch.ops.aten.add(i0, 1)",
        "  v1 = torch.ops.aten.view(v0, torch.jit.annotate(List[int], [2, 3]))",
        "  v8 = torch.ops.aten.mul(v1, v1)",
        "  return [v8]",
    ]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.view(3, 2) + x.view(2, 3).t(),  # of one shape, by other strides
        lambda x: x[:3] + x[3:],
        lambda x: x.view(torch.int32) + x.view(torch.int32).view(6),
        lambda x: x.view(2, 3).unsqueeze_(0).squeeze(0) + x.view(2, 3),
        lambda x: x.clone().view(2, 3) + x.view(2, 3),
    ],
)
def test_views_that_lie_elsewhere_are_others(other):
    def step(x):
        return [other(x), other(x + 1)]

    given = torch.randn(6)
    tape = record(step, [given])[1]
    x = torch.randn(6)
    for replay in (fastest(tape), interpreted(tape)):
        for found, expected in zip(replay(x), step(x), strict=True):
            assert torch.equal(found, expected)


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


def test_one_tensor_as_two_inputs_is_refused():
    one = torch.ones(2)
    with pytest.raises(TapeError, match="two inputs are one tensor"):
        record(lambda x, y: [x + y], [one, one])


def test_python_replays_a_tape_as_the_interpreter_does():
    step = step_of(layer)
    given = [learning(4, 8), learning(3, 8), learning(3), torch.tensor([0, 1, 2, 0])]
    _, tape = record(step, given)
    for left, right in zip(interpreted(tape)(*given), compile_tape(tape)(*given), strict=True):
        assert torch.equal(left, right)


def test_a_tape_knows_the_bytes_of_its_values():
    _, tape = record(lambda x: [x.float() + 1], [torch.zeros(3, dtype=torch.float64)])
    assert sorted(tape.sizes.values()) == [12, 12, 24]


def test_an_operator_that_may_drop_out_is_recorded_where_it_is_told_not_to():
    """Attention's kernels on a GPU are marked as random, whatever their dropout."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    query = torch.randn(1, 2, 4, 8)
    assert torch.Tag.nondeterministic_seeded in attend.tags
    _refuse(attend, (query, query, query), {})
    _refuse(attend, (query, query, query, 0.0), {})
    with pytest.raises(TapeError, match="process's random stream"):
        _refuse(attend, (query, query, query, 0.5), {})
    with pytest.raises(TapeError, match="process's random stream"):
        _refuse(torch.ops.aten.rand_like.default, (query,), {})


def test_a_check_of_values_is_not_left_out_though_it_gives_nothing():
    def step(index, table):
        torch._assert_async((index < 4).all(), "beyond")
        return [table[index]]

    table = torch.randn(4, 2)
    tape = record(step, (torch.tensor([1, 2]), table))[1]
    replay = interpreted(tape)
    assert torch.equal(replay(torch.tensor([3, 0]), table)[0], table[[3, 0]])
    with pytest.raises(RuntimeError, match="beyond"):
        replay(torch.tensor([1, 9]), table)
    with pytest.raises(TapeError, match="TorchScript makes 1 calls of 4"):  # it would leave it out
        compile_tape(tape)


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_replayed_look_up_refuses_rows_of_a_neighbour(bad):
    tables = torch.randn(3, 4, 2)
    tape = record(lambda x: [look_up(tables, x, -1)], (torch.tensor([[0, 3]]),))[1]
    replay = compile_tape(tape)
    assert torch.equal(replay(torch.tensor([[1, 2]]))[0], tables[:, [1, 2]])
    with pytest.raises(RuntimeError, match="index out of range"):
        replay(torch.tensor([[1, bad]]))


def test_a_number_of_calls_that_differs_makes_no_tape():
    copies = [torch.zeros(2)]

    def step(x):
        torch._foreach_copy_(copies, [x])
        return [x + 1]

    tape = record(step, (torch.ones(2),))[1]
    with pytest.raises(TapeError):
        compile_tape(tape)


NESTED = torch.library.Library("cgo_test_tape", "DEF")
NESTED.define("nested(Tensor x) -> (Tensor, Tensor[])")
NESTED.impl("nested", lambda x: (x + 1, [x + 2, x + 3]), "CPU")


def test_lists_of_tensors_among_results_are_refused():
    """As cuDNN's backward of recurrences gives them: unnamed, they would become constants."""

    def step(x):
        first, (second, third) = torch.ops.cgo_test_tape.nested(x)
        return [first * second * third]

    with pytest.raises(TapeError, match="lists of tensors"):
        record(step, [torch.ones(2)])
