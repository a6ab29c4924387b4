"""Blocks of memory that torch's profiler saw."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_allocation"]

NAMES = ("torch._C._profiler._ExtraFields_Allocation",)


def is_allocation(fields: Any) -> bool:
    """Whether an event of the profiler is of a block that was taken or given back."""
    return isinstance(fields, torch._C._profiler._ExtraFields_Allocation)
