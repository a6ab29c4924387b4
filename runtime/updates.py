"""One optimizer step for all models: over flat tensors, with each model's own hyper-parameters.

The parameters of all models with one kind of optimizer lie end to end in one flat tensor, lane by
lane in the order of the packed leaves, which are views of it; so do the optimizer's moments. A step
is then one of torch's fused kernels for each set of models whose hyper-parameters agree (on a CPU),
or a dozen operators over everything; there, a hyper-parameter that differs between models becomes a
vector with an element a parameter element.

The formulas are those of `torch.optim`, operation by operation (`cgo.runtime.steps`). Each model's
own optimizer stays the owner: hyper-parameters are read from its `param_groups`, so that
schedulers work unchanged, and its `state` holds views of the flat moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.runtime.optimizers import Updater
from cgo.runtime.packing import rehome
from cgo.runtime.steps import Kind, Number, Part, kind_rule

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
        self._rules = {model: kind_rule(updater) for model, updater in self._updaters.items()}
        self._hyper = self._hyper_parameters()
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
        kinds, hyper = self._plan, self._hyper_parameters()
        if hyper != self._hyper:
            self._hyper, kinds = hyper, self._kinds()
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

    def _kinds(self) -> dict[ModelId, Kind | None]:
        return {
            model: None if rule is None else rule(self._updaters[model].optimizer.param_groups[0])
            for model, rule in self._rules.items()
        }

    def _hyper_parameters(self) -> list[list[Any]]:
        groups = [updater.optimizer.param_groups[0] for updater in self._updaters.values()]
        return [[value for key, value in group.items() if key != "params"] for group in groups]

    def _having_gradients(self) -> list[bool]:
        return [leaf.grad is not None for leaf in self._leaves]

    def _arrange(self) -> list[Flat]:
        owner = {
            id(parameter): model
            for model, updater in self._updaters.items()
            for parameter in updater.parameters
        }
        pieces: dict[Kind, list[Piece]] = {}
        packed: set[int] = set()
        self._leaves = [leaf for leaf, _ in self._learning]
        for leaf, own in self._learning:
            packed.update(map(id, own))
            if leaf.grad is None:
                continue
            models = [owner[id(parameter)] for parameter in own]
            kinds = [self._plan[model] for model in models]
            if kinds[0] is not None and len(set(kinds)) == 1:
                pieces.setdefault(kinds[0], []).append(Piece(leaf, None, own, models))
                continue
            for lane, kind in enumerate(kinds):
                if kind is not None:
                    lanes, names = own[lane : lane + 1], models[lane : lane + 1]
                    pieces.setdefault(kind, []).append(Piece(leaf, lane, lanes, names))
        for model, updater in self._updaters.items():
            kind = self._plan[model]
            for parameter in updater.parameters if kind is not None else ():
                if id(parameter) in packed:
                    continue
                self._leaves.append(parameter)
                if kind is not None and parameter.grad is not None:
                    alone = Piece(parameter, None, [parameter], [model])
                    pieces.setdefault(kind, []).append(alone)
        self._arranged = self._having_gradients()
        return [Flat(kind, found, self._updaters) for kind, found in pieces.items()]


@dataclass(frozen=True)
class Piece:
    """A leaf, or one lane of a leaf whose other lanes are of other kinds."""

    leaf: Tensor
    lane: int | None  # None: all of it
    own: list[Tensor]  # the models' parameters, lane by lane
    models: list[ModelId]

    def gradient(self) -> Tensor:
        """This step's, a row for each lane."""
        assert self.leaf.grad is not None
        gradient = self.leaf.grad if self.lane is None else self.leaf.grad[self.lane]
        return gradient.reshape(len(self.own), -1)


class Flat:
    """The parameters of one kind, end to end."""

    def __init__(
        self, kind: Kind, pieces: Sequence[Piece], updaters: Mapping[ModelId, Updater]
    ) -> None:
        self.kind, self.pieces = kind, list(pieces)
        self.models = list(dict.fromkeys(model for piece in pieces for model in piece.models))
        self.updaters = [updaters[model] for model in self.models]
        parameters = [parameter for piece in pieces for parameter in piece.own]
        self.parameters = parameters
        position = {model: index for index, model in enumerate(self.models)}
        self._positions = [position[model] for piece in pieces for model in piece.models]
        self._own: list[list[int]] = [[] for _ in self.models]  # which parameters are a model's
        for index, owner in enumerate(self._positions):
            self._own[owner].append(index)
        self._lengths = [parameter.numel() for parameter in parameters]
        with torch.no_grad():
            self.values = torch.cat([parameter.reshape(-1) for parameter in parameters])
            self.moments = {name: self._moment(name) for name in kind.moments}
        self.steps = [self._steps_of(updater) for updater in self.updaters]
        self.gradient: Tensor  # within a step that goes over flat tensors
        self._order = torch.tensor(self._positions, device=self.values.device)
        self.groups: list[dict[str, Any]] = []
        self._elements: Tensor | None = None  # of each element, its model's position
        self._vectors: dict[str, tuple[tuple[float, ...], Number]] = {}
        self._norms: Tensor | None = None
        self._copies = self._rehome()
        self._parts: dict[int | None, Part] = {}  # by the model's position; None: of all models

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
        """Write the number of steps into the optimizers' own states."""
        if not self.kind.steps:
            return
        for index in range(len(self.parameters)):
            count = self.steps[self._positions[index]]
            fused = self.updaters[self._positions[index]].optimizer.param_groups[0].get("fused")
            device = self.values.device if fused else None  # where torch.optim keeps it
            self._state(index)["step"] = torch.tensor(float(count), device=device)

    # --- the step ---------------------------------------------------------------------------------

    def step(self, without: frozenset[ModelId]) -> None:
        """Clip and update all models but some."""
        gradients = [piece.gradient() for piece in self.pieces]
        self.groups = [updater.optimizer.param_groups[0] for updater in self.updaters]
        gradients = self._clipped(gradients)
        self.steps = [count + 1 for count in self.steps]
        if self.kind.fused is not None and self.values.device.type == "cpu":
            self._fused_step(gradients, without)
        else:
            self._flat_step(gradients, without)
        if self._copies:
            torch._foreach_copy_([lane for lane, _ in self._copies], [p for _, p in self._copies])

    def _flat_step(self, gradients: Sequence[Tensor], without: frozenset[ModelId]) -> None:
        self.gradient = torch.cat([rows.flatten() for rows in gradients])
        before = self.values.clone() if not without.isdisjoint(self.models) else None
        self.kind.rule(self)
        del self.gradient  # or it would be there until the next step, beside all activations
        if before is not None:  # by selection: nothing times NaN is nothing
            stays = torch.tensor([m in without for m in self.models], device=self.values.device)
            torch.where(stays[self.elements], before, self.values, out=self.values)

    def _fused_step(self, gradients: Sequence[Tensor], without: frozenset[ModelId]) -> None:
        # Lane by lane even where all agree: a lane's last elements are computed in another way than
        # the others, and which these are must not depend on its neighbours.
        lanes = [lane for rows in gradients for lane in rows.unbind(0)]
        if without.isdisjoint(self.models) and self._agree():
            self._take(None, lanes)
            return
        for position, model in enumerate(self.models):
            if model not in without:
                own = [lanes[index] for index in self._own[position]]
                self._take(position, own)

    def _take(self, position: int | None, gradients: list[Tensor]) -> None:
        assert self.kind.fused is not None
        part = self._part(position, gradients)
        self.kind.fused(part)
        part.gradients = []  # or they would be there until the next step, beside all activations

    def _agree(self) -> bool:
        """Whether all models' hyper-parameters and counts of steps are equal."""
        first, count = self.groups[0], self.steps[0]
        keys = [key for key in first if key not in ("params", "initial_lr")]
        return all(steps == count for steps in self.steps) and all(
            group.get(key) == first[key] for group in self.groups[1:] for key in keys
        )

    def _part(self, position: int | None, gradients: list[Tensor]) -> Part:
        part = self._parts.get(position)
        if part is None:
            part = self._parts[position] = self._make_part(position)
        part.gradients, part.group = gradients, self.groups[position or 0]
        if self.kind.steps:
            part.count.fill_(self.steps[position or 0])
        return part

    def _make_part(self, position: int | None) -> Part:
        flats = [self.values, *(self.moments[name] for name in self.kind.moments)]
        own = range(len(self.parameters)) if position is None else self._own[position]
        split = [flat.split(self._lengths) for flat in flats]
        values, *moments = ([parts[index] for index in own] for parts in split)
        count = torch.zeros((), device=self.values.device)
        return Part(values, moments, [], {}, self.kind.flags, count)

    @property
    def elements(self) -> Tensor:
        """Of each element, the position of its model."""
        if self._elements is None:
            lengths = torch.tensor(self._lengths, device=self.values.device)
            # With the size known, the device need not be asked for it.
            size = self.values.numel()
            self._elements = torch.repeat_interleave(self._order, lengths, output_size=size)
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

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        """As `clip_grad_norm_` for each model: the norm of its gradients' norms."""
        limits = [updater.training.grad_clip_norm for updater in self.updaters]
        if all(limit is None for limit in limits):
            return gradients
        norms = [torch.linalg.vector_norm(rows, dim=1) for rows in gradients]
        if self._norms is None:
            self._norms = _table(self._own, len(self._positions)).to(self.values.device)
        padded = torch.cat([*norms, torch.zeros_like(norms[0][:1])])
        total = torch.linalg.vector_norm(padded[self._norms], dim=1)
        given = {"dtype": total.dtype, "device": total.device}
        most = torch.tensor([float("inf") if m is None else m for m in limits], **given)
        factor = torch.clamp(most / (total + 1e-6), max=1.0)
        clipped = torch.tensor([limit is not None for limit in limits], device=total.device)
        factor = torch.where(clipped, factor, 1.0)[self._order]
        own = factor.split([len(rows) for rows in gradients])
        return [rows * factors.unsqueeze(1) for rows, factors in zip(gradients, own)]


def _table(rows: Sequence[Sequence[int]], last: int) -> Tensor:
    """Of each model, which of the norms are its own; filled up with the index behind the last."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[last] * (width - len(row))] for row in rows])
