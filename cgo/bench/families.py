"""The models that `cgo bench` trains; each has its own learning rate and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cgo.model import DataSpec, Model, TrainingSpec
from cgo.zoo import random_cells

#: Batches in memory; methods go round over them.
BATCHES = 4


def random_data(
    shape: list[int], batch_size: int, batches: int = BATCHES
) -> tuple[TensorDataset, TensorDataset]:
    """Random inputs of a shape and random classes of ten: float32 and int64.

    Args:
        shape: Of one sample.
        batch_size: Samples a batch.
        batches: Of training; validation is one.
    """
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> TensorDataset:
        x = torch.randn(samples, *shape, generator=generator)
        return TensorDataset(x, torch.randint(0, 10, (samples,), generator=generator))

    return split(batches * batch_size), split(batch_size)


def mlp() -> nn.Module:
    """64-128-128-10."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn(inputs: int, size: int) -> nn.Module:
    """Two convolutions of 16 and 32 channels with pooling, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 10),
    )


class Encoder(nn.Module):
    """Transformer encoder over (N, 32, 64): two layers of d=64 with four heads; mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (N, 10)."""
        out: Tensor = self.head(self.body(x).mean(1))
        return out


def _models(
    count: int, factory: str, kwargs: Callable[[int], dict[str, Any]], shape: list[int], batch: int
) -> list[Model]:
    data = DataSpec(
        "cgo.bench.families:random_data", {"shape": shape, "batch_size": batch}, batch_size=batch
    )
    return [
        Model(
            factory,
            kwargs(index),
            data=data,
            training=TrainingSpec(
                optimizer_kwargs={"lr": 0.01 * (1 + index / count), "momentum": 0.9}, epochs=10**9
            ),
            seed=index,
            model_id=f"{factory.partition(':')[2]}-{index:03}",
        )
        for index in range(count)
    ]


def _cells(count: int, width: int, size: int, inputs: int, *, alike: bool) -> list[Model]:
    edges = ["conv3 skip conv1 pool conv3 conv1"] * count if alike else random_cells(count)

    def kwargs(index: int) -> dict[str, Any]:
        return {"edges": edges[index], "width": width, "inputs": inputs}

    return _models(count, "cgo.zoo:nas_bench_201", kwargs, [inputs, size, size], 32)


def _plain(name: str, kwargs: dict[str, Any], shape: list[int], batch: int) -> _Family:
    def build(count: int) -> list[Model]:
        return _models(count, f"cgo.bench.families:{name}", lambda index: kwargs, shape, batch)

    return build


def _mixed(count: int) -> list[Model]:
    """A quarter of each of four families."""
    names = ("mlp", "cnn8", "cells-different-8", "encoders")
    parts = [count // 4 + (index < count % 4) for index in range(4)]
    return [model for name, part in zip(names, parts) if part for model in FAMILIES[name](part)]


_Family = Callable[[int], list[Model]]

#: Families by name; each makes a number of models.
FAMILIES: dict[str, _Family] = {
    "mlp": _plain("mlp", {}, [64], 32),
    "cnn8": _plain("cnn", {"inputs": 1, "size": 8}, [1, 8, 8], 32),
    "cnn32": _plain("cnn", {"inputs": 3, "size": 32}, [3, 32, 32], 64),
    "cells": lambda count: _cells(count, 8, 32, 3, alike=True),
    "cells-different-8": lambda count: _cells(count, 8, 8, 3, alike=False),
    "cells-different-16": lambda count: _cells(count, 16, 16, 3, alike=False),
    "cells-different-32": lambda count: _cells(count, 8, 32, 3, alike=False),
    "encoders": _plain("Encoder", {}, [32, 64], 32),
    "mixed": _mixed,
}
