"""Optimizer steps of many models, each with numbers of its own, over flat tensors: one launch.

A row of a table says where some elements of one model lie; a program takes one row. Numbers are
float64, one a model, and become those of the step as in `torch.optim`'s single-tensor functions,
whose formulas these are. What a model that is left out has is neither read nor written, and no
element depends on another: whatever one model's numbers are, its neighbours' bits stay.
"""

# Kernels are written in Triton's language, whose values have no types of Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a row, at most.
BLOCK = 1024


#: One version for all tensors and numbers of models: another might have to be compiled while a step
#: is captured. Lanes begin anywhere, so that nothing is lost.
_step = triton.jit(do_not_specialize=list(range(10)))


@triton.jit
def _root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(a, b):
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _mixed(start, end, weight):
    """As `torch.lerp`, which goes from the nearer end."""
    near = start + weight * (end - start)
    return tl.where(weight < 0.5, near, end - (end - start) * (1 - weight))


@triton.jit
def _power(base, exponent):
    """Of float64 numbers from 0 on."""
    return tl.where(base == 0, 0.0, tl.exp(exponent * tl.log(tl.where(base == 0, 1.0, base))))


@triton.jit
def _row(rows, skip, block: tl.constexpr):
    """Where a program's elements and gradients are, which of them there are, and whose."""
    row = tl.program_id(0).to(tl.int64) * 4
    inner = tl.arange(0, block)
    model = tl.load(rows + row + 3)
    size = tl.where(tl.load(skip + model) == 0, tl.load(rows + row + 2), 0)
    return tl.load(rows + row) + inner, tl.load(rows + row + 1) + inner, inner < size, model


@triton.jit
def _begun(values, at, gradients, given, taken, decay,
           decays: tl.constexpr, wide: tl.constexpr):  # fmt: skip
    """A program's parameters, and their gradients with the decay of weights added."""
    value = tl.load(values + at, mask=taken, other=0).to(wide)
    update = tl.load(gradients + given, mask=taken, other=0).to(wide)
    if decays:
        update += tl.load(decay).to(wide) * value
    return value, update


@_step
def _sgd(values, buffers, _second, _third, gradients, rows, numbers, counts, skip, models,
         decays: tl.constexpr, moves: tl.constexpr, nesterov: tl.constexpr,
         wide: tl.constexpr, block: tl.constexpr):  # fmt: skip
    at, given, taken, model = _row(rows, skip, block)
    value, update = _begun(values, at, gradients, given, taken, numbers + models + model,
                           decays, wide)  # fmt: skip
    if moves:
        momentum = tl.load(numbers + 2 * models + model).to(wide)
        buffer = tl.load(buffers + at, mask=taken, other=0).to(wide) * momentum + update
        tl.store(buffers + at, buffer.to(buffers.dtype.element_ty), mask=taken)
        update = update + momentum * buffer if nesterov else buffer
    value -= tl.load(numbers + model).to(wide) * update
    tl.store(values + at, value.to(values.dtype.element_ty), mask=taken)


@_step
def _adam(values, means, squares, highest, gradients, rows, numbers, counts, skip, models,
          decays: tl.constexpr, decoupled: tl.constexpr, amsgrad: tl.constexpr,
          wide: tl.constexpr, block: tl.constexpr):  # fmt: skip
    at, given, taken, model = _row(rows, skip, block)
    rate, decay = tl.load(numbers + model), tl.load(numbers + models + model)
    eps = tl.load(numbers + 2 * models + model).to(wide)
    first, second = tl.load(numbers + 3 * models + model), tl.load(numbers + 4 * models + model)
    count = tl.load(counts + model).to(tl.float64)
    size = (rate / (1 - _power(first, count))).to(wide)
    root = tl.sqrt(1 - _power(second, count)).to(wide)
    value = tl.load(values + at, mask=taken, other=0).to(wide)
    update = tl.load(gradients + given, mask=taken, other=0).to(wide)
    if decays:
        if decoupled:
            value *= (1 - rate * decay).to(wide)
        else:
            update += decay.to(wide) * value
    mean = _mixed(tl.load(means + at, mask=taken, other=0).to(wide), update, (1 - first).to(wide))
    square = tl.load(squares + at, mask=taken, other=0).to(wide) * second.to(wide)
    square += (1 - second).to(wide) * update * update
    tl.store(means + at, mean.to(means.dtype.element_ty), mask=taken)
    tl.store(squares + at, square.to(squares.dtype.element_ty), mask=taken)
    if amsgrad:  # NaN is higher than everything, as for torch.maximum
        high = tl.load(highest + at, mask=taken, other=0).to(wide)
        square = tl.where((square > high) | (square != square), square, high)
        tl.store(highest + at, square.to(highest.dtype.element_ty), mask=taken)
    value -= _quotient(size * mean, _quotient(_root(square), root) + eps)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=taken)


@_step
def _rmsprop(values, squares, second, third, gradients, rows, numbers, counts, skip, models,
             decays: tl.constexpr, centered: tl.constexpr, moves: tl.constexpr,
             wide: tl.constexpr, block: tl.constexpr):  # fmt: skip
    at, given, taken, model = _row(rows, skip, block)
    value, update = _begun(values, at, gradients, given, taken, numbers + models + model,
                           decays, wide)  # fmt: skip
    eps, alpha = tl.load(numbers + 2 * models + model), tl.load(numbers + 3 * models + model)
    rest = (1 - alpha).to(wide)
    square = tl.load(squares + at, mask=taken, other=0).to(wide) * alpha.to(wide)
    square += rest * update * update
    tl.store(squares + at, square.to(squares.dtype.element_ty), mask=taken)
    if centered:
        average = _mixed(tl.load(second + at, mask=taken, other=0).to(wide), update, rest)
        tl.store(second + at, average.to(second.dtype.element_ty), mask=taken)
        square -= average * average
    update = _quotient(update, _root(square) + eps.to(wide))
    if moves:
        buffers = third if centered else second
        momentum = tl.load(numbers + 4 * models + model).to(wide)
        update += tl.load(buffers + at, mask=taken, other=0).to(wide) * momentum
        tl.store(buffers + at, update.to(buffers.dtype.element_ty), mask=taken)
    value -= tl.load(numbers + model).to(wide) * update
    tl.store(values + at, value.to(values.dtype.element_ty), mask=taken)


@_step
def _adagrad(values, sums, _second, _third, gradients, rows, numbers, counts, skip, models,
             decays: tl.constexpr, _unused: tl.constexpr, _unused_too: tl.constexpr,
             wide: tl.constexpr, block: tl.constexpr):  # fmt: skip
    at, given, taken, model = _row(rows, skip, block)
    value, update = _begun(values, at, gradients, given, taken, numbers + models + model,
                           decays, wide)  # fmt: skip
    past = tl.load(counts + model).to(tl.float64) - 1
    size = tl.load(numbers + model) / (1 + past * tl.load(numbers + 3 * models + model))
    total = tl.load(sums + at, mask=taken, other=0).to(wide) + update * update
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=taken)
    eps = tl.load(numbers + 2 * models + model).to(wide)
    value -= _quotient(size.to(wide) * update, _root(total) + eps)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=taken)


_KERNELS: dict[str, Any] = {"sgd": _sgd, "adam": _adam, "rmsprop": _rmsprop, "adagrad": _adagrad}


def _launch(
    values: Tensor, moments: list[Tensor], gradients: Tensor, rows: Tensor, numbers: Tensor,
    counts: Tensor, skip: Tensor, family: str, flags: list[bool],
) -> None:  # fmt: skip
    places = [*moments, *[values] * (3 - len(moments))]  # those that are missing are not read
    chosen = [*flags, *[False] * (3 - len(flags))]
    wide = tl.float64 if values.dtype is torch.float64 else tl.float32
    with torch.cuda.device_of(values):
        _KERNELS[family][(len(rows),)](
            values, *places, gradients, rows, numbers, counts, skip, numbers.shape[1],
            *chosen, wide, BLOCK,
            enable_fp_fusion=False,  # torch rounds after each operation
        )  # fmt: skip


def _nothing(*_: Any) -> None:
    """Of tensors without values."""


# An operator of torch's, so that whoever records calls sees it.
_LIBRARY = torch.library.Library("cgo", "FRAGMENT")
_LIBRARY.define(
    "fused_update(Tensor(a!) values, Tensor(b!)[] moments, Tensor gradients, Tensor rows, "
    "Tensor numbers, Tensor counts, Tensor skip, str family, bool[] flags) -> ()"
)
_LIBRARY.impl("fused_update", _launch, "CPU")
_LIBRARY.impl("fused_update", _launch, "CUDA")
_LIBRARY.impl("fused_update", _nothing, "Meta")


def fused_update(
    values: Tensor, moments: list[Tensor], gradients: Tensor, rows: Tensor, numbers: Tensor,
    counts: Tensor, skip: Tensor, family: str, flags: list[bool],
) -> None:  # fmt: skip
    """Take a step of all models, in place.

    Args:
        values: The parameters, flat.
        moments: What the optimizers keep, as `values`, in the order of `torch.optim`'s.
        gradients: Flat.
        rows: int64, (R, 4): where a row's elements begin in `values` and in `gradients`, how many
            there are, `BLOCK` at most, and the position of their model.
        numbers: float64, (K, M): of each model its rate, weight decay, and what else the family
            has: momentum; eps and both betas; eps, alpha and momentum; eps and decay of the rate.
        counts: (M,): steps, this one included.
        skip: (M,): not 0 for models that stay as they are.
        family: "sgd", "adam", "rmsprop" or "adagrad".
        flags: Which formulas: with weight decay; and momentum, Nesterov's; or decoupled decay,
            amsgrad; or centered, momentum.
    """
    torch.ops.cgo.fused_update(
        values, moments, gradients, rows, numbers, counts, skip, family, flags
    )
