"""How transformer layers find out that a mask is the causal one: they look at its values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch.nn.modules import transformer

__all__ = ["detected_by"]

NAMES = ("torch.nn.modules.transformer._detect_is_causal_mask",)


@contextlib.contextmanager
def detected_by(function: Callable[..., bool]) -> Iterator[None]:
    """Put another function in its place; nothing where this torch does it in another way."""
    name = "_detect_is_causal_mask"
    before = getattr(transformer, name, None)
    if before is None:
        yield
        return
    setattr(transformer, name, function)
    try:
        yield
    finally:
        setattr(transformer, name, before)
