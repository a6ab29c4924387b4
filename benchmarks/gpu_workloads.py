"""The workloads of `gpu_suite.py`: which models, how many, and what is to be reached.

Each is made at three sizes: "full" is what targets are for, "reduced" shows on a CPU that the suite
runs, "small" is what equivalence is checked on, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cgo.model import DataSpec, Model, TrainingSpec
from cgo.zoo import random_cells

SIZES = ("full", "reduced", "small")

#: Steps of the equivalence checks: epochs of four batches.
SMALL_EPOCHS = 25


@dataclass(frozen=True)
class Workload:
    """Models that are trained together, and the ratios that merging them is to reach."""

    name: str
    title: str
    build: Callable[[str], list[Model]]  # called with a size
    eager: float  # the plain serial loop's time over the merged time, at least
    solo: float  # likewise of the best solo baseline's
    sampled: int  # models that the serial loop is measured on; the rest is scaled
    images: bool = True  # convolutions do most of the work
    trunk: str | None = None  # a part that all models share, counted once

    def __post_init__(self) -> None:
        assert self.sampled >= 1


def _models(
    workload: str,
    factories: list[tuple[str, dict[str, Any]]],
    shape: list[int],
    batch: int,
    size: str,
    batches: int = 4,
) -> list[Model]:
    """A model for each factory, each with a learning rate and a seed of its own."""
    source = {"shape": shape, "batch_size": batch, "batches": batches}
    data = DataSpec("cgo.bench.families:random_data", source, batch_size=batch)
    small = {"epochs": SMALL_EPOCHS, "precision": "float64"}
    count = len(factories)
    return [
        Model(
            factory,
            kwargs,
            data=data,
            training=TrainingSpec(
                optimizer_kwargs={"lr": 0.01 * (1 + number / count), "momentum": 0.9},
                **(small if size == "small" else {"epochs": 10**6}),
            ),
            seed=number,
            model_id=f"{workload}-{number:03}",
        )
        for number, (factory, kwargs) in enumerate(factories)
    ]


def _cells(size: str) -> list[Model]:
    count, cells, width, image, batch = {
        "full": (32, 5, 16, 32, 64), "reduced": (3, 1, 4, 16, 16), "small": (2, 1, 4, 8, 8),
    }[size]  # fmt: skip
    factories = [
        (
            "cgo.zoo:nas_bench_201",
            {"edges": edges, "cells": cells, "width": width, "inputs": 3},
        )
        for edges in random_cells(count)
    ]
    return _models("cells", factories, [3, image, image], batch, size)


def _cnns(size: str) -> list[Model]:
    count, image, batch = {"full": (32, 32, 64), "reduced": (8, 16, 16), "small": (3, 8, 8)}[size]
    factories = [("cgo.bench.families:cnn", {"inputs": 3, "size": image})] * count
    return _models("cnn", factories, [3, image, image], batch, size)


def _narrow_resnets(size: str) -> list[Model]:
    return _resnets("narrow", size, {
        "full": (256, 8, 2, 32, 256), "reduced": (8, 4, 1, 16, 16), "small": (3, 2, 1, 8, 8),
    })  # fmt: skip


def _resnets(name: str, size: str, sizes: Mapping[str, tuple[int, ...]]) -> list[Model]:
    """Equal ResNets; `sizes` are number, width, blocks, image and batch."""
    count, width, blocks, image, batch = sizes[size]
    factories = [("cgo.bench.networks:resnet18", {"width": width, "blocks": blocks})] * count
    return _models(name, factories, [3, image, image], batch, size)


def _encoders(size: str) -> list[Model]:
    count, widths, depths, tokens, batch = {
        "full": (16, (64, 96, 128), (2, 3, 4), 64, 64),
        "reduced": (4, (16, 24), (1,), 16, 16),
        "small": (2, (8, 12), (1,), 8, 8),
    }[size]
    factories = [
        (
            "cgo.bench.networks:Encoder",
            {
                "d": widths[number % len(widths)],
                "layers": depths[number // len(widths) % len(depths)],
            },
        )
        for number in range(count)
    ]
    return _models("encoder", factories, [tokens, 32], batch, size)


def _wide_resnets(size: str) -> list[Model]:
    return _resnets("wide", size, {
        "full": (4, 64, 2, 32, 64), "reduced": (2, 16, 1, 16, 16), "small": (2, 4, 1, 8, 8),
    })  # fmt: skip


def _mixed(size: str) -> list[Model]:
    """The wide ResNets, and small networks beside them: half CNNs, half cell networks."""
    wide = _wide_resnets(size)
    small = {"full": 8, "reduced": 2, "small": 2}[size]
    shape = wide[0].data.kwargs["shape"]
    width = 8 if size == "full" else 4
    factories = [(str(model.module), dict(model.kwargs)) for model in wide]
    cnn = ("cgo.bench.families:cnn", {"inputs": 3, "size": shape[-1]})
    factories += [cnn] * (small // 2)
    factories += [
        ("cgo.zoo:nas_bench_201", {"edges": edges, "width": width, "inputs": 3})
        for edges in random_cells(small // 2)
    ]
    return _models("mix", factories, shape, wide[0].data.batch_size, size)


def _heads(size: str, batches: int = 4) -> list[Model]:
    count, kinds, width, blocks, image, batch = {
        "full": (32, 4, 64, 2, 32, 64),
        "reduced": (4, 2, 8, 1, 16, 16),
        "small": (3, 2, 2, 1, 8, 8),
    }[size]  # fmt: skip
    factories = [
        (
            "cgo.bench.networks:Headed",
            {"hidden": 16 * (1 + number % kinds), "width": width, "blocks": blocks},
        )
        for number in range(count)
    ]
    return _models("head", factories, [3, image, image], batch, size, batches)


#: Epochs of the workload whose trunk's activations are stored.
STORED_EPOCHS = 5


def stored(size: str) -> list[Model]:
    """The heads with more data, for a training of few epochs."""
    models = _heads(size, {"full": 64, "reduced": 8, "small": 4}[size])
    for model in models:
        model.training = replace(model.training, epochs=STORED_EPOCHS)
    return models


#: In the order in which they are measured: what is to be known first comes first.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cnn", "32 CNNs of two convolutions, of different learning rates", _cnns, 15, 5,
                 32),
        Workload("heads", "32 heads over one frozen ResNet-18", _heads, 8, 6, 8, trunk="trunk"),
        Workload("encoders", "16 transformer encoders of mixed depth and width", _encoders, 6, 2.5,
                 16, images=False),
        Workload("wide", "4 ResNet-18 of full width", _wide_resnets, 1, 1, 4),
        Workload("mix", "4 ResNet-18 of full width and 8 small networks", _mixed, 1, 1.15, 12),
        Workload("narrow", "256 ResNet-18 of an eighth of the width", _narrow_resnets, 12, 1.5, 8),
        Workload("cells", "32 random NAS-Bench-201 networks, all different", _cells, 8, 2, 8),
    )
}  # fmt: skip

#: The heads for five epochs, the trunk's activations stored: the serial loop's time over it.
STORED_TARGET = 15.0
