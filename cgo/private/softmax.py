"""The backward of a softmax's logarithm, as one kernel."""

import torch

__all__ = ["log_softmax_backward"]

NAMES = ("torch.ops.aten._log_softmax_backward_data",)

log_softmax_backward = torch.ops.aten._log_softmax_backward_data
