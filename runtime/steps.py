"""Which optimizers a step is taken for together, and their formulas.

The formulas are those of `torch.optim`, operation by operation: its fused kernels on a CPU, which
pass over memory once, and its single-tensor functions over flat tensors elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cgo.private import fused_steps
from cgo.runtime.optimizers import Updater

if TYPE_CHECKING:
    from cgo.runtime.flat import Flat

Number = float | Tensor  # one for all models, or a vector with an element a parameter element
Groups = Sequence[Mapping[str, Any]]  # each model's parameter group
Numbers = dict[str, list[float]]  # by name, one for each model


@dataclass(frozen=True)
class Kind:
    """What decides which operators a step needs; models of one kind take it together."""

    rule: Callable[[Flat], None]
    numbers: Callable[[Groups, Sequence[int], tuple[bool, ...]], Numbers]  # that the rule reads
    fused: Callable[[Part], None] | None  # the step as one kernel; None where torch has none
    everywhere: bool  # that kernel takes tensors for rates and counts, on every device
    moments: tuple[str, ...]  # names in the optimizer's state, shaped as the parameter
    steps: bool  # whether the optimizer counts steps
    flags: tuple[bool, ...]
    dtype: torch.dtype

    @property
    def on_device(self) -> bool:
        """Whether there is a kernel that reads rates and counts from the device, as float32."""
        return self.everywhere and self.dtype is not torch.float64

    @property
    def by_rows(self) -> bool:
        """Whether a CPU takes the step by `cgo.runtime.rows`."""
        return self.rule is _sgd and self.dtype in (torch.float32, torch.float64)


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
    rate: Tensor | None = None  # the learning rate on the device; None: the group's
    skip: Tensor | None = None  # 1.0 where all is to stay as it is

    @property
    def counts(self) -> list[Tensor]:
        """The number of steps, for each parameter."""
        return [self.count] * len(self.values)

    @property
    def lr(self) -> Number:
        """The learning rate."""
        return float(self.group["lr"]) if self.rate is None else self.rate


def settings(group: Mapping[str, Any]) -> list[Any]:
    """The hyper-parameters that are no rates: kernels have them as numbers of Python's."""
    return [v for key, v in group.items() if key not in ("params", "lr", "initial_lr")]


def kind_rule(updater: Updater) -> Callable[[Mapping[str, Any]], Kind | None] | None:
    """What gives the kind of the model's step from its parameter group, or None where it is none.

    The kind can change with the group's settings, but not with its rate; whether there is one at
    all cannot.
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
        if parts is None:
            return None
        made = Kind(*parts, dtype)
        # Kernels have betas and momentum as numbers of Python's; a schedule of them needs tensors.
        cycles = getattr(updater.scheduler, "cycle_momentum", False)
        return replace(made, everywhere=False) if cycles else made

    return kind


_Found = tuple[
    Callable[["Flat"], None],
    Callable[[Groups, Sequence[int], tuple[bool, ...]], Numbers],
    Callable[[Part], None] | None,
    bool,
    tuple[str, ...],
    bool,
    tuple[bool, ...],
]


def _sgd_kind(group: Mapping[str, Any]) -> _Found | None:
    if group["dampening"]:
        return None
    flags = (bool(group["weight_decay"]), bool(group["momentum"]), bool(group["nesterov"]))
    moments = ("momentum_buffer",) if flags[1] else ()
    return _sgd, _sgd_numbers, _fused_sgd, True, moments, False, flags


def _adam_kind(group: Mapping[str, Any]) -> _Found | None:
    decoupled = bool(group.get("decoupled_weight_decay"))
    flags = (bool(group["weight_decay"]), decoupled, bool(group["amsgrad"]))
    moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if flags[2] else ()))
    return _adam, _adam_numbers, _fused_adam, True, moments, True, flags


def _adamw_kind(group: Mapping[str, Any]) -> _Found | None:
    return _adam_kind({**group, "decoupled_weight_decay": True})


def _rmsprop_kind(group: Mapping[str, Any]) -> _Found | None:
    flags = (bool(group["weight_decay"]), bool(group["centered"]), bool(group["momentum"]))
    moments = ["square_avg"] + ["grad_avg"] * flags[1] + ["momentum_buffer"] * flags[2]
    return _rmsprop, _rmsprop_numbers, None, False, tuple(moments), True, flags


def _adagrad_kind(group: Mapping[str, Any]) -> _Found | None:
    flags = (bool(group["weight_decay"]),)
    return _adagrad, _adagrad_numbers, _fused_adagrad, False, ("sum",), True, flags


_RULES: dict[type, Callable[[Mapping[str, Any]], _Found | None]] = {
    torch.optim.SGD: _sgd_kind,
    torch.optim.Adam: _adam_kind,
    torch.optim.AdamW: _adamw_kind,
    torch.optim.RMSprop: _rmsprop_kind,
    torch.optim.Adagrad: _adagrad_kind,
}


def _fused_sgd(part: Part) -> None:
    fused_steps.sgd_(
        part.values,
        part.gradients,
        part.moments[0] if part.moments else [],  # of zeros, which is where a first step starts
        weight_decay=float(part.group["weight_decay"]),
        momentum=float(part.group["momentum"]),
        lr=part.lr,  # type: ignore[arg-type]
        dampening=0.0,
        nesterov=part.flags[2],
        maximize=False,
        is_first_step=False,
        found_inf=part.skip,
    )


def _fused_adam(part: Part) -> None:
    _, decoupled, amsgrad = part.flags
    step = fused_steps.adamw_ if decoupled else fused_steps.adam_
    step(
        part.values,
        part.gradients,
        part.moments[0],
        part.moments[1],
        part.moments[2] if amsgrad else [],
        part.counts,
        lr=part.lr,  # type: ignore[arg-type]
        beta1=float(part.group["betas"][0]),
        beta2=float(part.group["betas"][1]),
        weight_decay=float(part.group["weight_decay"]),
        eps=float(part.group["eps"]),
        amsgrad=amsgrad,
        maximize=False,
        found_inf=part.skip,
    )


def _fused_adagrad(part: Part) -> None:
    fused_steps.adagrad_(
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


def _each(groups: Groups, name: str) -> list[float]:
    return [float(group[name]) for group in groups]


def _minus(values: Sequence[float]) -> list[float]:
    return [-value for value in values]


def _rest(values: Sequence[float]) -> list[float]:
    return [1 - value for value in values]


def _sgd_numbers(groups: Groups, steps: Sequence[int], flags: tuple[bool, ...]) -> Numbers:
    found = {"-lr": _minus(_each(groups, "lr"))}
    if flags[0]:
        found["weight_decay"] = _each(groups, "weight_decay")
    if flags[1]:
        found["momentum"] = _each(groups, "momentum")
    return found


def _sgd(flat: Flat) -> None:
    decays, moves, nesterov = flat.kind.flags
    update = flat.gradient
    if decays:
        _add(update, flat.values, flat.numbers["weight_decay"])
    if moves:
        momentum = flat.numbers["momentum"]
        buffer = flat.moments["momentum_buffer"].mul_(momentum).add_(update)
        update = _add(update, buffer, momentum) if nesterov else buffer
    _add(flat.values, update, flat.numbers["-lr"])


def _adam_numbers(groups: Groups, steps: Sequence[int], flags: tuple[bool, ...]) -> Numbers:
    rates = _each(groups, "lr")
    first, second = ([float(group["betas"][i]) for group in groups] for i in range(2))
    found = {
        "1-beta1": _rest(first),
        "beta2": second,
        "1-beta2": _rest(second),
        "eps": _each(groups, "eps"),
        "root": [(1 - beta**count) ** 0.5 for beta, count in zip(second, steps)],
        "size": [-r / (1 - beta**count) for r, beta, count in zip(rates, first, steps)],
    }
    if flags[0]:
        decay = _each(groups, "weight_decay")
        found["decay"] = [1 - r * d for r, d in zip(rates, decay)] if flags[1] else decay
    return found


def _adam(flat: Flat) -> None:
    decays, decoupled, amsgrad = flat.kind.flags
    numbers = flat.numbers
    if decays and decoupled:
        flat.values.mul_(numbers["decay"])
    elif decays:
        _add(flat.gradient, flat.values, numbers["decay"])
    mean = flat.moments["exp_avg"]
    mean.lerp_(flat.gradient, numbers["1-beta1"])  # type: ignore[arg-type]
    square = flat.moments["exp_avg_sq"].mul_(numbers["beta2"])
    _add_product(square, flat.gradient, flat.gradient, numbers["1-beta2"])
    if amsgrad:
        square = torch.maximum(
            flat.moments["max_exp_avg_sq"], square, out=flat.moments["max_exp_avg_sq"]
        )
    under = square.sqrt().div_(numbers["root"]).add_(numbers["eps"])
    _add_quotient(flat.values, mean, under, numbers["size"])


def _rmsprop_numbers(groups: Groups, steps: Sequence[int], flags: tuple[bool, ...]) -> Numbers:
    names = ["eps", "alpha"] + ["weight_decay"] * flags[0] + ["momentum"] * flags[2]
    found = {name: _each(groups, name) for name in names}
    return found | {"1-alpha": _rest(found["alpha"]), "-lr": _minus(_each(groups, "lr"))}


def _rmsprop(flat: Flat) -> None:
    decays, centered, moves = flat.kind.flags
    numbers = flat.numbers
    if decays:
        _add(flat.gradient, flat.values, numbers["weight_decay"])
    square = flat.moments["square_avg"].mul_(numbers["alpha"])
    _add_product(square, flat.gradient, flat.gradient, numbers["1-alpha"])
    if centered:
        average = flat.moments["grad_avg"].lerp_(flat.gradient, numbers["1-alpha"])  # type: ignore[arg-type]
        square = square.addcmul(average, average, value=-1)
    under = square.sqrt().add_(numbers["eps"])
    if moves:
        buffer = flat.moments["momentum_buffer"].mul_(numbers["momentum"])
        _add(flat.values, buffer.addcdiv_(flat.gradient, under), numbers["-lr"])
    else:
        _add_quotient(flat.values, flat.gradient, under, numbers["-lr"])


def _adagrad_numbers(groups: Groups, steps: Sequence[int], flags: tuple[bool, ...]) -> Numbers:
    rates, decays = _each(groups, "lr"), _each(groups, "lr_decay")
    found = {
        "eps": _each(groups, "eps"),
        "rate": [-r / (1 + (count - 1) * d) for r, d, count in zip(rates, decays, steps)],
    }
    return found | ({"weight_decay": _each(groups, "weight_decay")} if flags[0] else {})


def _adagrad(flat: Flat) -> None:
    if flat.kind.flags[0]:
        _add(flat.gradient, flat.values, flat.numbers["weight_decay"])
    total = flat.moments["sum"].addcmul_(flat.gradient, flat.gradient)
    under = total.sqrt().add_(flat.numbers["eps"])
    _add_quotient(flat.values, flat.gradient, under, flat.numbers["rate"])


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
