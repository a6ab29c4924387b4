"""Lanes as part of the batch: (M, N, ...) to (M*N, ...) and back."""

from __future__ import annotations

import torch
from torch import fx

from cgo.runtime.emitter import Emitter


def fold(emitter: Emitter, stacked: fx.Node) -> fx.Node:
    """(M, N, ...) as (M*N, ...)."""
    return emitter.call(torch.flatten, stacked, 0, 1)


def unfold(emitter: Emitter, folded: fx.Node, size: int) -> fx.Node:
    """(M*N, ...) as (M, N, ...)."""
    return emitter.call(torch.unflatten, folded, 0, (size, -1))
