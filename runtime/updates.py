"""One optimizer step for all models: over flat tensors, with each model's own hyper-parameters.

The parameters of all models with one kind of optimizer lie end to end in one flat tensor, lane by
lane in the order of the packed leaves, which are views of it; so do the optimizer's moments. A step
is then a dozen operators, whatever the number of models and of parameters. Where a hyper-parameter
differs between models, it becomes a vector with an element a parameter element.

The formulas are those of `torch.optim` (its single-tensor functions), operation by operation. Each
model's own optimizer stays the owner: hyper-parameters are read from its `param_groups`, so that
schedulers work unchanged, and its `state` holds views of the flat moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.runtime.optimizers import Updater
from cgo.runtime.packing import rehome

Number = float | Tensor  # one for all models, or a vector with an element a parameter element
Leaf = tuple[Tensor, list[Tensor]]  # a packed leaf, and its lanes as the models' own parameters


class Updates:
    """The step of all models whose optimizers can be taken together."""

    def __init__(self, updaters: Mapping[ModelId, Updater], learning: Sequence[Leaf]) -> None:
        """Arrange parameters that have a gradient now; those of other models stay where they are.

        Args:
            updaters: Of the models that run.
            learning: The packed leaves that learn.
        """
        self._updaters = dict(updaters)
        self._learning = list(learning)
        self._rules = {model: _rule(updater) for model, updater in self._updaters.items()}
        self._plan = self._kinds()
        self._flats = self._arrange()

    def covers(self, model: ModelId) -> bool:
        """Whether `step` updates this model."""
        return self._plan.get(model) is not None

    def step(self, without: frozenset[ModelId] = frozenset()) -> None:
        """Clip, update, and step the schedulers that go by steps.

        Args:
            without: Models that stay as they are.
        """
        kinds = self._kinds()
        if kinds != self._plan or self._having_gradients() != self._arranged:
            self.sync()  # a scheduler changed what has to be computed, or a program what learns
            self._plan = kinds
            self._flats = self._arrange()
        with torch.no_grad():
            for flat in self._flats:
                flat.step(without)
        for model, updater in self._updaters.items():
            if self.covers(model):
                # What schedulers look at to warn of a missing optimizer step.
                updater.optimizer._opt_called = True  # type: ignore[attr-defined]
                updater.step_scheduler()

    def sync(self) -> None:
        """Write the number of steps into the optimizers' own states."""
        for flat in self._flats:
            flat.sync()

    def _kinds(self) -> dict[ModelId, _Kind | None]:
        return {
            model: None if rule is None else rule(self._updaters[model].optimizer.param_groups[0])
            for model, rule in self._rules.items()
        }

    def _having_gradients(self) -> list[bool]:
        return [leaf.grad is not None for leaf in self._leaves]

    def _arrange(self) -> list[_Flat]:
        owner = {
            id(parameter): model
            for model, updater in self._updaters.items()
            for parameter in updater.parameters
        }
        pieces: dict[_Kind, list[_Piece]] = {}
        packed: set[int] = set()
        self._leaves = [leaf for leaf, _ in self._learning]
        for leaf, own in self._learning:
            packed.update(map(id, own))
            if leaf.grad is None:
                continue
            models = [owner[id(parameter)] for parameter in own]
            kinds = [self._plan[model] for model in models]
            if kinds[0] is not None and len(set(kinds)) == 1:
                pieces.setdefault(kinds[0], []).append(_Piece(leaf, None, own, models))
                continue
            for lane, kind in enumerate(kinds):
                if kind is not None:
                    lanes, names = own[lane : lane + 1], models[lane : lane + 1]
                    pieces.setdefault(kind, []).append(_Piece(leaf, lane, lanes, names))
        for model, updater in self._updaters.items():
            kind = self._plan[model]
            for parameter in updater.parameters if kind is not None else ():
                if id(parameter) in packed:
                    continue
                self._leaves.append(parameter)
                if kind is not None and parameter.grad is not None:
                    alone = _Piece(parameter, None, [parameter], [model])
                    pieces.setdefault(kind, []).append(alone)
        self._arranged = self._having_gradients()
        return [_Flat(kind, found, self._updaters) for kind, found in pieces.items()]


@dataclass(frozen=True)
class _Kind:
    """What decides which operators a step needs; models of one kind take it together."""

    rule: Callable[[_Flat], None]
    moments: tuple[str, ...]  # names in the optimizer's state, shaped as the parameter
    steps: bool  # whether the optimizer counts steps
    flags: tuple[bool, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Piece:
    """A leaf, or one lane of a leaf whose other lanes are of other kinds."""

    leaf: Tensor
    lane: int | None  # None: all of it
    own: list[Tensor]  # the models' parameters, lane by lane
    models: list[ModelId]

    def gradient(self) -> Tensor:
        assert self.leaf.grad is not None
        return self.leaf.grad if self.lane is None else self.leaf.grad[self.lane]


class _Flat:
    """The parameters of one kind, end to end."""

    def __init__(
        self, kind: _Kind, pieces: Sequence[_Piece], updaters: Mapping[ModelId, Updater]
    ) -> None:
        self.kind, self.pieces = kind, list(pieces)
        self.models = list(dict.fromkeys(model for piece in pieces for model in piece.models))
        self.updaters = [updaters[model] for model in self.models]
        parameters = [parameter for piece in pieces for parameter in piece.own]
        self.parameters = parameters
        position = {model: index for index, model in enumerate(self.models)}
        self._positions = [position[model] for piece in pieces for model in piece.models]
        self._lengths = [parameter.numel() for parameter in parameters]
        with torch.no_grad():
            self.values = torch.cat([parameter.reshape(-1) for parameter in parameters])
            self.moments = {name: self._moment(name) for name in kind.moments}
        self.steps = [self._steps_of(updater) for updater in self.updaters]
        self.gradient = torch.empty_like(self.values)
        self.groups: list[dict[str, Any]] = []
        self._elements: Tensor | None = None  # of each element, its model's position
        self._vectors: dict[str, tuple[tuple[float, ...], Number]] = {}
        self._norms: Tensor | None = None
        self._copies = self._rehome()

    # --- arrangement ------------------------------------------------------------------------------

    def _state(self, index: int) -> dict[str, Any]:
        parameter = self.parameters[index]
        state: dict[str, Any] = self.updaters[self._positions[index]].optimizer.state[parameter]
        return state

    def _moment(self, name: str) -> Tensor:
        """One flat tensor of a moment, with what the optimizers have of it; they get views."""
        found = []
        for index, parameter in enumerate(self.parameters):
            value = self._state(index).get(name)
            value = torch.zeros_like(parameter) if value is None else value
            found.append(value.detach().reshape(-1))
        flat = torch.cat(found)
        for index, part in enumerate(flat.split(self._lengths)):
            self._state(index)[name] = part.view(self.parameters[index].shape)
        return flat

    def _steps_of(self, updater: Updater) -> int:
        for parameter in self.parameters:
            if (step := updater.optimizer.state.get(parameter, {}).get("step")) is not None:
                return int(step)
        return 0

    def _rehome(self) -> list[tuple[Tensor, Tensor]]:
        """Make leaves views of the flat values; returns the lanes that have to be copied back."""
        copies, start = [], 0
        for piece in self.pieces:
            stop = start + sum(parameter.numel() for parameter in piece.own)
            part = self.values[start:stop]
            start = stop
            if piece.lane is not None:
                copies.append((piece.leaf.detach()[piece.lane], part.view(piece.own[0].shape)))
                continue
            piece.leaf.data = part.view(piece.leaf.shape)
            if piece.own[0] is not piece.leaf:
                rehome(piece.own, piece.leaf)
        return copies

    def sync(self) -> None:
        if not self.kind.steps:
            return
        for index in range(len(self.parameters)):
            count = self.steps[self._positions[index]]
            fused = self.updaters[self._positions[index]].optimizer.param_groups[0].get("fused")
            device = self.values.device if fused else None  # where torch.optim keeps it
            self._state(index)["step"] = torch.tensor(float(count), device=device)

    # --- the step ---------------------------------------------------------------------------------

    def step(self, without: frozenset[ModelId]) -> None:
        torch.cat([piece.gradient().reshape(-1) for piece in self.pieces], out=self.gradient)
        self.groups = [updater.optimizer.param_groups[0] for updater in self.updaters]
        self._clip()
        self.steps = [count + 1 for count in self.steps]
        before = self.values.clone() if not without.isdisjoint(self.models) else None
        self.kind.rule(self)
        if before is not None:  # by selection: nothing times NaN is nothing
            stays = torch.tensor([m in without for m in self.models], device=self.values.device)
            torch.where(stays[self.elements], before, self.values, out=self.values)
        if self._copies:
            torch._foreach_copy_([lane for lane, _ in self._copies], [p for _, p in self._copies])

    @property
    def elements(self) -> Tensor:
        """Of each element, the position of its model."""
        if self._elements is None:
            positions = torch.tensor(self._positions, device=self.values.device)
            lengths = torch.tensor(self._lengths, device=self.values.device)
            self._elements = torch.repeat_interleave(positions, lengths)
        return self._elements

    def hyper(self, name: str) -> Number:
        """A hyper-parameter as the models' optimizers have it now."""
        return self.number(name, [float(group[name]) for group in self.groups])

    def number(self, name: str, values: Sequence[float]) -> Number:
        """One number for all models where they agree, else a vector over the elements."""
        if all(value == values[0] for value in values):
            return values[0]
        known = self._vectors.get(name)
        if known is None or known[0] != tuple(values):
            each = torch.tensor(values, dtype=self.values.dtype, device=self.values.device)
            known = self._vectors[name] = (tuple(values), each[self.elements])
        return known[1]

    def beta(self, which: int) -> list[float]:
        """The first or second beta of each model."""
        return [float(group["betas"][which]) for group in self.groups]

    def _clip(self) -> None:
        """As `clip_grad_norm_` for each model: the norm of its gradients' norms."""
        limits = [updater.training.grad_clip_norm for updater in self.updaters]
        if all(limit is None for limit in limits):
            return
        norms, start = [], 0
        for piece in self.pieces:
            stop = start + sum(parameter.numel() for parameter in piece.own)
            part = self.gradient[start:stop].view(len(piece.own), -1)
            norms.append(torch.linalg.vector_norm(part, dim=1))
            start = stop
        if self._norms is None:
            self._norms = _table(self._positions, len(self.models)).to(self.values.device)
        padded = torch.cat([*norms, torch.zeros_like(norms[0][:1])])
        total = torch.linalg.vector_norm(padded[self._norms], dim=1)
        given = {"dtype": total.dtype, "device": total.device}
        most = torch.tensor([float("inf") if m is None else m for m in limits], **given)
        factor = torch.clamp(most / (total + 1e-6), max=1.0)
        clipped = torch.tensor([limit is not None for limit in limits], device=total.device)
        self.gradient.mul_(torch.where(clipped, factor, 1.0)[self.elements])


def _table(positions: Sequence[int], models: int) -> Tensor:
    """Of each model, which of the norms are its own; filled up with the index behind the last."""
    rows: list[list[int]] = [[] for _ in range(models)]
    for index, position in enumerate(positions):
        rows[position].append(index)
    width = max(map(len, rows))
    return torch.tensor([row + [len(positions)] * (width - len(row)) for row in rows])


# --- which optimizers, and their formulas ---------------------------------------------------------


def _rule(updater: Updater) -> Callable[[Mapping[str, Any]], _Kind | None] | None:
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

    def kind(group: Mapping[str, Any]) -> _Kind | None:
        parts = found(group)
        return None if parts is None else _Kind(*parts, dtype)

    return kind


_Found = tuple[Callable[[_Flat], None], tuple[str, ...], bool, tuple[bool, ...]]


def _sgd_kind(group: Mapping[str, Any]) -> _Found | None:
    if group["dampening"]:
        return None
    flags = (bool(group["weight_decay"]), bool(group["momentum"]), bool(group["nesterov"]))
    return _sgd, ("momentum_buffer",) if flags[1] else (), False, flags


def _adam_kind(group: Mapping[str, Any]) -> _Found | None:
    decoupled = bool(group.get("decoupled_weight_decay"))
    flags = (bool(group["weight_decay"]), decoupled, bool(group["amsgrad"]))
    moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if flags[2] else ()))
    return _adam, moments, True, flags


def _adamw_kind(group: Mapping[str, Any]) -> _Found | None:
    return _adam_kind({**group, "decoupled_weight_decay": True})


def _rmsprop_kind(group: Mapping[str, Any]) -> _Found | None:
    flags = (bool(group["weight_decay"]), bool(group["centered"]), bool(group["momentum"]))
    moments = ["square_avg"] + ["grad_avg"] * flags[1] + ["momentum_buffer"] * flags[2]
    return _rmsprop, tuple(moments), True, flags


def _adagrad_kind(group: Mapping[str, Any]) -> _Found | None:
    return _adagrad, ("sum",), True, (bool(group["weight_decay"]),)


_RULES: dict[type, Callable[[Mapping[str, Any]], _Found | None]] = {
    torch.optim.SGD: _sgd_kind,
    torch.optim.Adam: _adam_kind,
    torch.optim.AdamW: _adamw_kind,
    torch.optim.RMSprop: _rmsprop_kind,
    torch.optim.Adagrad: _adagrad_kind,
}


def _sgd(flat: _Flat) -> None:
    decays, moves, nesterov = flat.kind.flags
    update = flat.gradient
    if decays:
        _add(update, flat.values, flat.hyper("weight_decay"))
    if moves:
        momentum = flat.hyper("momentum")
        buffer = flat.moments["momentum_buffer"].mul_(momentum).add_(update)
        update = _add(update, buffer, momentum) if nesterov else buffer
    _add(flat.values, update, flat.number("-lr", [-float(group["lr"]) for group in flat.groups]))


def _adam(flat: _Flat) -> None:
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
    root = [(1 - beta**count) ** 0.5 for beta, count in zip(second, flat.steps)]
    size = [-r / (1 - beta**count) for r, beta, count in zip(rates, first, flat.steps)]
    under = square.sqrt().div_(flat.number("root", root)).add_(flat.hyper("eps"))
    _add_quotient(flat.values, mean, under, flat.number("size", size))


def _rmsprop(flat: _Flat) -> None:
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


def _adagrad(flat: _Flat) -> None:
    if flat.kind.flags[0]:
        _add(flat.gradient, flat.values, flat.hyper("weight_decay"))
    rates = [
        -float(group["lr"]) / (1 + (count - 1) * float(group["lr_decay"]))
        for group, count in zip(flat.groups, flat.steps)
    ]
    total = flat.moments["sum"].addcmul_(flat.gradient, flat.gradient)
    under = total.sqrt().add_(flat.hyper("eps"))
    _add_quotient(flat.values, flat.gradient, under, flat.number("rate", rates))


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
