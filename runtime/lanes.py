"""How the models of one loader compute their losses: merged, or each by its own module.

Both kinds have the same two methods. `train` computes losses and gradients, `evaluate` losses and
predictions; both return a result or an exception for each model, so that a model that fails leaves
its neighbours' numbers as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cgo.errors import DataError
from cgo.graph import Graph, ModelId, Node, Output, homes, restrict
from cgo.model import loss_function
from cgo.runtime.builder import Result as LoweredResult
from cgo.runtime.builder import Source
from cgo.runtime.choice import Choice, rules_for
from cgo.runtime.data import Leaves, preserved_random_state
from cgo.runtime.lower import Lowered, lower
from cgo.runtime.member import Member
from cgo.runtime.operators import Fill, empty, filler
from cgo.runtime.packing import PackedState, Place, learning_places, plan_packs, release
from cgo.runtime.state import RandomState
from cgo.runtime.step import autocast, compute, eval_mode
from cgo.runtime.tape import Taped
from cgo.runtime.tuning import Chooser
from cgo.runtime.updates import Updates


@dataclass(frozen=True)
class Result:
    """What one model computed from one batch."""

    loss: Tensor
    prediction: Tensor | None = None


Outcome = Result | Exception


class MergedLanes:
    """Captured models, computed by one program."""

    def __init__(
        self,
        graph: Graph,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        device: torch.device,
        choose: Chooser | None = None,
    ) -> None:
        self.members = {member.id: member for member in members}
        self._graph = graph
        self._learning = learning_places(graph)
        self._constants = constants
        self._device = device
        self._choose = choose or rules_for(device)
        self._chosen = Choice(graph, ())
        self._packed_for: tuple[ModelId, ...] = ()
        self._packed = PackedState((), self.members)
        self._updates: Updates | None = None  # None: each model's own optimizer takes the step
        self._programs: dict[tuple[str, tuple[ModelId, ...], bool], _Bound] = {}

    def train(self, models: Sequence[ModelId], leaves: Leaves, size: int) -> dict[ModelId, Outcome]:
        """Losses of the given models; gradients wait for `update`."""
        self._pack(models)
        self._packed.zero_grad()
        bounds = [self._bound(f"train/{size}", ids) for ids in self._chosen.programs]
        drawn = [bound.draw() for bound in bounds]
        outcomes: dict[ModelId, Outcome] = {}
        begun: list[_Bound] = []
        try:
            for bound, numbers in zip(bounds, drawn):
                begun.append(bound)
                outcomes |= self._train(bound, leaves, numbers)
        except Exception as error:
            for bound in begun:
                bound.restore()
            self._packed.zero_grad()
            self._drop_updates()
            if len(models) == 1:
                return {models[0]: error}
            return self._train_apart(models, leaves, size, drawn)
        if self._updates is None:
            updaters = {model: self.members[model].updater for model in models}
            self._updates = Updates(updaters, self._packed.learning)
        return outcomes

    def _train(self, bound: _Bound, leaves: Leaves, drawn: Drawn) -> dict[ModelId, Outcome]:
        results = bound.train(leaves, drawn)
        bound.commit(results)
        return {
            output.model: Result(loss)
            for position, result in bound.losses
            for output, loss in _lanes_of(result, results[position])
        }

    def _train_apart(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, drawn: Sequence[Drawn]
    ) -> dict[ModelId, Outcome]:
        """Run each model alone on the same random numbers, to find which of them raises."""
        outcomes: dict[ModelId, Outcome] = {}
        single: dict[tuple[str, ...], Tensor] = {
            (name,): lane
            for numbers in drawn
            for names, value in numbers.items()
            for name, lane in zip(names, value if len(names) > 1 else [value])
        }
        for model in models:
            self.members[model].updater.zero_grad()
            bound = self._bound(f"train/{size}", [model], packed=False)
            try:
                outcomes |= self._train(bound, leaves, single)
            except Exception as error:
                bound.restore()
                outcomes[model] = error
        return outcomes

    def hand_out_gradients(self) -> None:
        """Make each parameter's gradient of this step readable as its `.grad`."""
        if self._updates is not None:
            self._packed.hand_out_gradients()

    def update(self, models: Sequence[ModelId]) -> dict[ModelId, Exception]:
        """The optimizer step of the given models; returns what failed.

        A model that has diverged and is to end for it stays as it is.
        """
        without = frozenset(model for model in models if self.members[model].diverged)
        if self._updates is not None and set(models) == set(self._packed_for):
            self._updates.step(without)
            rest = [model for model in models if not self._updates.covers(model)]
        else:
            self.hand_out_gradients()
            self._drop_updates()
            rest = list(models)
        if rest:
            self.hand_out_gradients()
        failures: dict[ModelId, Exception] = {}
        for model in rest:
            if model in without:
                continue
            try:
                self.members[model].updater.step()
            except Exception as error:
                failures[model] = error
        return failures

    def evaluate(
        self, models: Sequence[ModelId], leaves: Leaves, size: int
    ) -> dict[ModelId, Outcome]:
        """Losses and predictions of the given models, without gradients."""
        self._pack(models)
        outcomes: dict[ModelId, Outcome] = {}
        for ids in self._chosen.programs:
            outcomes |= self._evaluate(ids, leaves, size, packed=True)
        return outcomes

    def _evaluate(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, *, packed: bool
    ) -> dict[ModelId, Outcome]:
        bound = self._bound(f"validation/{size}", models, packed=packed)
        try:
            results = bound.evaluate(leaves, bound.draw())
            bound.commit(results)  # a module may keep count in evaluation mode, too
        except Exception as error:
            bound.restore()
            if len(models) == 1:
                return {models[0]: error}
            outcomes: dict[ModelId, Outcome] = {}
            for model in models:
                outcomes |= self._evaluate([model], leaves, size, packed=False)
            return outcomes
        found: dict[ModelId, dict[str, Tensor]] = {model: {} for model in models}
        for result, value in zip(bound.lowered.results, results):
            for output, lane in _lanes_of(result, value):
                found[output.model][output.role] = lane
        return {m: Result(roles["loss"], roles.get("prediction")) for m, roles in found.items()}

    def sync(self) -> None:
        """Bring each model's own optimizer up to date, for a checkpoint."""
        if self._updates is not None:
            self._updates.sync()

    def _drop_updates(self) -> None:
        """Go back to the models' own optimizers."""
        self.sync()
        self._updates = None

    def _pack(self, models: Sequence[ModelId]) -> None:
        """Arrange the state of the models that run now; a model that left keeps its own."""
        if self._packed_for == tuple(models):
            return
        self._drop_updates()
        self._packed_for = tuple(models)
        self._chosen = self._choose(restrict(self._graph, models=set(models)), models)
        self._packed = PackedState(plan_packs(self._chosen.graph), self.members)
        self._programs = {key: bound for key, bound in self._programs.items() if not key[2]}
        for member in self.members.values():
            release(member, self._packed.held)

    def _bound(self, program: str, models: Sequence[ModelId], *, packed: bool = True) -> _Bound:
        key = program, tuple(models), packed
        bound = self._programs.get(key)
        if bound is None:
            graph = self._chosen.graph if packed else self._graph
            part = restrict(graph, models=set(models))
            state = self._packed if packed else PackedState((), self.members)
            ways = self._chosen.ways if packed else {}
            chosen = self._chosen if packed else Choice(graph, ())
            again = self._chosen.recompute and program.startswith("train/")
            lowered = lower(part, program, self._device, state.packs, ways=ways, recompute=again)
            where = f"{program}/{','.join(models)}"
            bound = _Bound(
                lowered, self.members, self._constants, state, self._learning, chosen, where
            )
            self._programs[key] = bound
        return bound

    def forget(self, model: ModelId) -> None:
        """Drop the programs that an ended model was part of."""
        self._programs = {key: b for key, b in self._programs.items() if model not in key[1]}


#: A step's random tensors by the names of the nodes that they stand for.
Drawn = Mapping[tuple[str, ...], Tensor]


class _Bound:
    """A lowered program with the tensors that its sources stand for."""

    def __init__(
        self,
        lowered: Lowered,
        members: Mapping[ModelId, Member],
        constants: Mapping[str, Tensor],
        packed: PackedState,
        learning: frozenset[Place],
        chosen: Choice,
        name: str,
    ) -> None:
        self.lowered = lowered
        self._members, self._packed = members, packed
        self._values: list[Tensor | None] = []
        self._inputs: list[tuple[int, str, torch.dtype, torch.Size]] = []
        self._random: list[tuple[int, Source]] = []
        self._idle: list[tuple[int, Tensor]] = []  # parameters that must not get a gradient
        for position, source in enumerate(lowered.sources):
            node = source.nodes[0]
            value: Tensor | None = None
            if node.op == "cgo.input":
                self._inputs.append((position, *_expected(node)))
            elif node.op == "cgo.random":
                self._random.append((position, source))
            elif node.op == "cgo.constant":
                value = constants[str(node.keyword("content"))]
            elif source.packed:
                value = packed.leaves[tuple(node.name for node in source.nodes)]
            else:
                place = str(node.keyword("model")), str(node.keyword("path"))
                value = members[place[0]].state.tensors[place[1]]
                if value.requires_grad and learning.isdisjoint(homes(node)):
                    self._idle.append((position, value))
            self._values.append(value)
        self._draws = self._plan_draws()
        self.losses = [
            (position, result)
            for position, result in enumerate(lowered.results)
            if result.outputs[0].role == "loss"
        ]
        self._plan_updates()
        self._learning = [
            position
            for position, value in enumerate(self._values)
            if value is not None and value.requires_grad
        ]
        self._with_gradient: list[int] = []  # of these, once a step has been run
        make = partial(Taped, buffers=self._buffers, wanted=chosen.taped)
        compiled = None if chosen.compiler is None else partial(chosen.compiler, name)
        self._step = make(self._forward_backward, compiled=compiled)
        self._forward = make(lambda *values: self.lowered(values))

    def _plan_draws(self) -> list[tuple[tuple[str, ...], int | None, Fill, torch.Generator]]:
        """Each model's draws in its own operator order; between models no order matters."""
        found = []
        for _, source in self._random:
            names = tuple(node.name for node in source.nodes)
            for lane, node in enumerate(source.nodes):
                generator = self._members[str(node.keyword("model"))].state.generator
                order = node.keyword("order")
                assert isinstance(order, int)
                place = lane if source.packed else None
                found.append((order, names, place, filler(node), generator))
        found.sort(key=lambda item: item[0])
        return [item[1:] for item in found]

    def _plan_updates(self) -> None:
        self._updates: list[tuple[int, Tensor]] = []
        for position, result in enumerate(self.lowered.results):
            if result.outputs[0].role == "update":
                self._updates.append((position, self._buffer(result.outputs[0], result.packed)))
        written = [self._buffer(output, True) for output in self.lowered.written]
        targets = {id(target): target for target in [t for _, t in self._updates] + written}
        self._buffers = list(targets.values())
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    def _buffer(self, output: Output, packed: bool) -> Tensor:
        """Where an updated buffer lies: in its pack, or its model's own tensor."""
        own = self._members[output.model].state.tensors[output.key]
        return self._packed.place.get((output.model, output.key), own) if packed else own

    def draw(self) -> Drawn:
        """This step's random tensors, each model's from its own stream in its own order."""
        drawn: dict[tuple[str, ...], Tensor] = {}
        for _, source in self._random:
            type_ = source.nodes[0].types[0]
            assert type_ is not None
            members = len(source.nodes) if source.packed else None
            names = tuple(node.name for node in source.nodes)
            drawn[names] = empty(type_, self.lowered.device, members)
        for names, lane, fill, generator in self._draws:
            fill(drawn[names] if lane is None else drawn[names][lane], generator)
        return drawn

    def train(self, leaves: Leaves, drawn: Drawn) -> list[Tensor]:
        """One forward and backward: results, and gradients added to those of the sources.

        Buffers may already be written when it raises.
        """
        values = self._handed(leaves, drawn)
        replayed = self._step.replaying
        results = list(self._step(values))
        if replayed:
            several = results[len(self.lowered.results) :]
            for position, gradient in zip(self._with_gradient, several, strict=True):
                leaf = values[position]
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return results[: len(self.lowered.results)]

    def _forward_backward(self, *values: Tensor) -> list[Tensor]:
        """The program's results, and this step's gradient of each source that has one."""
        earlier = {i: values[i].grad for i in self._learning if values[i].grad is not None}
        for position in earlier:
            values[position].grad = None
        results = self.lowered(values)
        losses = [results[position] for position, _ in self.losses]
        learning = [loss for loss in losses if loss.requires_grad]
        if learning:  # gradients of the sum of losses, without computing the sum
            torch.autograd.backward(learning, [torch.ones_like(loss) for loss in learning])
        self._with_gradient = [i for i in self._learning if values[i].grad is not None]
        gradients = [values[i].grad for i in self._with_gradient]
        for position, gradient in earlier.items():
            now = values[position].grad
            assert gradient is not None
            values[position].grad = gradient if now is None else gradient + now
        return [*(result.detach() for result in results), *gradients]  # type: ignore[list-item]

    def evaluate(self, leaves: Leaves, drawn: Drawn) -> list[Tensor]:
        """One forward without gradients; buffers may already be written when it raises."""
        with torch.no_grad():
            return list(self._forward(self._handed(leaves, drawn)))

    def _handed(self, leaves: Leaves, drawn: Drawn) -> list[Tensor]:
        """The tensors of all sources for one batch; buffers are kept for `restore`."""
        values = self._values.copy()
        for position, name, dtype, shape in self._inputs:
            leaf = leaves.get(name)
            if leaf is None or leaf.dtype is not dtype or leaf.shape != shape:
                raise _unexpected(leaves, name, dtype, shape)
            values[position] = leaf
        for position, source in self._random:
            values[position] = drawn[tuple(node.name for node in source.nodes)]
        for position, parameter in self._idle:
            values[position] = parameter.detach()
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        return values  # type: ignore[return-value]

    def commit(self, results: Sequence[Tensor]) -> None:
        """Write the buffers' new values."""
        if not self._updates:
            return
        with torch.no_grad():
            targets = [target for _, target in self._updates]
            torch._foreach_copy_(targets, [results[position] for position, _ in self._updates])

    def restore(self) -> None:
        """Undo what a failed run wrote into buffers."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)


def _lanes_of(result: LoweredResult, value: Tensor) -> Iterator[tuple[Output, Tensor]]:
    """Each output of a result with its own value."""
    return zip(result.outputs, value.unbind(0) if result.packed else [value], strict=True)


def _expected(node: Node) -> tuple[str, torch.dtype, torch.Size]:
    type_ = node.types[0]
    assert type_ is not None
    return str(node.keyword("leaf")), getattr(torch, type_.dtype), torch.Size(type_.shape)


def _unexpected(leaves: Leaves, name: str, dtype: torch.dtype, shape: torch.Size) -> DataError:
    if name not in leaves:
        return DataError(f"the batch has no {name}; it has {', '.join(leaves)}")
    return DataError(
        f"the batch's {name} is {leaves[name].dtype} {list(leaves[name].shape)}; the first "
        f"batch's was {dtype} {list(shape)}"
    )


class OpaqueLane:
    """A model that was not captured: its own module is called, on its own copy of the batch."""

    def __init__(self, member: Member) -> None:
        assert member.state.module is not None
        self.member = member
        self._module = member.state.module
        self._training = member.entry.training
        self._loss = loss_function(self._training.loss)

    def train(self, leaves: Leaves) -> Outcome:
        """The loss, after its backward."""
        try:
            result = self._compute(leaves)
            if result.loss.requires_grad:
                result.loss.backward()
            return result
        except Exception as error:
            return error

    def evaluate(self, leaves: Leaves) -> Outcome:
        """The loss and the prediction in evaluation mode."""
        try:
            with eval_mode(self._module), torch.no_grad():
                return self._compute(leaves)
        except Exception as error:
            return error

    def _compute(self, leaves: Leaves) -> Result:
        own = {name: leaf.clone() for name, leaf in leaves.items()}
        state = self.member.state
        with preserved_random_state(), self._device_stream():
            state.random.enter()
            with autocast(self._training, state.device):
                double = self._training.precision == "float64"
                loss, prediction = compute(self._module, self._loss, own, double=double)
            state.random = RandomState.current()
        return Result(loss, prediction if isinstance(prediction, Tensor) else None)

    @contextlib.contextmanager
    def _device_stream(self) -> Iterator[None]:
        """On CUDA, let the module draw from its model's own stream instead of the process's."""
        device, generator = self.member.state.device, self.member.state.generator
        if device.type != "cuda":
            yield
            return
        before = torch.cuda.get_rng_state(device)
        torch.cuda.set_rng_state(generator.get_state(), device)
        try:
            yield
        finally:
            generator.set_state(torch.cuda.get_rng_state(device))
            torch.cuda.set_rng_state(before, device)
