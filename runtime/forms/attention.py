"""Scaled dot-product attention with the members folded into the batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx
from torch.nn import functional as F

from cgo.runtime.emitter import Column, Emitter, Group, Packed
from cgo.runtime.forms import form
from cgo.runtime.forms.folding import fold, unfold
from cgo.tuning import STACKED


@form("folded attention", "scaled_dot_product_attention", layouts="stacked")
def attention(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """One attention over M*N samples; its dropout is drawn apart (capture spells it out)."""
    given = group.arguments
    query, mask = given["query"], given["attn_mask"]
    if given["dropout_p"] != 0 or query.ndim < 3:
        return None
    parts = [fold(emitter, emitter.stacked(given[name])) for name in ("query", "key", "value")]
    value = emitter.call(
        F.scaled_dot_product_attention,
        *parts,
        _mask(emitter, mask, query) if mask is not None else None,
        0.0,
        given["is_causal"],
        scale=given["scale"],
        enable_gqa=given["enable_gqa"],
    )
    return [Packed(unfold(emitter, value, group.size), STACKED)]


def _mask(emitter: Emitter, mask: Column, query: Column) -> fx.Node:
    """The mask as something that broadcasts to (M*N, ...)."""
    if mask.shared and mask.ndim < query.ndim:
        return emitter.value(mask.refs[0])
    size = len(mask.refs)
    return emitter.call(spread, emitter.leading(mask, query.ndim), size, query.shape[0])


def spread(mask: Tensor, members: int, batch: int) -> Tensor:
    """(M or 1, N or 1, ...) to (M*N, ...)."""
    return mask.expand(members, batch, *mask.shape[2:]).flatten(0, 1)
