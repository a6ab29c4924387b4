"""Kernels of our own operators, and the torch values behind IR literals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cgo.dtypes import torch_constant, torch_dtype
from cgo.errors import GraphError
from cgo.graph import Node, Symbol, TensorType

#: Fills a tensor with random numbers from a generator.
Fill = Callable[[Tensor, torch.Generator], object]


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


def filler(node: Node) -> Fill:
    """How to draw what a `cgo.random` node stands for, as the eager operator would."""
    given = dict(node.kwargs)
    match given["distribution"], given.get("p"):
        case "dropout", 1.0:
            return lambda out, generator: out.zero_()
        case "dropout", float(p):  # zeros and 1 / (1 - p): what x is multiplied by
            keep = 1 - p
            return lambda out, generator: out.bernoulli_(keep, generator=generator).div_(keep)
        case "bernoulli", float(p):
            return lambda out, generator: out.bernoulli_(p, generator=generator)
        case "uniform", _:
            return lambda out, generator: out.uniform_(generator=generator)
        case "normal", _:
            return lambda out, generator: out.normal_(generator=generator)
        case "randint", _:
            low, high = given["low"], given["high"]
            assert isinstance(low, int)
            assert isinstance(high, int)
            return lambda out, generator: out.random_(low, high, generator=generator)
    raise GraphError(f"%{node.name}: unknown distribution {given['distribution']!r}")


def empty(type_: TensorType, device: torch.device, members: int | None = None) -> Tensor:
    """Memory for a tensor of this type, or for several as (M, ...)."""
    dtype = torch_dtype(type_.dtype)
    if members is not None:
        return torch.empty((members, *type_.shape), dtype=dtype, device=device)
    if type_.stride is None:
        return torch.empty(type_.shape, dtype=dtype, device=device)
    return torch.empty_strided(type_.shape, type_.stride, dtype=dtype, device=device)


def symbol_value(symbol: Symbol, device: torch.device) -> Any:
    """The torch constant that a literal stands for."""
    if symbol.kind == "device":
        return device
    return torch_constant(symbol.kind, symbol.value)
