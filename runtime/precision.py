"""The precision of products: autocast, and TF32 for as long as a trial runs.

torch has two ways to allow TF32, and refuses to read by the older what the newer has set. So both
are set here, to the same: whoever reads either one (torch's own compiler has read both) is
answered.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from cgo.dtypes import torch_dtype


@contextlib.contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Let CUDA's matrix products and convolutions use TF32, or forbid it; then as it was before.

    Args:
        allowed: None leaves torch's setting as it is.
    """
    if allowed is None:
        yield
        return
    before = [part.fp32_precision for part in _parts()]
    _set(allowed, allowed, ["tf32" if allowed else "ieee"] * len(before))
    try:
        yield
    finally:
        _set(before[0] == "tf32", before[1] == "tf32", before)


def autocasting(dtype: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a dtype by torch's name for it; nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch_dtype(dtype))


def tf32_key() -> str:
    """What tells measurements under another setting than torch's own apart; empty under that."""
    multiplies, convolves, _ = (part.fp32_precision == "tf32" for part in _parts())
    if convolves and not multiplies:
        return ""
    return f", tf32 products {multiplies}, convolutions {convolves}"


def float32_products(*, convolutions: bool) -> str:
    """What CUDA computes float32 products in, as torch is set: "float32" or "tf32"."""
    multiplies, convolves, _ = _parts()
    part = convolves if convolutions else multiplies
    return "tf32" if part.fp32_precision == "tf32" else "float32"


def _parts() -> tuple[Any, Any, Any]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _set(products: bool, convolutions: bool, precisions: list[str]) -> None:
    with warnings.catch_warnings():  # some versions of torch advise against the older way
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
    for part, precision in zip(_parts(), precisions, strict=True):  # the older way sets these, too
        part.fp32_precision = precision
