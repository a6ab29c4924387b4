"""The parameters of one kind of optimizer in one flat tensor, and their step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.private import many_tensors
from cgo.runtime.accelerator import Accelerator
from cgo.runtime.optimizers import Updater
from cgo.runtime.packing import rehome
from cgo.runtime.products import Product, Products
from cgo.runtime.rows import RowSteps
from cgo.runtime.scaling import Scaling
from cgo.runtime.steps import Kind, Number, Part

if TYPE_CHECKING:
    from cgo.runtime.fused_updates import FusedUpdates


@dataclass(frozen=True)
class Piece:
    """A leaf, or one lane of a leaf whose other lanes are of other kinds."""

    leaf: Tensor
    lane: int | None  # None: all of it
    own: list[Tensor]  # the models' parameters, lane by lane
    models: list[ModelId]

    def gradient(self, products: Products) -> Tensor:
        """This step's, a row for each lane."""
        products.compute(self.leaf)
        assert self.leaf.grad is not None
        gradient = self.leaf.grad if self.lane is None else self.leaf.grad[self.lane]
        return gradient.reshape(len(self.own), -1)


#: Kernels load vectors of so many bytes, and take slower ways where a tensor begins elsewhere.
_ALIGNED_BYTES = 16

#: Lanes of a leaf, in the mean, from which steps by rows take less time than a call a model.
_FEW_LANES = 4


@dataclass(frozen=True)
class _Layout:
    """Where parameters lie in a flat tensor: end to end, pieces filled up to where one begins."""

    lengths: tuple[tuple[int, ...], ...]  # of each piece's parameters
    gaps: tuple[int, ...]  # behind each piece

    @classmethod
    def of(cls, pieces: Sequence[Piece], *, aligned: bool) -> _Layout:
        lengths = tuple(tuple(p.numel() for p in piece.own) for piece in pieces)
        step = _ALIGNED_BYTES // pieces[0].own[0].element_size() if aligned else 1
        return cls(lengths, tuple(-sum(own) % step for own in lengths))

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each parameter, as a flat tensor."""
        rest = iter(tensors)
        found: list[Tensor] = []
        for own, gap in zip(self.lengths, self.gaps):
            found += [next(rest).reshape(-1) for _ in own]
            found += [found[-1].new_zeros(gap)] if gap else []
        return torch.cat(found)

    def joined_pieces(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each piece, as a flat tensor."""
        found: list[Tensor] = []
        for tensor, gap in zip(tensors, self.gaps):
            found += [tensor.flatten(), *([tensor.new_zeros(gap)] if gap else [])]
        return torch.cat(found)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part."""
        parts = zip(self.pieces(flat), self.lengths)
        return [part for whole, own in parts for part in whole.split(own)]

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Each piece's part."""
        cuts = [size for own, gap in zip(self.lengths, self.gaps) for size in (sum(own), gap)]
        return list(flat.split(cuts)[::2])


class Flat:
    """The parameters of one kind, end to end."""

    def __init__(
        self,
        kind: Kind,
        pieces: Sequence[Piece],
        updaters: Mapping[ModelId, Updater],
        accelerator: Accelerator | None = None,
        scaling: Scaling | None = None,
        *,
        products: Products,
        kernels: bool = False,
    ) -> None:
        self.kind, self.pieces = kind, list(pieces)
        self._products = products
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
        self._layout = _Layout.of(self.pieces, aligned=accelerator is not None)
        with torch.no_grad():
            self.values = self._layout.joined(parameters)
            self.moments = {name: self._moment(name) for name in kind.moments}
        self._taken = 0  # steps since these:
        self._begun = [self._steps_of(updater) for updater in self.updaters]
        self.gradient: Tensor  # within a step that goes over flat tensors
        self._order = torch.tensor(self._positions, device=self.values.device)
        self.groups = self._read_groups()
        self._position = position
        self._stale = True  # what is derived from hyper-parameters
        self._alike: bool | None = None  # whether all models agree; None: not known
        self.baked = 0  # another one when what a captured `apply` has as Python's numbers changes
        self._elements: Tensor | None = None  # of each element, its model's position
        self.numbers: dict[str, Number] = {}  # that the rule reads
        self._vectors: dict[str, tuple[tuple[float, ...], Tensor]] = {}
        self._without: frozenset[ModelId] = frozenset()
        limits = [updater.training.grad_clip_norm for updater in self.updaters]
        self._clips = any(limit is not None for limit in limits)
        self._norms: Tensor | None = None
        self._limits: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            count = torch.tensor(self.steps, dtype=torch.float32, device=self.values.device)
        self.counts = count  # of steps, on the device; of each model
        self.rates = torch.zeros(len(self.models), device=self.values.device)
        self._copies = self._rehome()
        self._parts: dict[int | None, Part] = {}  # by the model's position; None: of all models
        self._split: list[list[Tensor]] | None = None  # values and moments by parameter, once
        self._rows = self._make_rows()
        self.fused = self._fused() if kernels else None  # all models' step by a kernel of our own

    @property
    def by_rows(self) -> bool:
        """Whether a CPU takes the step by rows, with settings that stay as they are."""
        return self._rows is not None and self.kind.everywhere

    @property
    def nbytes(self) -> int:
        """Of parameters and moments."""
        return self.values.nbytes + sum(moment.nbytes for moment in self.moments.values())

    @property
    def steps(self) -> list[int]:
        """How many each model has taken, by the host's count."""
        return [begun + self._taken for begun in self._begun]

    def _fused(self) -> FusedUpdates:
        from cgo.runtime.fused_updates import FusedUpdates  # Triton may not be there

        assert self._accelerator is not None
        lengths = self._layout.lengths
        starts = [sum(own) + gap for own, gap in zip(lengths, self._layout.gaps)]
        pieces = list(zip([0, *accumulate(starts)], lengths))
        given = self.kind.family, pieces, self._positions, self.values, len(self.models)
        return FusedUpdates(*given, self._accelerator)

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
            found.append(value.detach())
        flat = self._layout.joined(found)
        for index, part in enumerate(self._layout.split(flat)):
            self._state(index)[name] = part.view(self.parameters[index].shape)
        return flat

    def _steps_of(self, updater: Updater) -> int:
        for parameter in self.parameters:
            if (step := updater.optimizer.state.get(parameter, {}).get("step")) is not None:
                return int(step)
        return 0

    def _rehome(self) -> list[tuple[Tensor, Tensor]]:
        """Make leaves views of the flat values; returns the lanes that have to be copied back."""
        copies = []
        for piece, part in zip(self.pieces, self._layout.pieces(self.values)):
            if piece.lane is not None:
                copies.append((piece.leaf.detach()[piece.lane], part.view(piece.own[0].shape)))
                continue
            piece.leaf.data = part.view(piece.leaf.shape)
            if piece.own[0] is not piece.leaf:
                rehome(piece.own, piece.leaf)
        return copies

    def _make_rows(self) -> RowSteps | None:
        """The step by rows, where it is taken so: of few lanes a leaf, kernels take less."""
        few = len(self.parameters) < _FEW_LANES * len(self.pieces)
        if few or self._accelerator is not None or self.values.device.type != "cpu":
            return None
        if not self.kind.by_rows:
            return None
        shapes = [(len(piece.own), piece.own[0].numel()) for piece in self.pieces]
        moment = self.moments.get("momentum_buffer")
        return RowSteps(self.values, moment, shapes, self._positions, self.kind.flags)

    def sync(self) -> None:
        """Write the number of steps into the optimizers' own states."""
        if not self.kind.steps:
            return
        if self.fused is not None or (self._accelerator is not None and self._by_kernels):
            self._taken, self._begun = 0, [int(count) for count in self.counts.tolist()]
        steps = self.steps
        for index in range(len(self.parameters)):
            count = steps[self._positions[index]]
            fused = self.updaters[self._positions[index]].optimizer.param_groups[0].get("fused")
            device = self.values.device if fused else None  # where torch.optim keeps it
            self._state(index)["step"] = torch.tensor(float(count), device=device)

    # --- the step ---------------------------------------------------------------------------------

    def prepare(self, without: frozenset[ModelId]) -> None:
        """Read hyper-parameters, and count a step."""
        if self._scaling is not None and self._accelerator is None:
            without |= self._scaling.overflowed()
        self._without = without
        self._taken += 1
        for model in without:
            if (position := self._position.get(model)) is not None:
                self._begun[position] -= 1
                self._alike = None
        if self.fused is not None:
            if self._stale:
                self.fused.read(self.groups)
        elif self._rows is not None:
            if self._stale:
                self._rows.read(self.groups)
        elif self._by_kernels:
            if self._stale and self._accelerator is not None:
                rates = [float(group["lr"]) for group in self.groups]
                self._accelerator.upload(rates, self.rates)
        elif self._stale or self.kind.steps:
            counts = [max(1, count) for count in self.steps]  # 0 where the first step is left out
            found = self.kind.numbers(self.groups, counts, self.kind.flags)
            self.numbers = {name: self._number(name, values) for name, values in found.items()}
        self._stale = False

    def uncount(self) -> None:
        """Take the last step's count back."""
        self._taken -= 1

    def read(self, changed: Collection[ModelId]) -> None:
        """Read hyper-parameters again; `changed` are the models of which more than rates have."""
        self.groups, self._stale, self._alike = self._read_groups(), True, None
        if (
            self.fused is None
            and self._by_kernels
            and not self._position.keys().isdisjoint(changed)
        ):
            self.baked += 1

    def _read_groups(self) -> list[dict[str, Any]]:
        return [updater.optimizer.param_groups[0] for updater in self.updaters]

    @property
    def _by_kernels(self) -> bool:
        """Whether the step is torch's fused kernels; else it is operators over flat tensors."""
        if self._accelerator is not None:  # where kernels take rates as float32
            return self.kind.on_device
        return self.kind.fused is not None and self.values.device.type == "cpu"

    def apply(self) -> None:
        """Clip and update all models but some."""
        if self._rows is not None:
            self._row_step(self._rows)
        elif self.fused is not None:
            self._fused_step(self.fused, self._gradients(), self._without)
        elif self._by_kernels:
            self._kernel_step(self._gradients(), self._without)
        else:
            self._flat_step(self._gradients(), self._without)
        if self._copies:
            many_tensors.copy_([lane for lane, _ in self._copies], [p for _, p in self._copies])

    def _gradients(self) -> list[Tensor]:
        """Of each piece, a row a lane; clipped."""
        return self._clipped([piece.gradient(self._products) for piece in self.pieces])

    def _row_step(self, rows: RowSteps) -> None:
        given: list[Tensor | Product] = [*self._gradients()] if self._clips else []
        for piece in () if self._clips else self.pieces:
            product = None if piece.lane is not None else self._products.of(piece.leaf)
            given.append(piece.gradient(self._products) if product is None else product)
        out = frozenset(i for i, model in enumerate(self.models) if model in self._without)
        rows(given, self.groups, out)

    def _flat_step(self, gradients: Sequence[Tensor], without: frozenset[ModelId]) -> None:
        self.gradient = self._layout.joined_pieces(gradients)
        flats = [] if without.isdisjoint(self.models) else [self.values, *self.moments.values()]
        before = [flat.clone() for flat in flats]
        self.kind.rule(self)
        del self.gradient  # or it would be there until the next step, beside all activations
        if not flats:
            return
        stays = torch.tensor([m in without for m in self.models], device=self.values.device)
        for flat, kept in zip(flats, before):  # by selection: nothing times NaN is nothing
            torch.where(stays[self.elements], kept, flat, out=flat)

    def _fused_step(
        self, fused: FusedUpdates, gradients: Sequence[Tensor], without: frozenset[ModelId]
    ) -> None:
        skip = fused.none
        if self._scaling is not None:
            skip = self._scaling.overflow(self.models).float()
        if not without.isdisjoint(self.models):
            stays = [float(model in without) for model in self.models]
            skip = skip + torch.tensor(stays, device=skip.device)
        self.counts.add_(1).sub_((skip > 0).float())
        moments = [self.moments[name] for name in self.kind.moments]
        fused.step(self.values, moments, gradients, self.counts, skip, self.kind.flags)

    def _kernel_step(self, gradients: Sequence[Tensor], without: frozenset[ModelId]) -> None:
        # Lane by lane even where all agree: a lane's last elements are computed in another way than
        # the others, and which these are must not depend on its neighbours.
        lanes = [lane for rows in gradients for lane in rows.unbind(0)]
        if self._accelerator is None and without.isdisjoint(self.models) and self._agree():
            self._take(None, lanes)
            return
        overflown = None if self._accelerator is None else self._count_on_device()
        for position, model in enumerate(self.models):
            if model not in without:
                own = [lanes[index] for index in self._own[position]]
                self._take(position, own, None if overflown is None else overflown[position])

    def _count_on_device(self) -> Tensor | None:
        """Count a step where it is not left out; gives where it is, as 1.0, if any may be."""
        self.counts.add_(1)
        if self._scaling is None:
            return None
        overflown = self._scaling.overflow(self.models).float()
        self.counts.sub_(overflown)
        return overflown

    def _take(
        self, position: int | None, gradients: list[Tensor], skip: Tensor | None = None
    ) -> None:
        assert self.kind.fused is not None
        part = self._part(position, gradients)
        part.skip = skip
        self.kind.fused(part)
        part.gradients = []  # or they would be there until the next step, beside all activations

    def _agree(self) -> bool:
        """Whether all models' hyper-parameters and counts of steps are equal."""
        if self._alike is None:
            first, begun = self.groups[0], self._begun[0]
            keys = [key for key in first if key not in ("params", "initial_lr")]
            self._alike = all(count == begun for count in self._begun) and all(
                group.get(key) == first[key] for group in self.groups[1:] for key in keys
            )
        return self._alike

    def _part(self, position: int | None, gradients: list[Tensor]) -> Part:
        part = self._parts.get(position)
        if part is None:
            part = self._parts[position] = self._make_part(position)
        part.gradients, part.group = gradients, self.groups[position or 0]
        if self.kind.steps and self._accelerator is None:
            part.count.fill_(self._begun[position or 0] + self._taken)
        return part

    def _make_part(self, position: int | None) -> Part:
        if self._split is None:
            flats = [self.values, *(self.moments[name] for name in self.kind.moments)]
            self._split = [self._layout.split(flat) for flat in flats]
        own = range(len(self.parameters)) if position is None else self._own[position]
        values, *moments = ([parts[index] for index in own] for parts in self._split)
        if self._accelerator is None or position is None:
            return Part(values, moments, [], {}, self.kind.flags, torch.zeros(()))
        count, rate = self.counts[position], self.rates[position]
        return Part(values, moments, [], {}, self.kind.flags, count, rate)

    @property
    def elements(self) -> Tensor:
        """Of each element, the position of its model."""
        if self._elements is None:
            device = self.values.device
            pairs = zip(self.parameters, self._positions)
            owners = [torch.full((p.numel(),), position, device=device) for p, position in pairs]
            self._elements = self._layout.joined(owners)
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
        if not self._clips:
            return gradients
        norms = [torch.linalg.vector_norm(rows, dim=1) for rows in gradients]
        if self._norms is None or self._limits is None:
            self._norms = _table(self._own, len(self._positions)).to(self.values.device)
            given = {"dtype": norms[0].dtype, "device": norms[0].device}
            limits = [updater.training.grad_clip_norm for updater in self.updaters]
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
