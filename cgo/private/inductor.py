"""Torch's compiler, called on a graph rather than on a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["compiled"]

NAMES = ("torch._inductor.compile",)


def compiled(
    module: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A graph as compiled code, for inputs of the same shapes; options are Inductor's own."""
    return torch._inductor.compile(module, list[Any](inputs), options=options)
