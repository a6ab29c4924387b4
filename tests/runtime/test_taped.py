"""Steps that are recorded, checked and replayed."""

import pytest
import torch
from torch.nn import functional as F

from cgo.runtime.tape import Tape
from cgo.runtime.taped import Taped


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
