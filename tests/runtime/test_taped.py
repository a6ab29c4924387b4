"""Steps that are recorded, checked and replayed."""

import pytest
import torch
from torch.nn import functional as F

from cgo.runtime.regions import cut
from cgo.runtime.structure import Part
from cgo.runtime.tape import Tape, TapeError, compile_tape, record
from cgo.runtime.taped import Later, Taped


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


class Swapped(Later):
    """Another form that is ready after a run, and gives ten times as much."""

    def __init__(self, ready, kept=False):
        self.ready, self.kept, self.asked = ready, kept, []

    def due(self, run):
        return run >= self.ready

    def finish(self, run, inputs, current):
        self.asked.append(run)
        for _ in range(3):
            current(*inputs)  # writes, as forms that are timed do
        return None if self.kept else lambda x, c: [(x + c.add_(1)) * 10]


def counted(later):
    count = torch.zeros(())
    step = lambda x, c: [x + c.add_(1)]  # noqa: E731
    return Taped(step, [count], wanted=True, compiled=lambda *given: later), count


def test_a_form_that_comes_later_is_taken_after_its_run():
    later = Swapped(5)
    taped, count = counted(later)
    found = []
    for run in range(1, 9):
        found.append(taped([torch.zeros(()), count])[0].item())
        assert count == run
        assert taped.waiting is (run in (3, 4))
    assert found == [1, 2, 3, 4, 5, 60, 70, 80]
    assert later.asked == [5]


def test_a_form_that_is_there_at_once_is_taken_with_the_replay():
    taped, count = counted(Swapped(0))
    found = [taped([torch.zeros(()), count])[0].item() for _ in range(5)]
    assert found == [1, 2, 3, 40, 50]
    assert not taped.waiting


def test_a_later_form_that_loses_leaves_the_replay():
    later = Swapped(4, kept=True)
    taped, count = counted(later)
    assert [taped([torch.zeros(()), count])[0].item() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert later.asked == [4]


def test_until_then_another_form_is_run():
    later = Swapped(6)
    later.meanwhile = lambda x, c: [(x + c.add_(1)) * 2]
    taped, count = counted(later)
    found = [taped([torch.zeros(()), count])[0].item() for _ in range(8)]
    assert found == [1, 2, 3, 8, 10, 12, 70, 80]


def test_a_captured_step_keeps_its_form_and_counts_the_runs_elsewhere():
    later = Swapped(6)
    taped, count = counted(later)
    for _ in range(3):
        taped([torch.zeros(()), count])
    for _ in range(9):
        taped([torch.zeros(()), count], keeps=True)
    assert later.asked == []
    assert [taped.passed(), taped.passed()] == [False, True]  # runs 4 and 5
    taped([torch.zeros(()), count])
    assert later.asked == [6]
    assert not taped.passed()


TENSOR_OR_NONE = torch.library.Library("cgo_test_taped", "DEF")
TENSOR_OR_NONE.define("scaled(Tensor x, Tensor bias) -> Tensor")
TENSOR_OR_NONE.impl("scaled", lambda x, bias: x * 2, "CPU")


def test_a_call_that_torchscript_refuses_is_replayed_from_python():
    """As the backward of efficient attention, which gets no bias where it wants a tensor."""
    scaled = torch.ops.cgo_test_taped.scaled
    with pytest.raises(TapeError, match="TorchScript"):
        compile_tape(record(lambda x: [scaled(x, None)], [torch.ones(2)])[1])
    heard = []

    def compiled(tape, replay, inputs):
        heard.append(len(cut(tape, inputs)))

    taped = Taped(lambda x: [scaled(x, None).exp() + 1], [], wanted=True, compiled=compiled)
    for number in range(5):
        x = torch.full((2,), float(number))
        assert torch.equal(taped([x])[0], (x * 2).exp() + 1)
    assert taped.replaying
    assert heard == [2]  # the operator, and a part


def test_attention_has_a_tape_that_is_cut_and_divided():
    from cgo.runtime.streams import divide, forked_calls

    def step(x, y):
        found = []
        for value in (x, y):
            query = value.detach().requires_grad_()
            with torch.enable_grad():
                out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
                (gradient,) = torch.autograd.grad(out.tanh().sum(), [query])
            found += [out.detach(), gradient]
        return found

    given = [torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)]
    tapes = []
    taped = Taped(step, [], wanted=True, compiled=lambda tape, *rest: tapes.append(tape))
    for _ in range(4):
        for a, b in zip(taped(given), step(*given), strict=True):
            assert torch.equal(a, b)
    assert taped.replaying
    names = [call.op._schema.name for call in tapes[0].calls]
    assert sum("flash_attention" in name for name in names) == 4
    assert forked_calls(divide(tapes[0], given)) > 0
    assert any(isinstance(piece, Part) for piece in cut(tapes[0], given))
