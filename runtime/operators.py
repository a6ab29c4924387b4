"""Kernels of our own operators, and the torch values behind IR literals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cgo.errors import GraphError
from cgo.graph import Node, Symbol, TensorType


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training-mode batch norm that updates the running statistics in place.

    Lowering uses it where nothing else reads the old statistics.
    """
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, cudnn), mean, var


def batch_norm_copying(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, leaving the old statistics as they are."""
    return batch_norm(x, weight, bias, mean.clone(), var.clone(), momentum, eps)


def drawer(node: Node, device: torch.device) -> Callable[[torch.Generator], Tensor]:
    """How to draw what a `cgo.random` node stands for, as the eager operator would."""
    type_ = node.types[0]
    assert type_ is not None
    make = functools.partial(_empty, type_, getattr(torch, type_.dtype), device)
    given = dict(node.kwargs)
    match given["distribution"], given.get("p"):
        case "dropout", 1.0:
            return lambda generator: make().zero_()
        case "dropout", float(p):  # zeros and 1 / (1 - p): what x is multiplied by
            keep = 1 - p
            return lambda generator: make().bernoulli_(keep, generator=generator).div_(keep)
        case "bernoulli", float(p):
            return lambda generator: make().bernoulli_(p, generator=generator)
        case "uniform", _:
            return lambda generator: make().uniform_(generator=generator)
        case "normal", _:
            return lambda generator: make().normal_(generator=generator)
        case "randint", _:
            low, high = given["low"], given["high"]
            assert isinstance(low, int)
            assert isinstance(high, int)
            return lambda generator: make().random_(low, high, generator=generator)
    raise GraphError(f"%{node.name}: unknown distribution {given['distribution']!r}")


def _empty(type_: TensorType, dtype: torch.dtype, device: torch.device) -> Tensor:
    if type_.stride is None:
        return torch.empty(type_.shape, dtype=dtype, device=device)
    return torch.empty_strided(type_.shape, type_.stride, dtype=dtype, device=device)


def symbol_value(symbol: Symbol, device: torch.device) -> Any:
    """The torch constant that a literal stands for."""
    if symbol.kind == "device":
        return device
    return getattr(torch, symbol.value)
