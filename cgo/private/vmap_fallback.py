"""Operators without a batching rule under `torch.vmap`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["forbidden"]

NAMES = (
    "torch._C._functorch._is_vmap_fallback_enabled",
    "torch._C._functorch._set_vmap_fallback_enabled",
)


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Let them raise instead of becoming a loop inside a trace."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
