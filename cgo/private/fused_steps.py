"""Optimizer steps as one kernel."""

import torch

__all__ = ["adagrad_", "adam_", "adamw_", "sgd_"]

NAMES = (
    "torch._fused_adagrad_",
    "torch._fused_adam_",
    "torch._fused_adamw_",
    "torch._fused_sgd_",
)

adagrad_, adam_ = torch._fused_adagrad_, torch._fused_adam_
adamw_, sgd_ = torch._fused_adamw_, torch._fused_sgd_
