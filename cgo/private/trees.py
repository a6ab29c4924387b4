"""Nested lists, tuples and mappings of tensors."""

from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["tree_iter", "tree_map_only"]

NAMES = ("torch.utils._pytree.tree_iter", "torch.utils._pytree.tree_map_only")
