"""A batch as named tensors, and how modules and losses receive it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cgo.errors import DataError

#: A batch as named tensors: "input" or "input.0" or "input.mask", and "target".
Leaves = Mapping[str, Tensor]


def flatten(batch: Any) -> dict[str, Tensor]:
    """A batch `(input, target)` as named leaves.

    Raises:
        DataError: it is not a pair, or has leaves that are not tensors.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise DataError("a sample must be an (input, target) pair")
    if type(batch[0]) is Tensor and type(batch[1]) is Tensor:
        return {"input": batch[0], "target": batch[1]}
    return named_leaves("input", batch[0]) | named_leaves("target", batch[1])


def named_leaves(name: str, value: Any) -> dict[str, Tensor]:
    """A tensor, or a tuple or dict of them, as leaves whose names begin with `name`.

    Raises:
        DataError: there is something else than a tensor in it.
    """
    if isinstance(value, Mapping):
        leaves = {f"{name}.{key}": leaf for key, leaf in value.items()}
    elif isinstance(value, (tuple, list)):
        leaves = {f"{name}.{index}": leaf for index, leaf in enumerate(value)}
    else:
        leaves = {name: value}
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise DataError(f"{path} is a {type(leaf).__name__}, not a tensor")
    return leaves


def call_arguments(
    leaves: Leaves, name: str = "input"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """How a module is called with the leaves called `name`: positional and keyword arguments."""
    if name in leaves:
        return (leaves[name],), {}
    parts = {
        key.removeprefix(f"{name}."): leaf
        for key, leaf in leaves.items()
        if key.startswith(f"{name}.")
    }
    if all(key.isdigit() for key in parts):
        return tuple(parts[key] for key in sorted(parts, key=int)), {}
    return (), parts


def target_of(leaves: Leaves) -> Any:
    """The target as the loss receives it: a tensor, a tuple or a dict."""
    positional, named = call_arguments(leaves, "target")
    if named:
        return named
    return positional[0] if "target" in leaves else positional


def moved(leaf: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; a copy to CUDA runs beside the computation, ordered by its stream."""
    if device.type == "cuda" and leaf.device.type == "cpu":
        # Only from pinned memory; torch keeps that memory until the copy is done.
        return leaf.pin_memory().to(device, non_blocking=True)
    return leaf.to(device)
