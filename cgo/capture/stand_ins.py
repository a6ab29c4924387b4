"""What stands in for parts of torch while a module is captured.

Some of torch's own modules look at values where they need not, which no capture survives: whether a
mask is the causal one, how many batches were seen. Their stand-ins compute the same from tensors.
Every capture is compared with the module as it is, so a stand-in that did not would be found out.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgo.private.causal_masks import detected_by
from cgo.private.norms import BatchNorm


@contextlib.contextmanager
def stand_ins(module: nn.Module) -> Iterator[None]:
    """Put stand-ins in place for a block, in a module and in torch."""
    changed = [
        (part, vars(part).get("forward"))
        for part in module.modules()
        if isinstance(part, BatchNorm) and part.momentum is None and part.track_running_stats
    ]
    plain, owner = Tensor.data, threading.get_ident()

    def data(tensor: Tensor) -> Tensor:
        if threading.get_ident() == owner:
            return tensor.detach()
        return plain.__get__(tensor)  # type: ignore[attr-defined,no-any-return]

    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for part, _ in changed:
            part.forward = types.MethodType(_cumulative_norm, part)  # type: ignore[method-assign]
        # The fast path of attention in evaluation mode is one operator that nothing can merge.
        torch.backends.mha.set_fastpath_enabled(False)
        # What is written through `.data` escapes an export; through `detach()` it does not.
        torch.Tensor.data = property(data, plain.__set__)  # type: ignore[assignment,attr-defined]
        with detected_by(_said_to_be_causal):
            yield
    finally:
        del torch.Tensor.data
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, forward in changed:
            del part.forward
            if forward is not None:
                part.forward = forward  # type: ignore[method-assign]


def _said_to_be_causal(
    mask: Tensor | None, is_causal: bool | None = None, size: int | None = None
) -> bool:
    """Whether the caller says so; a mask is used as it is, which gives the same."""
    return is_causal is True


def _cumulative_norm(self: Any, input: Tensor) -> Tensor:
    """Batch norm with `momentum=None`: running statistics are plain means over all batches."""
    self._check_input_dim(input)
    if not self.training:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
    dims = [0, *range(2, input.dim())]
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        share = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        seen = (input.mean(dims), input.var(dims, unbiased=True))
        for running, new in zip((self.running_mean, self.running_var), seen):
            running.mul_(1 - share).add_(new * share)
    return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
