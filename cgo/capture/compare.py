"""How far captured and eager results are apart, and what is no difference at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cgo.errors import CaptureError

#: What a run gave, by a name for people; None where there is no such gradient.
Found = Mapping[str, "Tensor | None"]

#: Largest difference allowed, relative to the largest magnitude of the eager tensor. The captured
#: program runs the same kernels, so these leave room for a reordered sum, not for another result.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}

#: A captured value may be so many times as far from the eager one as that goes when each parameter
#: moves by an ulp: what is chaotic, or is nothing but rounding, says nothing about the capture.
SPREAD = 10.0

#: Gradients are compared on a scale of at least so much of the model's largest one: a parameter
#: whose true gradient is zero has nothing but rounding.
_FLOOR = 1e-3

GRADIENT = "the gradient of "


def gaps(expected: Found, found: Found, name: str) -> dict[str, float]:
    """How far apart tensors are, relative to their magnitude.

    Raises:
        CaptureError: one of them is missing, or of another type.
    """
    scales = [
        _scale(t) for what, t in expected.items() if what.startswith(GRADIENT) and t is not None
    ]
    largest = max(scales, default=0.0)
    apart: dict[str, float] = {}
    for what, right in expected.items():
        left = found.get(what)
        if (left is None) != (right is None):
            raise CaptureError(
                f"captured and eager differ in {name}: {what} is "
                f"{'missing' if left is None else 'there'} in the captured graph"
            )
        if left is None or right is None:
            continue
        if left.shape != right.shape or left.dtype != right.dtype:
            raise CaptureError(f"captured and eager differ in {name}: {what} has another type")
        floor = _FLOOR * largest if what.startswith(GRADIENT) else 0.0
        apart[what] = _gap(left, right, max(floor, 1e-12))
    return apart


def beyond(apart: Mapping[str, float], allowed: Mapping[str, float]) -> str | None:
    """The first of the differences that is not allowed, NaN among them."""
    return next((what for what, gap in apart.items() if not gap <= allowed[what]), None)


def refuse(apart: Mapping[str, float], allowed: Mapping[str, float], name: str) -> None:
    """Raise `CaptureError` where a difference is not allowed."""
    if (what := beyond(apart, allowed)) is not None:
        raise CaptureError(
            f"captured and eager differ in {name}: {what} by {apart[what]:.2g} relative "
            f"(allowed {allowed[what]:.2g})"
        )


def _scale(tensor: Tensor) -> float:
    """The largest magnitude of a finite element; 1 where there is none."""
    finite = tensor.detach().double()
    finite = finite[finite.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0


def _gap(left: Tensor, right: Tensor, floor: float) -> float:
    if torch.equal(left, right) or not right.numel():
        return 0.0
    left, right = left.detach().double(), right.detach().double()
    same = (left == right) | (left.isnan() & right.isnan())
    gap = torch.where(same, 0.0, (left - right).abs()).max()
    return float(gap) / max(_scale(right), floor)
