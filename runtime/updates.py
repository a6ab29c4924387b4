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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cgo.graph import ModelId
from cgo.runtime.accelerator import Accelerator
from cgo.runtime.flat import Flat, Piece
from cgo.runtime.optimizers import Updater
from cgo.runtime.products import Products
from cgo.runtime.scaling import Scaling
from cgo.runtime.steps import Kind, kind_rule, settings

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
        *,
        products: Products | None = None,
        kernels: bool = False,
    ) -> None:
        """Arrange parameters that have a gradient now; those of other models stay where they are.

        Args:
            updaters: Of the models that run.
            learning: The packed leaves that learn.
            accelerator: Where rates and counts of steps lie as tensors, so that `apply` can be
                captured; None: they are Python's.
            scaling: Knows of models whose scaled gradients have overflowed: they stay as they are.
            products: The leaves' gradients that are held as factors.
            kernels: Take the step by kernels of our own, where there is an accelerator.
        """
        self.version = next(_VERSIONS)  # of the arrangement
        self._updaters = dict(updaters)
        self._accelerator, self._scaling = accelerator, scaling
        self._products = products or Products()
        self._kernels = kernels and accelerator is not None
        self._learning = list(learning)
        self._rules = {model: kind_rule(updater) for model, updater in self._updaters.items()}
        # Nobody but its scheduler changes the hyper-parameters of an optimizer that has a rule.
        self._scheduled = {m: u for m, u in self._updaters.items() if u.scheduler is not None}
        self._moves = self._moved()
        self._settings = {m: settings(_group(u)) for m, u in self._scheduled.items()}
        self._plan = self._kinds(self._updaters)
        self._flats = self._arrange()

    def covers(self, model: ModelId) -> bool:
        """Whether `step` updates this model."""
        return self._plan.get(model) is not None

    @property
    def by_rows(self) -> bool:
        """Whether all models' steps are taken so: with numbers that lie in tensors, on a CPU."""
        return all(map(self.covers, self._updaters)) and all(flat.by_rows for flat in self._flats)

    @property
    def nbytes(self) -> int:
        """Of all parameters that are updated together, and their moments."""
        return sum(flat.nbytes for flat in self._flats)

    def step(self, without: frozenset[ModelId] = frozenset()) -> dict[ModelId, Exception]:
        """Clip, update, and step the schedulers that go by steps.

        Args:
            without: Models that stay as they are.

        Returns:
            Whose scheduler raised, and what.
        """
        self.prepare(without)
        self.apply()
        return self.finish()

    def prepare(self, without: frozenset[ModelId] = frozenset()) -> None:
        """Read the models' hyper-parameters, and arrange anew what they or gradients ask for."""
        moves = self._moved()
        changed = self._changed(moves)
        kinds = self._plan | self._kinds(changed)
        if kinds != self._plan or self._having_gradients() != self._arranged:
            self.sync()  # a scheduler changed what has to be computed, or a program what learns
            self._plan = kinds
            self._flats = self._arrange()
            self.version = next(_VERSIONS)
        if moves != self._moves:
            self._read(moves, changed)
        for flat in self._flats:
            flat.prepare(without)

    def prepare_again(self) -> bool:
        """As `prepare`, before a captured `apply` is replayed; False if it must be eager again."""
        moves = self._moved()
        if moves != self._moves:
            changed = self._changed(moves)
            if any(kind != self._plan[model] for model, kind in self._kinds(changed).items()):
                return False
            self._read(moves, changed)
        for flat in self._flats:
            flat.prepare(frozenset())
        return True

    def unprepare(self) -> None:
        """Take `prepare_again` back, where no step follows it."""
        for flat in self._flats:
            flat.uncount()

    @property
    def signature(self) -> tuple[int, ...]:
        """What a captured `apply` holds for: the arrangement, and numbers that are Python's."""
        return (self.version, *(flat.baked for flat in self._flats))

    def _moved(self) -> list[int]:
        return [updater.moves for updater in self._scheduled.values()]

    def _changed(self, moves: Sequence[int]) -> dict[ModelId, list[Any]]:
        """The settings of the models whose scheduler has changed more than a rate."""
        stepped = zip(self._scheduled.items(), moves, self._moves)
        found = {m: settings(_group(u)) for (m, u), now, before in stepped if now != before}
        return {model: values for model, values in found.items() if values != self._settings[model]}

    def _read(self, moves: list[int], changed: Mapping[ModelId, list[Any]]) -> None:
        self._moves = moves
        self._settings |= changed
        for flat in self._flats:
            flat.read(changed)

    def apply(self) -> None:
        """Clip and update, by what was prepared: work of the device alone."""
        with torch.no_grad():
            for flat in self._flats:
                flat.apply()

    def finish(self) -> dict[ModelId, Exception]:
        """Step the schedulers that go by steps; returns whose raised, and what."""
        failures: dict[ModelId, Exception] = {}
        for model, updater in self._stepping.items():
            try:
                updater.step_scheduler()
            except Exception as error:
                failures[model] = error
        return failures

    def without_kernels(self) -> None:
        """Leave out kernels, which allocate nothing, where only memory is looked at."""
        for flat in self._flats:
            if flat.fused is not None:
                flat.fused.idle = True
            if flat.kind.on_device:
                flat.kind = replace(flat.kind, fused=lambda part: None)

    def sync(self) -> None:
        """Write the number of steps into the optimizers' own states."""
        for flat in self._flats:
            flat.sync()

    def _kinds(self, models: Iterable[ModelId]) -> dict[ModelId, Kind | None]:
        found: dict[ModelId, Kind | None] = {}
        for model in models:
            rule = self._rules[model]
            found[model] = None if rule is None else rule(_group(self._updaters[model]))
        if self._accelerator is None or self._scaling is None or self._kernels:
            return found
        # Whether a step was left out is known on the device alone: only kernels can count there.
        scaled = {model for model in found if self._scaling.covers([model])}
        return {m: k if m not in scaled or (k and k.on_device) else None for m, k in found.items()}

    def _having_gradients(self) -> list[bool]:
        return [self._learns(leaf) for leaf in self._leaves]

    def _learns(self, leaf: Tensor) -> bool:
        return leaf.grad is not None or self._products.of(leaf) is not None

    def _arrange(self) -> list[Flat]:
        covered = {m: u for m, u in self._scheduled.items() if self.covers(m)}
        for updater in covered.values():  # what schedulers look at to warn of a missing step
            updater.optimizer._opt_called = True  # type: ignore[attr-defined]
        by_steps = {m: u for m, u in covered.items() if u.training.scheduler_interval == "step"}
        self._stepping = by_steps
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
            if not self._learns(leaf):
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
        given = self._updaters, self._accelerator, self._scaling
        make = partial(Flat, products=self._products, kernels=self._kernels)
        return [make(kind, found, *given) for kind, found in pieces.items()]


def _group(updater: Updater) -> dict[str, Any]:
    group: dict[str, Any] = updater.optimizer.param_groups[0]
    return group
