"""Data and networks that come along."""

import torch
from sklearn.datasets import load_digits

from cgo import zoo


def test_the_digits_are_those_of_scikit_learn():
    train, validation = zoo.digits(360)
    inputs, targets = (
        torch.cat([a, b]) for a, b in zip(validation.tensors, train.tensors, strict=True)
    )
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    found = load_digits()
    assert torch.equal(inputs, torch.tensor(found.images / 16.0).float().unsqueeze(1)[order])
    assert torch.equal(targets, torch.tensor(found.target)[order])
    assert (len(train), len(validation)) == (1437, 360)
