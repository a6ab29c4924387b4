"""Whether compiling repays what it takes."""

import torch
from torch.nn import functional as F

from cgo.runtime.repaying import Expected, convolves, may_repay, repaying, saving, share_of_training
from cgo.runtime.tape import record


def test_parts_repay_in_the_steps_that_are_left_once_they_are_there():
    one = {"a": Expected(1e-3, 20.0)}
    assert repaying(one, 2e-3, 10**6, 0.2) == ["a"]
    assert repaying(one, 2e-3, 9_000, 0.2) == []  # trained before it is compiled
    assert repaying(one, 2e-3, 12_000, 0.2) == []  # gains less than it takes
    both = one | {"b": Expected(1e-9, 20.0)}
    assert repaying(both, 2e-3, 10**6, 0.2) == ["a"]
    assert repaying({}, 2e-3, 10**6, 0.2) == []


def test_a_chain_saves_what_it_does_not_move():
    large = 2**28
    assert 0.4 < saving(6 * large, 2 * large, 3) < 0.5
    assert saving(0, 0, 10) > 0.5  # launches alone
    assert saving(large, large, 1) == 0.0


def test_a_cpu_gains_nothing_where_it_convolves():
    given = [torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)]
    images = record(lambda x, w: [F.conv2d(x, w)], given)[1]
    rows = record(lambda x: [x.exp() + 1], [torch.ones(2)])[1]
    assert convolves(images)
    assert not may_repay(images, 10**9, "cpu")
    assert may_repay(images, 10**9, "cuda")
    assert may_repay(rows, 10**9, "cpu")
    assert not may_repay(rows, 0, "cuda")


def test_beside_training_on_all_cores_compiling_takes_its_time():
    assert 0 < share_of_training("cpu") <= 1
    assert share_of_training("cuda") < 1
