"""Tensors with shapes and storages, and no elements."""

from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

__all__ = ["FakeTensorMode", "unset_fake_temporarily"]

NAMES = (
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
)
