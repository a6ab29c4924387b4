"""Which operators a graph may contain; `cgo.passes.sharing` says which may be shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from cgo.graph import SOURCES

#: Our own operators beside the sources; `cgo.runtime.operators` has what stands behind them.
#:
#: - `cgo.random(distribution=, model=, order=, ...)`: random tensor, drawn before the step from
#:   the model's own stream; `order` counts the model's draws within one program. Distributions:
#:   dropout (p: zeros and 1 / (1 - p), what the input is multiplied by), bernoulli (p), uniform
#:   (low, high), normal (mean, std), exponential (rate), log_normal (mean, std), cauchy (median,
#:   scale), geometric (p), randint (low, high), randperm
#: - `cgo.batch_norm(x, weight, bias, mean, var, momentum, eps)` in training mode: outputs
#:   (y, new mean, new var)
CGO_OPERATORS = SOURCES | {"cgo.random", "cgo.batch_norm"}


@cache
def aten(op: str) -> Any | None:
    """The `torch` OpOverload that "aten.name.overload" names, or None."""
    import torch

    from cgo.private.operators import OpOverload, OpOverloadPacket

    parts = op.split(".")
    if len(parts) != 3 or parts[0] != "aten":
        return None
    packet = getattr(torch.ops.aten, parts[1], None)
    # A namespace and a packet have attributes of their own, such as "name" and "op".
    if not isinstance(packet, OpOverloadPacket):
        return None
    overload = getattr(packet, parts[2], None)
    return overload if isinstance(overload, OpOverload) else None


@cache
def known(op: str) -> bool:
    """Whether a graph may contain `op`: one of ours, or a functional ATen operator."""
    if op in CGO_OPERATORS:
        return True
    overload = aten(op)
    return overload is not None and not overload._schema.is_mutable


#: Argument names of our own operators.
_OURS = {"cgo.batch_norm": ("input", "weight", "bias", "mean", "var", "momentum", "eps")}


def named_arguments(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name in the order of its schema, defaults filled in."""
    overload = aten(op)
    if overload is None:
        return {**dict(zip(_OURS.get(op, ()), args)), **kwargs}
    arguments = overload._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args)} | dict(kwargs)
    return {
        argument.name: given.get(argument.name, _default(argument))
        for argument in arguments
        if argument.name in given or argument.has_default_value()
    }


def _default(argument: Any) -> Any:
    value = argument.default_value
    return tuple(value) if isinstance(value, list) else value
