"""Data sources that return what a data source must not."""

import torch
from torch.utils.data import TensorDataset


def one():
    return TensorDataset(torch.zeros(4, 2))


def iterable():
    return (x for x in ()), TensorDataset(torch.zeros(4, 2))


def empty():
    return TensorDataset(torch.zeros(4, 2)), TensorDataset(torch.zeros(0, 2))
