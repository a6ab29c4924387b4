"""Classes of torch's operators, and whether one has a kernel at all."""

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = ["HigherOrderOperator", "OpOverload", "OpOverloadPacket", "has_kernel"]

NAMES = (
    "torch._ops.HigherOrderOperator",
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch._C._dispatch_has_kernel",
)


def has_kernel(overload: OpOverload) -> bool:
    """Whether it is computed by a kernel, and not by TorchScript's interpreter."""
    return torch._C._dispatch_has_kernel(overload.name())
