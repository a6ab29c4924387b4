"""Whether tensors share memory, fake ones too."""

from torch import Tensor

__all__ = ["identity", "shared"]

NAMES = ("torch.UntypedStorage._cdata",)


def shared(one: Tensor, other: Tensor) -> bool:
    """Whether both lie in one storage."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def identity(tensor: Tensor) -> int:
    """A number that tensors in one storage have in common, as long as one of them is there."""
    return int(tensor.untyped_storage()._cdata)
