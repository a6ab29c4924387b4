"""Batches as named tensors."""

import pytest
import torch

from cgo.errors import DataError
from cgo.runtime.leaves import call_arguments, flatten, moved, named_leaves, target_of


def test_dicts_become_keyword_arguments():
    leaves = flatten(({"x": torch.ones(2), "scale": torch.ones(2)}, torch.zeros(2)))
    assert set(leaves) == {"input.x", "input.scale", "target"}
    positional, named = call_arguments(leaves)
    assert positional == ()
    assert set(named) == {"x", "scale"}


def test_tuples_become_positional_arguments_in_order():
    inputs = tuple(torch.full((2,), float(n)) for n in range(11))
    leaves = flatten((inputs, (torch.zeros(2), torch.ones(2))))
    assert [float(leaf[0]) for leaf in call_arguments(leaves)[0]] == list(range(11))
    assert len(target_of(leaves)) == 2


def test_samples_that_are_no_pairs_are_refused():
    with pytest.raises(DataError, match=r"must be an \(input, target\) pair"):
        flatten(torch.ones(3))
    with pytest.raises(DataError, match=r"target\.0 is a list"):
        flatten((torch.ones(2), ([1, 2],)))


def test_a_single_value_is_a_leaf_of_its_own():
    assert list(named_leaves("input", torch.ones(2))) == ["input"]
    with pytest.raises(DataError, match="input is a float, not a tensor"):
        named_leaves("input", 2.0)


def test_moving_to_where_a_tensor_is_copies_nothing():
    leaf = torch.ones(2)
    assert moved(leaf, torch.device("cpu")) is leaf
