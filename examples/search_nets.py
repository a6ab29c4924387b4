"""A network of the user's own, named by `search.yaml`."""

from torch import nn


def wide(width: int = 32) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))
