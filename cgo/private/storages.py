"""Whether tensors share memory, fake ones too."""

from torch import Tensor

__all__ = ["shared"]

NAMES = ("torch.UntypedStorage._cdata",)


def shared(one: Tensor, other: Tensor) -> bool:
    """Whether both lie in one storage."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
