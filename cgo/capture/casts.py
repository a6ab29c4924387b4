"""Autocast regions inside a forward, spelled out as casts.

A program runs under one autocast setting. Where a module changes it for a part of its forward (as
rotary embeddings do, to compute angles in float32), the casts that autocast would make are written
into the graph, for the whole program, by the rules of the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from cgo.capture.traced import Traced
from cgo.errors import CaptureError
from cgo.private.autocast_lists import is_listed
from cgo.private.operators import OpOverload
from cgo.private.trees import tree_map_only


@dataclass
class Casts:
    """The setting in force; `dtype` is None where autocast is off."""

    dtype: torch.dtype | None

    @classmethod
    def needed(cls, traced: Traced, dtype: str | None) -> Casts | None:
        """Casts for a program of that setting; None where its module never changes it.

        Args:
            traced: The program.
            dtype: Of the autocast region that the program runs in, if any.
        """
        if not _changes(traced):
            return None
        return cls(None if dtype is None else getattr(torch, dtype))

    @contextlib.contextmanager
    def inside(self, device: str, dtype: Any, enabled: bool) -> Iterator[None]:
        """Another setting for a block.

        Raises:
            CaptureError: it is for another device than the export ran on.
        """
        if device != "cpu":
            raise CaptureError(f"an autocast region for {device!r}; name the input's own device")
        before = self.dtype
        self.dtype = (dtype or torch.bfloat16) if enabled else None
        try:
            yield
        finally:
            self.dtype = before

    def of(
        self, overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.dtype | None:
        """What an operator's floating-point arguments are cast to; None: they stay.

        Autocast's lists are not to be had from Python, so the operator is run on fake tensors under
        autocast, and without it on arguments of each dtype that its lists know.
        """
        name = overload._schema.name + "." * bool(overload._schema.overload_name)
        full = name + overload._schema.overload_name
        if not is_listed(full):
            return None
        with torch.autocast("cpu", dtype=self.dtype):
            wanted = _dtypes(overload(*args, **kwargs))
        found = [t for t in _tensors((args, dict(kwargs))) if t.is_floating_point()]
        if not found:
            return None
        widest = found[0].dtype
        for tensor in found:
            widest = torch.promote_types(widest, tensor.dtype)
        for dtype in (self.dtype, torch.float32, widest):
            assert dtype is not None
            cast = tree_map_only(Tensor, partial(_cast, dtype=dtype), args)
            if _dtypes(_tried(overload, cast, kwargs)) == wanted:
                return dtype
        raise CaptureError(f"operator {overload} under autocast")


def _changes(traced: Traced) -> bool:
    """Whether autocast is set anew within a step."""
    if traced.owner is None:
        settings = (node.meta.get("setting") for node in traced.graph.nodes)
        return any(setting is not None and setting.autocast is not None for setting in settings)
    parts = (part for part in traced.owner.modules() if isinstance(part, fx.GraphModule))
    return any(str(n.target) == "wrap_with_autocast" for part in parts for n in part.graph.nodes)


def castable(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether autocast would cast a tensor to a dtype: doubles stay."""
    if not isinstance(tensor, Tensor) or tensor.dtype is dtype:
        return False
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if castable(tensor, dtype) else tensor


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _dtypes(tree: Any) -> list[torch.dtype]:
    return [tensor.dtype for tensor in _tensors(tree)]


def _tried(overload: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    try:
        return overload(*args, **kwargs)
    except (RuntimeError, TypeError):  # operands of dtypes that do not go together
        return None
