"""Embeddings: one table that holds every member's rows, read at shifted indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cgo.runtime.emitter import Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.tuning import STACKED


@form("offset embedding", "embedding", layouts="stacked")
def embedding(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """Separate tables: one look-up in (M*V, D), each member's indices shifted by its lane."""
    given = group.arguments
    if given["scale_grad_by_freq"] or given["sparse"] or given["weight"].shared:
        return None
    value = emitter.call(
        look_up,
        emitter.stacked(given["weight"]),
        emitter.leading(given["indices"]),
        given["padding_idx"],
    )
    return [Packed(value, STACKED)]


@form("folded embedding", "embedding", layouts="stacked")
def folded(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """A shared table takes indices of any shape, so the members' as well."""
    given = group.arguments
    if given["scale_grad_by_freq"] or given["sparse"] or not given["weight"].shared:
        return None
    weight = emitter.value(given["weight"].refs[0])
    padding = None if given["padding_idx"] < 0 else given["padding_idx"]
    value = emitter.call(F.embedding, emitter.stacked(given["indices"]), weight, padding)
    return [Packed(value, STACKED)]


def look_up(tables: Tensor, indices: Tensor, padding: int) -> Tensor:
    """(M, V, D) at (M or 1, ...) gives (M, ..., D).

    An index that is out of range would read a neighbour's rows. It is sent behind the last of all
    tables, so that the look-up itself refuses it, as alone: no value has to be looked at here.
    """
    members, rows = tables.shape[:2]
    first = torch.arange(0, members * rows, rows, device=tables.device, dtype=indices.dtype)
    shifted = indices + first.view(-1, *[1] * (indices.dim() - 1))
    inside = (indices >= 0) & (indices < rows)
    found = F.embedding(torch.where(inside, shifted, members * rows), tables.flatten(0, 1))
    if padding >= 0:  # rows of padding receive no gradient
        found = torch.where((indices == padding).unsqueeze(-1), found.detach(), found)
    return found
