"""What all batch norms derive from."""

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = ["BatchNorm"]

NAMES = ("torch.nn.modules.batchnorm._BatchNorm",)
