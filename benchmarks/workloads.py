"""Networks and data sets of the benchmarks; named by import path."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def images(samples: int, validation: int, channels: int = 1, size: int = 8) -> Any:
    """Random images of ten classes, in memory."""
    generator = torch.Generator().manual_seed(0)
    total = samples + validation
    x = torch.randn(total, channels, size, size, generator=generator)
    y = torch.randint(0, 10, (total,), generator=generator)
    return TensorDataset(x[:samples], y[:samples]), TensorDataset(x[samples:], y[samples:])


class Slow(Dataset[Any]):
    """Each sample costs a fixed CPU time, as decoding and augmenting do."""

    def __init__(self, data: TensorDataset, cost_s: float) -> None:
        self.data, self.cost_s = data, cost_s

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        end = time.process_time() + self.cost_s
        while time.process_time() < end:
            pass
        return self.data[index]


def slow_images(cost_s: float = 0.002, **kwargs: Any) -> Any:
    """The same images behind a costly `__getitem__`, about 2 ms of CPU a sample."""
    train, validation = images(**kwargs)
    return Slow(train, cost_s), Slow(validation, cost_s)


def mlp(width: int = 128, features: int = 64) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def cnn() -> nn.Module:
    """Two convolutions with batch norm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Headed(nn.Module):
    """A trainable head over a frozen trunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the same trunk in every model
            self.trunk = trunk()
        self.trunk.requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def trunk(width: int = 32) -> nn.Module:
    """A convolutional feature extractor, (N, 3, 32, 32) to (N, 64)."""

    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *layer(3, width, 1),
        *layer(width, width, 2),
        *layer(width, 2 * width, 2),
        *layer(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def headed(width: int = 32) -> nn.Module:
    """A head of its own over the trunk that all share."""
    return Headed(width)


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class ResidualHeaded(Headed):
    """A trainable head over a frozen residual trunk, (N, 3, H, W) to (N, 64)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.trunk = nn.Sequential(
                nn.Conv2d(3, 16, 3, 1, 1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                Block(16, 16, 1),
                Block(16, 32, 2),
                Block(32, 64, 2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
        self.trunk.requires_grad_(False).eval()


def residual_headed(width: int = 32) -> nn.Module:
    """A head of its own over the residual trunk that all share."""
    return ResidualHeaded(width)
