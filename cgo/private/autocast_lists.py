"""Which operators autocast knows."""

import torch

__all__ = ["is_listed"]

NAMES = ("torch._C._dispatch_has_kernel_for_dispatch_key",)


def is_listed(name: str) -> bool:
    """Whether autocast does something to an operator on a CPU, by its full name ("aten::mm")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCPU")
