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

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.runtime.accelerator import Accelerator
from cgo.runtime.optimizers import Updater
from cgo.runtime.packing import rehome
from cgo.runtime.scaling import Scaling
from cgo.runtime.steps import Kind, Number, Part, kind_rule

#: Numbers of arrangements, so that none is taken for another's.
_VERSIONS = itertools.count()

Leaf = tuple[Tensor, list[Tensor]]  # a packed leaf, and its lanes as the models' own parameters


class Updates:
    """The step of all models whose optimizers can be taken together."""

    def __init__(
        self,
        updaters: Mapping[ModelId, Updater],
        learning: Sequence[Leaf],
        accelerator: Accelerator | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        """Arrange parameters that have a gradient now; those of other models stay where they are.

        Args:
            updaters: Of the models that run.
            learning: The packed leaves that learn.
            accelerator: Where rates and counts of steps lie as tensors, so that `apply` can be
                captured; None: they are Python's.
            scaling: Knows of models whose scaled gradients have overflowed: they stay as they are.
        """
        self.version = next(_VERSIONS)  # of the arrangement
        self._updaters = dict(updaters)
        self._accelerator, self._scaling = accelerator, scaling
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
        self.prepare(without)
        self.apply()
        self.finish()

    def prepare(self, without: frozenset[ModelId] = frozenset()) -> None:
        """Read the models' hyper-parameters, and arrange anew what they or gradients ask for."""
        kinds, hyper = self._plan, self._hyper_parameters()
        if hyper != self._hyper:
            self._hyper, kinds = hyper, self._kinds()
        if kinds != self._plan or self._having_gradients() != self._arranged:
            self.sync()  # a scheduler changed what has to be computed, or a program what learns
            self._plan = kinds
            self._flats = self._arrange()
            self.version = next(_VERSIONS)
        for flat in self._flats:
            flat.prepare(without)

    def prepare_again(self) -> bool:
        """As `prepare`, before a captured `apply` is replayed; False if it must be eager again."""
        if (hyper := self._hyper_parameters()) != self._hyper:
            if self._kinds() != self._plan:
                return False
            self._hyper = hyper
        for flat in self._flats:
            flat.prepare(frozenset())
        return True

    def unprepare(self) -> None:
        """Take `prepare_again` back, where no step follows it."""
        for flat in self._flats:
            flat.steps = [count - 1 for count in flat.steps]

    @property
    def signature(self) -> list[Any]:
        """What a captured `apply` holds for: the arrangement, and numbers that are Python's."""
        return [self.version, *(flat.baked for flat in self._flats)]

    def apply(self) -> None:
        """Clip and update, by what was prepared: work of the device alone."""
        with torch.no_grad():
            for flat in self._flats:
                flat.apply()

    def finish(self) -> None:
        """Step the schedulers that go by steps."""
        for model, updater in self._updaters.items():
            if self.covers(model):
                # What schedulers look at to warn of a missing optimizer step.
                updater.optimizer._opt_called = True  # type: ignore[attr-defined]
                updater.step_scheduler()

    def without_kernels(self) -> None:
        """Leave out kernels, which allocate nothing, where only memory is looked at."""
        for flat in self._flats:
            if flat.kind.on_device:
                flat.kind = replace(flat.kind, fused=lambda part: None)

    def sync(self) -> None:
        """Write the number of steps into the optimizers' own states."""
        for flat in self._flats:
            flat.sync()

    def _kinds(self) -> dict[ModelId, Kind | None]:
        found = {
            model: None if rule is None else rule(self._updaters[model].optimizer.param_groups[0])
            for model, rule in self._rules.items()
        }
        if self._accelerator is None or self._scaling is None:
            return found
        # Whether a step was left out is known on the device alone: only kernels can count there.
        scaled = {model for model in found if self._scaling.covers([model])}
        return {m: k if m not in scaled or (k and k.on_device) else None for m, k in found.items()}

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
        return [
            Flat(kind, found, self._updaters, self._accelerator, self._scaling)
            for kind, found in pieces.items()
        ]


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
        self,
        kind: Kind,
        pieces: Sequence[Piece],
        updaters: Mapping[ModelId, Updater],
        accelerator: Accelerator | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self.kind, self.pieces = kind, list(pieces)
        self._accelerator = accelerator
        self.models = list(dict.fromkeys(model for piece in pieces for model in piece.models))
        self.updaters = [updaters[model] for model in self.models]
        self._scaling = scaling if scaling is not None and scaling.covers(self.models) else None
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
        self.numbers: dict[str, Number] = {}  # that the rule reads
        self._vectors: dict[str, tuple[tuple[float, ...], Tensor]] = {}
        self._without: frozenset[ModelId] = frozenset()
        self._norms: Tensor | None = None
        self._limits: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            count = torch.tensor(self.steps, dtype=torch.float32, device=self.values.device)
        self.counts = count  # of steps, on the device; of each model
        self.rates = torch.zeros(len(self.models), device=self.values.device)
        self._known_rates: list[float] | None = None
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
        if self._accelerator is not None and self._by_kernels:
            self.steps = [int(count) for count in self.counts.tolist()]
        for index in range(len(self.parameters)):
            count = self.steps[self._positions[index]]
            fused = self.updaters[self._positions[index]].optimizer.param_groups[0].get("fused")
            device = self.values.device if fused else None  # where torch.optim keeps it
            self._state(index)["step"] = torch.tensor(float(count), device=device)

    # --- the step ---------------------------------------------------------------------------------

    def prepare(self, without: frozenset[ModelId]) -> None:
        """Read hyper-parameters, and count a step."""
        if self._scaling is not None and self._accelerator is None:
            without |= self._scaling.overflowed()
        self._without = without
        self.groups = [updater.optimizer.param_groups[0] for updater in self.updaters]
        self.steps = [n + (m not in without) for n, m in zip(self.steps, self.models)]
        if self._by_kernels:
            rates = [float(group["lr"]) for group in self.groups]
            if self._accelerator is not None and rates != self._known_rates:
                self._known_rates = rates
                self._accelerator.upload(rates, self.rates)
            return
        counts = [max(1, count) for count in self.steps]  # 0 where the first step is left out
        found = self.kind.numbers(self.groups, counts, self.kind.flags)
        self.numbers = {name: self._number(name, values) for name, values in found.items()}

    @property
    def _by_kernels(self) -> bool:
        """Whether the step is torch's fused kernels; else it is operators over flat tensors."""
        if self._accelerator is not None:  # where kernels take rates as float32
            return self.kind.on_device
        return self.kind.fused is not None and self.values.device.type == "cpu"

    @property
    def baked(self) -> list[Any]:
        """The hyper-parameters that a captured `apply` has as numbers of Python's."""
        if not self._by_kernels:
            return []
        groups = [updater.optimizer.param_groups[0] for updater in self.updaters]
        skipped = ("params", "lr", "initial_lr")
        return [[v for key, v in group.items() if key not in skipped] for group in groups]

    def apply(self) -> None:
        """Clip and update all models but some."""
        gradients = self._clipped([piece.gradient() for piece in self.pieces])
        if self._by_kernels and self._accelerator is not None:
            self._device_step(gradients)
        elif self._by_kernels:
            self._fused_step(gradients, self._without)
        else:
            self._flat_step(gradients, self._without)
        if self._copies:
            torch._foreach_copy_([lane for lane, _ in self._copies], [p for _, p in self._copies])

    def _device_step(self, gradients: Sequence[Tensor]) -> None:
        """A kernel for each model, with its rate and its count of steps from the device."""
        assert self.kind.fused is not None
        self.counts.add_(1)
        overflown = None
        if self._scaling is not None:
            overflown = self._scaling.overflow(self.models).float()
            self.counts.sub_(overflown)
        lanes = [lane for rows in gradients for lane in rows.unbind(0)]
        for position, model in enumerate(self.models):
            if model not in self._without:
                part = self._parts.get(position)
                if part is None:
                    part = self._parts[position] = self._make_part(position)
                    part.count, part.rate = self.counts[position], self.rates[position]
                part.gradients = [lanes[index] for index in self._own[position]]
                part.group = self.groups[position]
                part.skip = None if overflown is None else overflown[position]
                self.kind.fused(part)
                part.gradients = []

    def _flat_step(self, gradients: Sequence[Tensor], without: frozenset[ModelId]) -> None:
        self.gradient = torch.cat([rows.flatten() for rows in gradients])
        flats = [] if without.isdisjoint(self.models) else [self.values, *self.moments.values()]
        before = [flat.clone() for flat in flats]
        self.kind.rule(self)
        del self.gradient  # or it would be there until the next step, beside all activations
        if not flats:
            return
        stays = torch.tensor([m in without for m in self.models], device=self.values.device)
        for flat, kept in zip(flats, before):  # by selection: nothing times NaN is nothing
            torch.where(stays[self.elements], kept, flat, out=flat)

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

    def _number(self, name: str, values: Sequence[float]) -> Number:
        """One number for all models where they agree, else a vector over the elements.

        On an accelerator it is always a vector, and always the same tensor.
        """
        if self._accelerator is None and all(value == values[0] for value in values):
            return values[0]
        known = self._vectors.get(name)
        if known is not None and known[0] == tuple(values):
            return known[1]
        each = torch.empty(len(values), dtype=self.values.dtype, device=self.values.device)
        if self._accelerator is None:
            vector = each.copy_(torch.tensor(values, dtype=each.dtype))[self.elements]
        else:
            self._accelerator.upload(values, each)
            vector = each[self.elements] if known is None else known[1].copy_(each[self.elements])
        self._vectors[name] = tuple(values), vector
        return vector

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        """As `clip_grad_norm_` for each model: the norm of its gradients' norms."""
        limits = [updater.training.grad_clip_norm for updater in self.updaters]
        if all(limit is None for limit in limits):
            return gradients
        norms = [torch.linalg.vector_norm(rows, dim=1) for rows in gradients]
        if self._norms is None or self._limits is None:
            self._norms = _table(self._own, len(self._positions)).to(self.values.device)
            given = {"dtype": norms[0].dtype, "device": norms[0].device}
            most = torch.tensor([float("inf") if m is None else m for m in limits], **given)
            self._limits = most, torch.isfinite(most)
        most, clipped = self._limits
        padded = torch.cat([*norms, torch.zeros_like(norms[0][:1])])
        total = torch.linalg.vector_norm(padded[self._norms], dim=1)
        factor = torch.clamp(most / (total + 1e-6), max=1.0)
        factor = torch.where(clipped, factor, 1.0)[self._order]
        own = factor.split([len(rows) for rows in gradients])
        return [rows * factors.unsqueeze(1) for rows, factors in zip(gradients, own)]


def _table(rows: Sequence[Sequence[int]], last: int) -> Tensor:
    """Of each model, which of the norms are its own; filled up with the index behind the last."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[last] * (width - len(row))] for row in rows])
