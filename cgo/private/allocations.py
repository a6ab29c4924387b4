"""Blocks of memory that torch's profiler saw."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["block"]

NAMES = ("torch._C._profiler._ExtraFields_Allocation",)


def block(fields: Any) -> tuple[int, int] | None:
    """Address and bytes of a block that an event says was taken, or below zero, given back."""
    if not isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
        return None
    return int(fields.ptr), int(fields.alloc_size)
