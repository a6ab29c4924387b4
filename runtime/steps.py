"""Which optimizers a step is taken for together, and their formulas.

The formulas are those of `torch.optim`, operation by operation: its fused kernels on a CPU, which
pass over memory once, and its single-tensor functions over flat tensors elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cgo.runtime.optimizers import Updater

if TYPE_CHECKING:
    from cgo.runtime.updates import Flat

Number = float | Tensor  # one for all models, or a vector with an element a parameter element


@dataclass(frozen=True)
class Kind:
    """What decides which operators a step needs; models of one kind take it together."""

    rule: Callable[[Flat], None]
    fused: Callable[[Part], None] | None  # the step as one kernel; None where torch has none
    moments: tuple[str, ...]  # names in the optimizer's state, shaped as the parameter
    steps: bool  # whether the optimizer counts steps
    flags: tuple[bool, ...]
    dtype: torch.dtype


@dataclass
class Part:
    """Parameters whose hyper-parameters agree: one model's, or all models'.

    All tensors are flat; those of one position belong together.
    """

    values: list[Tensor]
    moments: list[list[Tensor]]  # for each name in the kind's `moments`
    gradients: list[Tensor]  # of this step
    group: Mapping[str, Any]  # the hyper-parameters
    flags: tuple[bool, ...]  # the kind's
    count: Tensor  # steps, this one included

    @property
    def counts(self) -> list[Tensor]:
        """The number of steps, for each parameter."""
        return [self.count] * len(self.values)


def kind_rule(updater: Updater) -> Callable[[Mapping[str, Any]], Kind | None] | None:
    """What gives the kind of the model's step from its parameter group, or None where it is none.

    The kind can change with the group; whether there is one at all cannot.
    """
    optimizer = updater.optimizer
    found = _RULES.get(type(optimizer))
    parameters = updater.parameters
    if found is None or len(optimizer.param_groups) != 1 or not parameters:
        return None
    group = optimizer.param_groups[0]
    dtype, device = parameters[0].dtype, parameters[0].device
    if any(p.dtype is not dtype or p.device != device for p in parameters):
        return None
    if any(group.get(key) for key in ("maximize", "differentiable", "capturable")):
        return None
    if isinstance(group["lr"], Tensor) or not dtype.is_floating_point:
        return None

    def kind(group: Mapping[str, Any]) -> Kind | None:
        parts = found(group)
        return None if parts is None else Kind(*parts, dtype)

    return kind


_Found = tuple[
    Callable[["Flat"], None],
    Callable[[Part], None] | None,
    tuple[str, ...],
    bool,
    tuple[bool, ...],
]


def _sgd_kind(group: Mapping[str, Any]) -> _Found | None:
    if group["dampening"]:
        return None
    flags = (bool(group["weight_decay"]), bool(group["momentum"]), bool(group["nesterov"]))
    return _sgd, _fused_sgd, ("momentum_buffer",) if flags[1] else (), False, flags


def _adam_kind(group: Mapping[str, Any]) -> _Found | None:
    decoupled = bool(group.get("decoupled_weight_decay"))
    flags = (bool(group["weight_decay"]), decoupled, bool(group["amsgrad"]))
    moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if flags[2] else ()))
    return _adam, _fused_adam, moments, True, flags


def _adamw_kind(group: Mapping[str, Any]) -> _Found | None:
    return _adam_kind({**group, "decoupled_weight_decay": True})


def _rmsprop_kind(group: Mapping[str, Any]) -> _Found | None:
    flags = (bool(group["weight_decay"]), bool(group["centered"]), bool(group["momentum"]))
    moments = ["square_avg"] + ["grad_avg"] * flags[1] + ["momentum_buffer"] * flags[2]
    return _rmsprop, None, tuple(moments), True, flags


def _adagrad_kind(group: Mapping[str, Any]) -> _Found | None:
    return _adagrad, _fused_adagrad, ("sum",), True, (bool(group["weight_decay"]),)


_RULES: dict[type, Callable[[Mapping[str, Any]], _Found | None]] = {
    torch.optim.SGD: _sgd_kind,
    torch.optim.Adam: _adam_kind,
    torch.optim.AdamW: _adamw_kind,
    torch.optim.RMSprop: _rmsprop_kind,
    torch.optim.Adagrad: _adagrad_kind,
}


def _fused_sgd(part: Part) -> None:
    torch._fused_sgd_(
        part.values,
        part.gradients,
        part.moments[0] if part.moments else [],  # of zeros, which is where a first step starts
        weight_decay=float(part.group["weight_decay"]),
        momentum=float(part.group["momentum"]),
        lr=float(part.group["lr"]),
        dampening=0.0,
        nesterov=part.flags[2],
        maximize=False,
        is_first_step=False,
    )


def _fused_adam(part: Part) -> None:
    _, decoupled, amsgrad = part.flags
    step = torch._fused_adamw_ if decoupled else torch._fused_adam_
    step(
        part.values,
        part.gradients,
        part.moments[0],
        part.moments[1],
        part.moments[2] if amsgrad else [],
        part.counts,
        lr=float(part.group["lr"]),
        beta1=float(part.group["betas"][0]),
        beta2=float(part.group["betas"][1]),
        weight_decay=float(part.group["weight_decay"]),
        eps=float(part.group["eps"]),
        amsgrad=amsgrad,
        maximize=False,
    )


def _fused_adagrad(part: Part) -> None:
    torch._fused_adagrad_(
        part.values,
        part.gradients,
        part.moments[0],
        part.counts,
        lr=float(part.group["lr"]),
        lr_decay=float(part.group["lr_decay"]),
        weight_decay=float(part.group["weight_decay"]),
        eps=float(part.group["eps"]),
        maximize=False,
    )


def _sgd(flat: Flat) -> None:
    decays, moves, nesterov = flat.kind.flags
    update = flat.gradient
    if decays:
        _add(update, flat.values, flat.hyper("weight_decay"))
    if moves:
        momentum = flat.hyper("momentum")
        buffer = flat.moments["momentum_buffer"].mul_(momentum).add_(update)
        update = _add(update, buffer, momentum) if nesterov else buffer
    _add(flat.values, update, flat.number("-lr", [-float(group["lr"]) for group in flat.groups]))


def _adam(flat: Flat) -> None:
    decays, decoupled, amsgrad = flat.kind.flags
    rates = [float(group["lr"]) for group in flat.groups]
    if decays and decoupled:
        decay = [float(group["weight_decay"]) for group in flat.groups]
        flat.values.mul_(flat.number("1-lr*wd", [1 - r * d for r, d in zip(rates, decay)]))
    elif decays:
        _add(flat.gradient, flat.values, flat.hyper("weight_decay"))
    first, second = flat.beta(0), flat.beta(1)
    mean = flat.moments["exp_avg"]
    mean.lerp_(flat.gradient, flat.number("1-beta1", [1 - beta for beta in first]))  # type: ignore[arg-type]
    square = flat.moments["exp_avg_sq"].mul_(flat.number("beta2", second))
    rest = flat.number("1-beta2", [1 - beta for beta in second])
    _add_product(square, flat.gradient, flat.gradient, rest)
    if amsgrad:
        square = torch.maximum(
            flat.moments["max_exp_avg_sq"], square, out=flat.moments["max_exp_avg_sq"]
        )
    root = flat.counted("root", lambda count, beta: (1 - beta**count) ** 0.5, second)
    size = flat.counted("size", lambda count, r, beta: -r / (1 - beta**count), rates, first)
    under = square.sqrt().div_(root).add_(flat.hyper("eps"))
    _add_quotient(flat.values, mean, under, size)


def _rmsprop(flat: Flat) -> None:
    decays, centered, moves = flat.kind.flags
    if decays:
        _add(flat.gradient, flat.values, flat.hyper("weight_decay"))
    rest = flat.number("1-alpha", [1 - float(group["alpha"]) for group in flat.groups])
    square = flat.moments["square_avg"].mul_(flat.hyper("alpha"))
    _add_product(square, flat.gradient, flat.gradient, rest)
    if centered:
        average = flat.moments["grad_avg"].lerp_(flat.gradient, rest)  # type: ignore[arg-type]
        square = square.addcmul(average, average, value=-1)
    under = square.sqrt().add_(flat.hyper("eps"))
    rate = flat.number("-lr", [-float(group["lr"]) for group in flat.groups])
    if moves:
        buffer = flat.moments["momentum_buffer"].mul_(flat.hyper("momentum"))
        _add(flat.values, buffer.addcdiv_(flat.gradient, under), rate)
    else:
        _add_quotient(flat.values, flat.gradient, under, rate)


def _adagrad(flat: Flat) -> None:
    if flat.kind.flags[0]:
        _add(flat.gradient, flat.values, flat.hyper("weight_decay"))
    lr, decay = ([float(group[name]) for group in flat.groups] for name in ("lr", "lr_decay"))
    rate = flat.counted("rate", lambda count, r, d: -r / (1 + (count - 1) * d), lr, decay)
    total = flat.moments["sum"].addcmul_(flat.gradient, flat.gradient)
    under = total.sqrt().add_(flat.hyper("eps"))
    _add_quotient(flat.values, flat.gradient, under, rate)


def _add(x: Tensor, y: Tensor, factor: Number) -> Tensor:
    """x += factor * y."""
    return x.addcmul_(y, factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def _add_product(x: Tensor, a: Tensor, b: Tensor, factor: Number) -> Tensor:
    """x += factor * a * b."""
    if isinstance(factor, Tensor):
        return x.addcmul_(a, b * factor)
    return x.addcmul_(a, b, value=factor)


def _add_quotient(x: Tensor, a: Tensor, b: Tensor, factor: Number) -> Tensor:
    """x += factor * a / b."""
    if isinstance(factor, Tensor):
        return x.addcdiv_(a * factor, b)
    return x.addcdiv_(a, b, value=factor)
