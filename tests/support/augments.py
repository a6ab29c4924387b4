"""Augmentations for the tests, good and bad."""

import random

import numpy as np
import torch
from torch import nn


class Jitter(nn.Module):
    """Noise that torch, numpy and random draw, around a shift that is drawn when it is built."""

    def __init__(self, scale=0.1):
        super().__init__()
        self.scale = scale
        self.register_buffer("shift", torch.randn(()))

    def forward(self, x):
        noise = torch.randn_like(x) + float(np.random.rand()) + random.random()
        return x + self.scale * (noise + self.shift)


class Widen(nn.Module):
    """Changes the shape, and writes into what it is given."""

    def forward(self, x):
        return torch.cat([x.mul_(2), torch.rand(len(x), 1, device=x.device)], 1)


class Flip(nn.Module):
    """Images, each mirrored or not."""

    def forward(self, x):
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(-1), x)


class Named(nn.Module):
    """Takes and returns a dict; `returned` names what it returns."""

    def __init__(self, returned=("x", "scale")):
        super().__init__()
        self.returned = returned

    def forward(self, *, x, scale):
        doubled = {"x": x * 2, "scale": scale}
        return {name: doubled.get(name, x) for name in self.returned}


class Bad(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "raises":
            raise ValueError("no such colour")
        return {"pair": (x, x), "fewer": x[1:], "list": x.tolist(), "number": 3}[self.kind]


def no_module():
    return lambda x: x


def unbuildable(size):
    raise OSError(f"no table of size {size}")
