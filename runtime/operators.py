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
    distribution = node.keyword("distribution")
    fill = _FILLS.get(str(distribution))
    if fill is None:
        raise GraphError(f"%{node.name}: unknown distribution {distribution!r}")
    return fill(**parameters_of(node))


def parameters_of(node: Node) -> dict[str, Any]:
    """Of the distribution that a `cgo.random` node draws from."""
    names = ("distribution", "order", "model")
    return {key: value for key, value in node.kwargs if key not in names}


def _dropout(p: float) -> Fill:
    """Zeros and 1 / (1 - p): what x is multiplied by."""
    if p == 1:
        return lambda out, generator: out.zero_()
    keep = 1 - p
    return lambda out, generator: out.bernoulli_(keep, generator=generator).div_(keep)


def _bernoulli(p: float) -> Fill:
    return lambda out, generator: out.bernoulli_(p, generator=generator)


def _uniform(low: float = 0.0, high: float = 1.0) -> Fill:
    return lambda out, generator: out.uniform_(low, high, generator=generator)


def _normal(mean: float = 0.0, std: float = 1.0) -> Fill:
    return lambda out, generator: out.normal_(mean, std, generator=generator)


def _exponential(rate: float) -> Fill:
    return lambda out, generator: out.exponential_(rate, generator=generator)


def _log_normal(mean: float, std: float) -> Fill:
    return lambda out, generator: out.log_normal_(mean, std, generator=generator)


def _cauchy(median: float, scale: float) -> Fill:
    return lambda out, generator: out.cauchy_(median, scale, generator=generator)


def _geometric(p: float) -> Fill:
    return lambda out, generator: out.geometric_(p, generator=generator)


def _randint(low: int, high: int) -> Fill:
    return lambda out, generator: out.random_(low, high, generator=generator)


def _randperm() -> Fill:
    def fill(out: Tensor, generator: torch.Generator) -> object:
        return torch.randperm(len(out), generator=generator, device=out.device, out=out)

    return fill


#: By the name of a distribution, called with its parameters.
_FILLS: dict[str, Callable[..., Fill]] = {
    "dropout": _dropout, "bernoulli": _bernoulli, "uniform": _uniform, "normal": _normal,
    "exponential": _exponential, "log_normal": _log_normal, "cauchy": _cauchy,
    "geometric": _geometric, "randint": _randint, "randperm": _randperm,
}  # fmt: skip


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
