"""Kernels of our own, in Triton, for CUDA devices; without Triton everything works as before.

A kernel is one form of a computation that has another: it enters the measured choice like any form,
and is taken where it is faster. Each is tested against torch by Triton's interpreter, which runs on
a CPU (`TRITON_INTERPRET=1`). Its modules import `triton` at their head, so they are imported where
`usable` says so and nowhere else.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels by its interpreter: slowly, and on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def usable(device: torch.device, wanted: bool | None = None) -> bool:
    """Whether kernels may be used on a device.

    Args:
        device: Where.
        wanted: `Tuning.kernels`. None: on CUDA. True: by the interpreter, too. False: nowhere.
    """
    if wanted is False or not installed():
        return False
    return device.type == "cuda" or bool(wanted and interpreting())
