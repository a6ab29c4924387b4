"""How the models of one loader compute their losses: merged, or each by its own module.

Both kinds (`cgo.runtime.opaque` has the other) have the same methods. `train` computes losses and
gradients, `evaluate` losses and predictions; both return a result or an exception for each model,
so that a model that fails leaves its neighbours' numbers as they are. `update` takes the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cgo.errors import DataError
from cgo.graph import Graph, ModelId, Node, Output, homes, restrict
from cgo.runtime.accelerator import accelerator_for, is_out_of_memory, without_frames
from cgo.runtime.builder import Result as LoweredResult
from cgo.runtime.builder import Source
from cgo.runtime.choice import Choice, divided, rules_for
from cgo.runtime.data import Leaves
from cgo.runtime.fitting import fit
from cgo.runtime.lower import Lowered, lower
from cgo.runtime.member import Member
from cgo.runtime.memory import Estimate
from cgo.runtime.operators import Fill, empty, filler
from cgo.runtime.packing import PackedState, Place, learning_places, plan_packs, release
from cgo.runtime.scaling import Scaling, seeds
from cgo.runtime.taped import Taped
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
        tell: Callable[..., None] = lambda what, **figures: None,
    ) -> None:
        self.members = {member.id: member for member in members}
        self._graph = graph
        self._learning = learning_places(graph)
        self._constants = constants
        self.device = device
        self._choose = choose or rules_for(device)
        self._tell = tell
        self.estimate: Estimate | None = None  # of memory, where it is limited
        self._most_models = 0  # of a program, since memory ran out; 0: no limit
        self._chosen = Choice(graph, ())
        self._packed_for: tuple[ModelId, ...] = ()
        self._packed = PackedState((), self.members)
        self.updates: Updates | None = None  # None: each model's own optimizer takes the step
        self.scaling = Scaling.of({member.id: member.scale for member in members})
        self._programs: dict[tuple[str, tuple[ModelId, ...], bool], Bound] = {}

    def train(self, models: Sequence[ModelId], leaves: Leaves, size: int) -> dict[ModelId, Outcome]:
        """Losses of the given models; gradients wait for `update`."""
        self._pack(models)
        self._packed.zero_grad()
        bounds = [self._bound(f"train/{size}", ids) for ids in self._chosen.programs]
        drawn = [bound.draw() for bound in bounds]
        while True:
            outcomes, failure = self._attempt(bounds, leaves, drawn)
            if failure is None:
                break
            self._packed.zero_grad()
            self._drop_updates()
            if len(models) == 1:
                return {models[0]: failure}
            if not is_out_of_memory(failure) or not self._divide(failure):
                return self._train_apart(models, leaves, size, drawn)
            single = _singles(drawn)
            self._repack(models)
            bounds = [self._bound(f"train/{size}", ids) for ids in self._chosen.programs]
            drawn = [bound.together(single) for bound in bounds]
        self._unscale(models)
        if self.updates is None:
            updaters = {model: self.members[model].updater for model in models}
            on_device = self.device.type != "cpu" or self._chosen.captured
            accelerator = accelerator_for(self.device) if on_device else None
            self.updates = Updates(updaters, self._packed.learning, accelerator, self.scaling)
        return outcomes

    def _attempt(
        self, bounds: Sequence[Bound], leaves: Leaves, drawn: Sequence[Drawn]
    ) -> tuple[dict[ModelId, Outcome], Exception | None]:
        """All programs one after another; or what failed, with buffers as they were."""
        outcomes: dict[ModelId, Outcome] = {}
        begun: list[Bound] = []
        try:
            for bound, numbers in zip(bounds, drawn):
                begun.append(bound)
                outcomes |= self._train(bound, leaves, numbers)
            return outcomes, None
        except Exception as error:
            for bound in begun:
                bound.restore()
            return {}, without_frames(error)

    def _divide(self, failure: Exception) -> bool:
        """Halve the programs whose memory did not suffice; False where they are single models."""
        largest = max(map(len, self._chosen.programs))
        before = len(self._chosen.programs)
        most = (min(self._most_models, largest) if self._most_models else largest) // 2
        while most and len(divided(self._chosen, most).programs) == before:
            most //= 2
        if not most:
            return False
        self._most_models = most
        self._tell("divided", most_models=most, reason=str(failure).partition("\n")[0])
        return True

    def _train(
        self, bound: Bound, leaves: Leaves, drawn: Drawn, *, undo: bool = True
    ) -> dict[ModelId, Result]:
        results = bound.train(leaves, drawn, undo=undo)
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
        single = _singles(drawn)
        for model in models:
            self.members[model].updater.zero_grad()
            bound = self._bound(f"train/{size}", [model], packed=False)
            try:
                outcomes |= self._train(bound, leaves, bound.together(single))
            except Exception as error:
                bound.restore()
                outcomes[model] = error
        self._unscale([model for model in models if isinstance(outcomes[model], Result)])
        return outcomes

    def _unscale(self, models: Sequence[ModelId]) -> None:
        """Make the gradients of models that scale their losses what they are without."""
        if self.scaling is None:
            return
        own = {
            model: [p.grad for p in self.members[model].updater.parameters if p.grad is not None]
            for model in models
        }
        self.scaling.unscale(self._packed.gradients(), own)

    # --- for whoever captures steps ---------------------------------------------------------------

    def wants_capture(self, models: Sequence[ModelId]) -> bool:
        """Whether steps of these models are to be captured; they have been run before."""
        return self._chosen.captured and self._packed_for == tuple(models)

    @property
    def packing(self) -> object:
        """Another one each time that state is packed anew."""
        return self._packed

    def settled(self, split: str, size: int, models: Sequence[ModelId]) -> list[Bound] | None:
        """The programs of a step, once each has been run and has the form that it will keep."""
        keys = [(f"{split}/{size}", ids, True) for ids in self._chosen.programs]
        bounds = [self._programs.get(key) for key in keys]
        found = [bound for bound in bounds if bound is not None and bound.settled]
        return found if len(found) == len(keys) else None

    def whole_step(self, bounds: Sequence[Bound], leaves: Leaves) -> dict[ModelId, Tensor]:
        """Losses of programs whose gradients and buffers are written; raises what they raise."""
        drawn = [bound.draw() for bound in bounds]
        self.forget_gradients([model for bound in bounds for model in bound.models])
        found: dict[ModelId, Tensor] = {}
        for bound, numbers in zip(bounds, drawn):
            results = self._train(bound, leaves, numbers, undo=False)
            found |= {model: result.loss for model, result in results.items()}
        self._unscale(list(found))
        return found

    def forget_gradients(self, models: Sequence[ModelId]) -> None:
        """Let go of the last step's gradients."""
        self._packed.zero_grad()
        for model in models:
            self.members[model].updater.zero_grad()

    def with_gradient(self, models: Sequence[ModelId]) -> list[Tensor]:
        """Packed leaves, and parameters in no pack, that have a gradient now."""
        own = [p for model in models for p in self.members[model].updater.parameters]
        own = [parameter for parameter in own if id(parameter) not in self._packed.held]
        leaves = [leaf for leaf, _ in self._packed.learning]
        return [tensor for tensor in (*leaves, *own) if tensor.grad is not None]

    def hand_out_gradients(self, *, anew: bool = False) -> None:
        """Make each parameter's gradient of this step readable as its `.grad`."""
        if self.updates is not None:
            self._packed.hand_out_gradients(anew=anew)

    def update(self, models: Sequence[ModelId]) -> dict[ModelId, Exception]:
        """The optimizer step of the given models; returns what failed.

        A model that has diverged and is to end for it stays as it is.
        """
        without = frozenset(model for model in models if self.members[model].diverged)
        if self.updates is not None and set(models) == set(self._packed_for):
            self.updates.step(without)
            rest = [model for model in models if not self.updates.covers(model)]
        else:
            self.hand_out_gradients()
            self._drop_updates()
            rest = list(models)
        if rest:
            self.hand_out_gradients()
        failures = self.step_alone([model for model in rest if model not in without])
        if self.scaling is not None:
            self.scaling.update(models)
        return failures

    def step_alone(self, models: Sequence[ModelId]) -> dict[ModelId, Exception]:
        """Let the models' own optimizers take the step; returns what failed."""
        failures: dict[ModelId, Exception] = {}
        for model in models:
            try:
                self.members[model].step()
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
            return bound.outcomes(results)
        except Exception as error:
            bound.restore()
            failure = without_frames(error)
        if len(models) == 1:
            return {models[0]: failure}
        if packed and is_out_of_memory(failure) and self._divide(failure):
            self._packed_for = ()  # packed anew at the next batch
        accelerator_for(self.device).release()
        outcomes: dict[ModelId, Outcome] = {}
        for model in models:
            outcomes |= self._evaluate([model], leaves, size, packed=False)
        return outcomes

    def sync(self) -> None:
        """Bring each model's own optimizer up to date, for a checkpoint."""
        if self.updates is not None:
            self.updates.sync()

    def _drop_updates(self) -> None:
        """Go back to the models' own optimizers."""
        self.sync()
        self.updates = None

    def _pack(self, models: Sequence[ModelId]) -> None:
        """Arrange the state of the models that run now; a model that left keeps its own."""
        if self._packed_for != tuple(models):
            self._repack(models)

    def _repack(self, models: Sequence[ModelId]) -> None:
        self._drop_updates()
        self._packed_for = tuple(models)
        self._programs = {key: bound for key, bound in self._programs.items() if not key[2]}
        self._chosen = self._choose(restrict(self._graph, models=set(models)), models)
        if self._most_models:
            self._chosen = divided(self._chosen, self._most_models)
        if math.isfinite(self._chosen.limit_bytes):
            specs = {model: self.members[model].entry.training for model in models}
            limit = self._chosen.limit_bytes
            self._chosen, self.estimate = fit(self._chosen, specs, limit, self.device, self._tell)
        self._packed = PackedState(plan_packs(self._chosen.graph), self.members)
        accelerator_for(self.device).release()
        for member in self.members.values():
            release(member, self._packed.held)

    def _bound(self, program: str, models: Sequence[ModelId], *, packed: bool = True) -> Bound:
        key = program, tuple(models), packed
        bound = self._programs.get(key)
        if bound is None:
            graph = self._chosen.graph if packed else self._graph
            part = restrict(graph, models=set(models))
            state = self._packed if packed else PackedState((), self.members)
            ways = self._chosen.ways if packed else {}
            last = self._chosen.images_last
            chosen = self._chosen if packed else Choice(graph, ())
            again = self._chosen.recompute and program.startswith("train/")
            lowered = lower(
                part,
                program,
                self.device,
                state.packs,
                ways=ways,
                images_last=last,
                recompute=again,
            )
            where = f"{program}/{','.join(models)}"
            given = lowered, self.members, self._constants, state, self._learning, chosen, where
            bound = Bound(*given, models=models, scaling=self.scaling)
            self._programs[key] = bound
        return bound

    def forget(self, model: ModelId) -> None:
        """Drop the programs that an ended model was part of."""
        self._programs = {key: b for key, b in self._programs.items() if model not in key[1]}


#: A step's random tensors by the names of the nodes that they stand for.
Drawn = Mapping[tuple[str, ...], Tensor]


def _singles(drawn: Sequence[Drawn]) -> dict[str, Tensor]:
    """Random tensors by the single nodes that they stand for."""
    return {
        name: lane
        for numbers in drawn
        for names, value in numbers.items()
        for name, lane in zip(names, value if len(names) > 1 else [value])
    }


class Bound:
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
        models: Sequence[ModelId],
        scaling: Scaling | None,
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
        self._plan_seeds(scaling)
        self._learning = [
            position
            for position, value in enumerate(self._values)
            if value is not None and value.requires_grad
        ]
        self._with_gradient: list[int] = []  # of these, once a step has been run
        self.models, self._trains = models, name.startswith("train/")
        make = partial(Taped, buffers=self._buffers, wanted=chosen.taped)
        compiled = None if chosen.improve is None else partial(chosen.improve, name)
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
        self.updates: list[tuple[int, Tensor]] = []
        for position, result in enumerate(self.lowered.results):
            if result.outputs[0].role == "update":
                self.updates.append((position, self._buffer(result.outputs[0], result.packed)))
        written = [self._buffer(output, True) for output in self.lowered.written]
        targets = {id(target): target for target in [t for _, t in self.updates] + written}
        self._buffers = list(targets.values())
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    def _plan_seeds(self, scaling: Scaling | None) -> None:
        """Which losses are scaled by what; scales are read anew at every step."""
        self._scale: Tensor | None = None
        self._lanes: dict[int, Tensor] = {}
        for position, result in self.losses:
            models = [output.model for output in result.outputs]
            if scaling is not None and scaling.covers(models):
                self._scale, self._lanes[position] = scaling.scale, scaling.lanes(models)

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

    def together(self, single: Mapping[str, Tensor]) -> Drawn:
        """A step's random tensors from those of single nodes, drawn before."""
        found: dict[tuple[str, ...], Tensor] = {}
        for _, source in self._random:
            names = tuple(node.name for node in source.nodes)
            lanes = [single[name] for name in names]
            found[names] = torch.stack(lanes) if source.packed else lanes[0]
        return found

    @property
    def settled(self) -> bool:
        """Whether it was run, and has the form that it will keep."""
        return (self._step if self._trains else self._forward).settled

    @property
    def count(self) -> int:
        """How many results it gives."""
        return len(self.lowered.results)

    @property
    def generators(self) -> list[torch.Generator]:
        """What it draws from, each once."""
        return list({id(generator): generator for *_, generator in self._draws}.values())

    def outcomes(self, results: Sequence[Tensor]) -> dict[ModelId, Outcome]:
        """What each model computed in evaluation, from the program's results."""
        found: dict[ModelId, dict[str, Tensor]] = {model: {} for model in self.models}
        for result, value in zip(self.lowered.results, results):
            for output, lane in _lanes_of(result, value):
                found[output.model][output.role] = lane
        return {m: Result(roles["loss"], roles.get("prediction")) for m, roles in found.items()}

    def train(self, leaves: Leaves, drawn: Drawn, *, undo: bool = True) -> list[Tensor]:
        """One forward and backward: results, and gradients added to those of the sources.

        Buffers may already be written when it raises; with `undo`, `restore` takes that back.
        """
        values = self._handed(leaves, drawn, undo)
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
        results = self.lowered(values[: len(self._values)])
        learning = [p for p, _ in self.losses if results[p].requires_grad]
        if learning:  # gradients of the sum of losses, without computing the sum
            scale = values[-1]  # where one of the losses is scaled
            torch.autograd.backward(
                [results[position] for position in learning],
                [
                    seeds(scale, self._lanes[position], results[position])
                    if position in self._lanes
                    else torch.ones_like(results[position])
                    for position in learning
                ],
            )
        self._with_gradient = [i for i in self._learning if values[i].grad is not None]
        gradients = [values[i].grad for i in self._with_gradient]
        for position, gradient in earlier.items():
            now = values[position].grad
            assert gradient is not None
            values[position].grad = gradient if now is None else gradient + now
        return [*(result.detach() for result in results), *gradients]  # type: ignore[list-item]

    def evaluate(self, leaves: Leaves, drawn: Drawn, *, undo: bool = True) -> list[Tensor]:
        """One forward without gradients; buffers may already be written when it raises."""
        with torch.no_grad():
            return list(self._forward(self._handed(leaves, drawn, undo)))

    def _handed(self, leaves: Leaves, drawn: Drawn, undo: bool) -> list[Tensor]:
        """The tensors of all sources for one batch; with `undo`, buffers are kept."""
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
        if self._buffers and undo:
            torch._foreach_copy_(self._before, self._buffers)
        scale = [] if self._scale is None else [self._scale]
        return [*values, *scale]  # type: ignore[list-item]

    def commit(self, results: Sequence[Tensor]) -> None:
        """Write the buffers' new values."""
        if not self.updates:
            return
        with torch.no_grad():
            targets = [target for _, target in self.updates]
            torch._foreach_copy_(targets, [results[position] for position, _ in self.updates])

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
