"""Memory pools of CUDA graphs whose capture did not end."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["abandon"]

#: In builds with CUDA alone.
NAMES: tuple[str, ...] = ()


def abandon(device: int, pool: Any) -> None:
    """Let the allocator forget a pool; in a torch without these names it stays until the end."""
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        undo = getattr(torch._C, name, None)
        with contextlib.suppress(RuntimeError):
            if undo is not None:
                undo(device, pool)
