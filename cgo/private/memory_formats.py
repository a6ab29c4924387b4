"""The memory format that a tensor's strides suggest."""

from torch._prims_common import suggest_memory_format

__all__ = ["suggest_memory_format"]

NAMES = ("torch._prims_common.suggest_memory_format",)
