"""Bodies as tapes: undone when recorded, and when a replay raises before it wrote what lasts."""

import pytest
import torch

from cgo.private import many_tensors
from cgo.runtime import bodies
from cgo.runtime.bodies import (
    Undone,
    divided,
    in_place,
    one_by_one,
    record_body,
    with_views_made,
)
from cgo.runtime.tape import Tape, TapeError, _source, record


def lines(tape):
    """A tape's calls, as TorchScript's source."""
    text = _source(tape, list(tape.constants)).splitlines()
    return [line.strip() for line in text[1:]]


def tape_of(body):
    return record(lambda: body(), [])[1]


def test_a_body_is_undone_and_replayed_into_the_same_tensors():
    memory = torch.zeros(4)
    views = memory[:2], memory[1:]

    def body():
        views[0].add_(1)
        views[1].mul_(2).add_(1)
        return [memory * 10]

    results, replay = record_body(body)
    assert memory.tolist() == [0, 0, 0, 0]
    replay()
    assert memory.tolist() == [1, 3, 1, 1]
    assert results[0].tolist() == [10, 30, 10, 10]


def test_views_of_what_stays_where_it_is_are_made_once():
    weight, x, total = torch.randn(3, 2), torch.randn(2), torch.zeros(3)

    def body():
        turned = weight.t().t()
        total.view(3).add_(turned @ x)
        return [total.unsqueeze(0).expand(2, 3) + 1]

    tape = with_views_made(tape_of(body))
    assert lines(tape) == [
        "v3 = torch.ops.aten.mv(c0, c2)",
        "_0 = torch.ops.aten.add_(c1, v3)",
        "v6 = torch.ops.aten.add(v5, 1)",
        "return [v6]",
    ]


def test_views_of_what_a_step_computes_are_made_at_every_step():
    x = torch.randn(3, 2)
    tape = with_views_made(tape_of(lambda: [(x * 2).t() + 1]))
    assert [line.partition("ops.aten.")[2] for line in lines(tape)[:-1]] == [
        "mul(c0, 2)", "t(v0)", "add(v1, 1)",
    ]  # fmt: skip


def test_calls_over_lists_are_a_call_for_each_tensor():
    def fresh():
        return [torch.ones(2), torch.ones(3)], [torch.full((2,), 3.0), torch.full((3,), 4.0)]

    given, more = fresh()

    def body():
        many_tensors.mul_(given, more)
        many_tensors.add_(given, more)
        many_tensors.addcmul_(given, more, more)
        many_tensors.copy_(more, given)
        return [given[0] + more[0].sum()]

    names = [str(call.op) for call in one_by_one(tape_of(body)).calls]
    assert names == [
        *["aten.mul_.Tensor"] * 2, *["aten.add_.Tensor"] * 2, *["aten.addcmul_.default"] * 2,
        *["aten.copy_.default"] * 2, "aten.sum.default", "aten.add.Tensor",
    ]  # fmt: skip
    given, more = fresh()
    results, replay = record_body(body)
    replay()
    assert given[0].tolist() == more[0].tolist() == [15, 15]
    assert given[1].tolist() == more[1].tolist() == [24, 24, 24]
    assert results[0].tolist() == [45, 45]


def test_bodies_with_calls_over_lists_need_no_python(monkeypatch):
    """TorchScript leaves out what writes a list that nobody reads again."""
    monkeypatch.setattr(bodies, "fastest", bodies.fastest)
    seen = []
    monkeypatch.setattr("cgo.runtime.taped.interpreted", seen.append)
    memory = [torch.ones(2), torch.ones(3)]
    _, replay = record_body(lambda: many_tensors.mul_(memory, memory) or [memory[0] * 1])
    replay()
    assert not seen


class Looking:
    """A body that counts, looks rows up, and writes what it found."""

    def __init__(self):
        self.table, self.index = torch.arange(6.0).reshape(3, 2), torch.tensor([1, 2])
        self.count, self.memory = torch.zeros(1), torch.zeros(2, 2)

    def __call__(self):
        self.count.add_(1)
        self.memory.copy_(torch.embedding(self.table, self.index))
        return []

    def state(self):
        return [self.count.tolist(), self.memory.tolist()]


def test_a_replay_that_raises_leaves_nothing_behind():
    looking = Looking()
    _, replay = record_body(looking, [looking.count])
    looking.index[0] = 7
    before = looking.state()
    with pytest.raises(Undone, match="index out of range"):
        replay()
    assert looking.state() == before
    looking.index[0] = 0
    replay()
    assert looking.state() == [[1], [[0, 1], [4, 5]]]


def test_what_was_written_and_is_not_put_back_is_no_undone_replay():
    looking = Looking()
    _, replay = record_body(looking)  # the count is written first
    looking.index[0] = 7
    with pytest.raises(RuntimeError, match="index out of range"):
        replay()
    assert looking.count.tolist() == [1]


def test_a_tape_ends_its_first_part_where_it_writes_what_lasts():
    looking = Looking()
    tape = tape_of(lambda: [*looking(), looking.count + 0])
    first, last = divided(tape, {value for value in tape.constants if value.name == "c0"})
    assert [str(call.op) for call in first.calls] == ["aten.add_.Tensor", "aten.embedding.default"]
    assert [str(call.op) for call in last.calls] == ["aten.copy_.default", "aten.add.Tensor"]
    assert first.results == last.inputs
    everything, nothing = divided(Tape((), {}, (), (), {}), ())
    assert everything.calls == nothing.calls == ()


def names(tape):
    return [str(call.op).removeprefix("aten.") for call in tape.calls]


def test_activations_are_written_over_what_nobody_reads_again():
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)

    def body():
        weight.grad = None
        ((x @ weight).relu() @ weight).relu().square().sum().backward()
        return [weight.grad]

    tape = tape_of(body)
    assert names(tape).count("relu.default") == 2
    over = in_place(tape)
    assert names(over).count("relu_.default") == 2
    assert names(over).count("threshold_backward.grad_input") == 2
    expected = body()[0].clone()
    results, replay = record_body(body)
    replay()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: [x.relu() + 1],  # it is handed over
        lambda x: [(y := x + 1).relu() + y],  # it is read again
        lambda x: [(y := x + 1).relu() + 1, y],  # it is a result
        lambda x: [(y := x + 1).t().relu().t() * y.sum()],  # views lie in it
        lambda x: [(x + 1)[:2].relu() + 1],
        lambda x: [torch.relu((x[:1] + 1).expand(3, 2))],
    ],
)
def test_what_is_read_again_is_not_written_over(step):
    x = torch.randn(3, 2)
    assert "relu_.default" not in names(in_place(tape_of(lambda: step(x))))
    results, replay = record_body(lambda: step(x))
    x.copy_(torch.randn(3, 2))
    replay()
    for found, expected in zip(results, step(x), strict=True):
        assert torch.equal(found, expected)


def test_gradients_in_another_format_are_not_written_over():
    """The result would lie otherwise than what was recorded."""
    x, gradient = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    last = gradient.to(memory_format=torch.channels_last)

    def step():
        return [torch.ops.aten.threshold_backward(last * 2, x, 0) + 1]

    assert "threshold_backward.grad_input" not in names(in_place(tape_of(step)))


def test_a_replay_that_gives_other_bits_is_refused(monkeypatch):
    memory = torch.ones(3)
    monkeypatch.setitem(
        bodies._OVER, torch.ops.aten.relu.default, (torch.ops.aten.neg_.default, None)
    )
    with pytest.raises(TapeError, match="same bits"):
        record_body(lambda: [memory.add_((memory + 1).relu())])
    assert memory.tolist() == [1, 1, 1]


def test_generators_are_put_back_with_what_was_written():
    looking, generator = Looking(), torch.Generator().manual_seed(3)

    def body():
        looking.count.add_(torch.empty(1).normal_(generator=generator))
        return looking()

    state = generator.get_state()
    _, replay = record_body(body, [looking.count], [generator])
    assert torch.equal(generator.get_state(), state)
    looking.index[0] = 7
    with pytest.raises(Undone):
        replay()
    assert torch.equal(generator.get_state(), state)
    looking.index[0] = 0
    replay()
    assert not torch.equal(generator.get_state(), state)


def test_running_statistics_that_no_schema_speaks_of_are_undone():
    x, mean, var = torch.randn(8, 3), torch.zeros(3), torch.ones(3)
    weight, bias = torch.ones(3), torch.zeros(3)

    def body():
        norm = torch.ops.aten.native_batch_norm
        return [norm(x, weight, bias, mean.view(3), var, True, 0.1, 1e-5)[0]]

    _, replay = record_body(body, [mean, var])
    assert mean.tolist() == [0, 0, 0]
    replay()
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


def test_only_what_is_written_is_copied(monkeypatch):
    table, memory = torch.randn(1000, 8), torch.zeros(8)
    recorder = bodies._Undoing()
    with recorder:
        memory.view(2, 4).add_(table.sum(0).view(2, 4))
        table.t().sum()
    assert [before.shape for _, before in recorder._before.values()] == [(2, 4)]
    recorder.undo()
    assert memory.tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_large_tensors_are_compared_by_their_words(dtype, monkeypatch):
    monkeypatch.setattr(bodies, "_COPIED_BYTES", 4)
    one, other = torch.zeros(6, 2, dtype=dtype), torch.zeros(6, 2, dtype=dtype)
    assert torch.equal(bodies._seen(one), bodies._seen(other))
    other[3, 1] = 1
    assert not torch.equal(bodies._seen(one), bodies._seen(other))
    assert bodies._seen(one.t()).ndim == 0
