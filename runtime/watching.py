"""Operators called on fake tensors, within bounds on what they would take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from cgo.limits import MOST_DIMENSIONS
from cgo.operators import draws
from cgo.private.operators import OpOverload
from cgo.private.trees import tree_iter
from cgo.runtime.rehearsal import LiveBytes


@dataclass(frozen=True)
class Limits:
    """What one operator may take; models with a larger one are refused before any is run.

    Args:
        tensor_bytes: Of its arguments and results together.
        inner_bytes: Of the values that it holds on its way, where these can be seen.
        flops: Operations of one call, where they can be counted.
        calls: Of the smaller operators that it consists of, such as the steps of a recurrence.
        graph_bytes: Of the results of a model's operators in one program, and of its state.
    """

    tensor_bytes: float = 2.0**48
    inner_bytes: float = 2.0**50
    flops: float = 2.0**53
    calls: int = 100_000
    graph_bytes: float = 2.0**51

    @classmethod
    def of_memory(cls, total_bytes: int) -> Limits:
        """For a device with so much memory: what is larger fails there for certain."""
        return cls(total_bytes, 4.0 * total_bytes, graph_bytes=8.0 * total_bytes)


class Refused(Exception):
    """An operator would take more than the limits allow, or draw random numbers; says which."""


class Watch(LiveBytes):
    """Counts what operators inside take, and stops the one that takes too much.

    Raises:
        Refused: it does, or it draws random numbers, which only `cgo.random` does for a model.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__("cpu")
        self._limits = limits
        self._calls, self._flops = 0, 0.0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._calls += 1
        if self._calls > self._limits.calls:
            raise Refused(f"more than {self._limits.calls:,} operators in one")
        _check_dimensions(func, args, kwargs or {})
        if draws(func, args, kwargs or {}):
            raise Refused("draws from the process's random stream; cgo.random draws from a model's")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.highest > self._limits.inner_bytes:
            raise Refused(f"{self.highest:,} bytes on its way; {_shown(self._limits.inner_bytes)}")
        self._flops += flops_of(func, args, kwargs or {}, result)
        if self._flops > self._limits.flops:
            raise Refused(f"{self._flops:.3g} operations; {_shown(self._limits.flops)}")
        return result


#: Lists of numbers with one for each part or sample; all others have one or two a dimension.
_BY_PART = {"split_sizes", "indices", "input_lengths", "target_lengths", "batch_sizes"}


def _check_dimensions(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Stop a call for a tensor of endless dimensions, which takes torch their square in time."""
    names = (argument.name for argument in func._schema.arguments)
    for name, value in (*zip(names, args), *kwargs.items()):
        if not isinstance(value, (list, tuple)) or len(value) <= 2 * MOST_DIMENSIONS:
            continue
        if name not in _BY_PART and isinstance(value[0], int):
            raise Refused(
                f"{name} has {len(value):,} numbers; a tensor has at most {MOST_DIMENSIONS} "
                "dimensions"
            )


def _shown(limit: float) -> str:
    return f"at most {limit:,.0f} are taken"


def flops_of(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> float:
    """About how many operations a call does; of most operators, one for each element of it."""
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
    elements = float(sum(tensor.numel() for tensor in (*given, *made)))
    packet = func.overloadpacket
    if packet in flop_registry:
        counted: float = flop_registry[packet](*args, **kwargs, out_val=result)
        return max(elements, counted)
    rule = next((rule for part, rule in _RULES if part in func._schema.name), None)
    if rule is None or not given or not made:
        return elements
    return max(elements, rule(given, made, args))


Rule = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Any]], float]


def _cubic(given: Sequence[Tensor], made: Sequence[Tensor], args: Sequence[Any]) -> float:
    """Decompositions of matrices, with the many sweeps of the slowest."""
    return 30.0 * given[0].numel() * max(given[0].shape[-2:], default=1)


def _windows(given: Sequence[Tensor], made: Sequence[Tensor], args: Sequence[Any]) -> float:
    """Pooling: each result looks at a window, or as much of it as lies in the input."""
    sizes = [args[1]] if isinstance(args[1], int) else list(args[1])
    spatial = given[0].shape[-len(sizes) :] if len(sizes) > 1 else given[0].shape[2:]
    window = [min(size, place) for size, place in zip(sizes * len(spatial), spatial)]
    return float(made[0].numel() * math.prod(window))


def _pairs(given: Sequence[Tensor], made: Sequence[Tensor], args: Sequence[Any]) -> float:
    """Distances: each result looks at two rows."""
    return 4.0 * made[0].numel() * given[0].shape[-1]


def _resampled(given: Sequence[Tensor], made: Sequence[Tensor], args: Sequence[Any]) -> float:
    """Antialiased resizing: each result looks at as much of a row and a column as it covers."""
    ratio = max(1.0, given[0].numel() / max(made[0].numel(), 1))
    return 16.0 * made[0].numel() * ratio


#: By a part of the operator's name; the first that fits.
_RULES: tuple[tuple[str, Rule], ...] = (
    ("pool", _windows),
    ("linalg", _cubic),
    ("cholesky", _cubic),
    ("inverse", _cubic),
    ("triangular_solve", _cubic),
    ("geqrf", _cubic),
    ("orgqr", _cubic),
    ("ormqr", _cubic),
    ("lu_", _cubic),
    ("cdist", _pairs),
    ("pdist", _pairs),
    ("_aa", _resampled),
)
