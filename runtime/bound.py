"""A lowered program bound to the tensors that it reads and writes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cgo.dtypes import torch_dtype
from cgo.errors import DataError
from cgo.graph import ModelId, Node, Output, homes
from cgo.private import many_tensors
from cgo.runtime.builder import Result as LoweredResult
from cgo.runtime.builder import Source
from cgo.runtime.choice import Choice
from cgo.runtime.data import Leaves
from cgo.runtime.gradients import Place
from cgo.runtime.keyed_streams import KeyedDraws, Streams
from cgo.runtime.lower import Lowered
from cgo.runtime.member import Member
from cgo.runtime.operators import Fill, empty, filler
from cgo.runtime.packing import PackedState
from cgo.runtime.products import Product, collecting
from cgo.runtime.scaling import Scaling, seeds
from cgo.runtime.tape import memory_start
from cgo.runtime.taped import Taped, agree


@dataclass(frozen=True)
class Result:
    """What one model computed from one batch."""

    loss: Tensor
    prediction: Tensor | None = None


Outcome = Result | Exception


#: A step's random tensors by the names of the nodes that they stand for.
Drawn = Mapping[tuple[str, ...], Tensor]


def singles(drawn: Sequence[Drawn]) -> dict[str, Tensor]:
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
        streams: Streams | None = None,
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
        self._keyed: KeyedDraws | None = None
        self._draws: list[tuple[tuple[str, ...], int | None, Fill, torch.Generator]] = []
        if streams is None:
            self._draws = self._plan_draws()
        else:
            random = [source for _, source in self._random]
            self._keyed = KeyedDraws(random, streams, models, name.partition("/")[0])
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
        self._factored: list[int] = []  # of these, whose gradients are given as factors
        self._factorable: list[int] | None = None  # which may be; None: no step was run yet
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
        self._before = [torch.empty_like(buffer.detach()) for buffer in self._buffers]

    def _plan_seeds(self, scaling: Scaling | None) -> None:
        """Which losses are scaled by what; scales are read anew at every step."""
        self._scale: Tensor | None = None
        self._lanes: dict[int, Tensor] = {}
        self._ones: dict[int, Tensor] = {}
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
        if self._keyed is not None:
            return self._keyed()
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
    def waiting(self) -> bool:
        """Whether its training step may still take another form."""
        return self._step.waiting

    def passed(self) -> bool:
        """Count a step that was replayed elsewhere; True where the next one has to be run here."""
        return self._step.passed()

    @property
    def replaying(self) -> bool:
        """Whether its training step is replayed, by a tape that was checked."""
        return self._step.replaying

    @property
    def buffers(self) -> list[Tensor]:
        """What it writes in place."""
        return self._buffers

    @property
    def count(self) -> int:
        """How many results it gives."""
        return len(self.lowered.results)

    @property
    def generators(self) -> list[torch.Generator]:
        """What it draws from, each once; keyed streams are none."""
        return list({id(generator): generator for *_, generator in self._draws}.values())

    def outcomes(self, results: Sequence[Tensor]) -> dict[ModelId, Outcome]:
        """What each model computed in evaluation, from the program's results."""
        found: dict[ModelId, dict[str, Tensor]] = {model: {} for model in self.models}
        for result, value in zip(self.lowered.results, results):
            for output, lane in lanes_of(result, value):
                found[output.model][output.role] = lane
        return {m: Result(roles["loss"], roles.get("prediction")) for m, roles in found.items()}

    def train(self, leaves: Leaves, drawn: Drawn, *, undo: bool = True) -> list[Tensor]:
        """One forward and backward: results, and gradients added to those of the sources.

        Buffers may already be written when it raises; with `undo`, `restore` takes that back.
        Without, the step keeps its form: it is captured.
        """
        values = self._handed(leaves, drawn, undo)
        for position in self._learning:  # what another program gave is added to
            self._packed.products.drop(values[position])
        earlier = {position for position in self._learning if values[position].grad is not None}
        replayed = self._step.replaying
        results = list(self._step(values, keeps=not undo))
        own = len(self.lowered.results)
        self._keep(values, results[own:], earlier, replayed=replayed)
        return results[:own]

    def _keep(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        earlier: Collection[int],
        *,
        replayed: bool,
    ) -> None:
        """Make this step's gradients those of its sources; a plain step has, but for factors."""
        rest = iter(gradients)
        whole = [p for p in self._with_gradient if p not in self._factored]
        found = {values[position]: next(rest) for position in whole}
        for position in self._factored:
            product = Product(next(rest), next(rest))
            if position not in earlier:
                self._packed.products.hold(values[position], product)
            elif replayed:
                found[values[position]] = product.dense()
        for leaf, gradient in found.items() if replayed else ():
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient

    def _forward_backward(self, *values: Tensor) -> list[Tensor]:
        """The program's results, and this step's gradient of each source that has one.

        Those that are held as factors come last, each as two tensors.
        """
        earlier = {i: values[i].grad for i in self._learning if values[i].grad is not None}
        for position in earlier:
            values[position].grad = None
        results = self.lowered(values[: len(self._values)])
        products = self._backward(values, results)
        self._with_gradient = [i for i in self._learning if values[i].grad is not None]
        self._factored = self._held_as_factors(values, products)
        gradients = [values[i].grad for i in self._with_gradient if i not in self._factored]
        for i in self._factored:
            gradients += [products[id(values[i])].left, products[id(values[i])].right]
        for position, gradient in earlier.items():
            now = values[position].grad
            assert gradient is not None
            values[position].grad = gradient if now is None else gradient + now
        return [*(result.detach() for result in results), *gradients]  # type: ignore[list-item]

    def _backward(
        self, values: Sequence[Tensor], results: Sequence[Tensor]
    ) -> Mapping[int, Product]:
        """The gradients of the sum of losses, without computing the sum; noted are factors."""
        learning = [p for p, _ in self.losses if results[p].requires_grad]
        with collecting() as products:
            if learning:
                scale = values[-1]  # where one of the losses is scaled
                torch.autograd.backward(
                    [results[position] for position in learning],
                    [
                        seeds(scale, self._lanes[position], results[position])
                        if position in self._lanes
                        else self._one(position, results[position])
                        for position in learning
                    ],
                )
        return products.found()

    def _held_as_factors(
        self, values: Sequence[Tensor], products: Mapping[int, Product]
    ) -> list[int]:
        """The sources whose gradient is a product that nothing changes before it is used.

        Which they may be is found at the first step: packs that one call reads, once; whose
        gradient was the product, to the bit; and of which no factor is a leaf or a buffer, since
        others' steps may be taken before.
        """
        if self._factorable is None:
            lasting = {memory_start(t) for t in (*self._values, *self._buffers) if t is not None}
            self._factorable = [
                i
                for i in self._with_gradient
                if i in self.lowered.read_once
                and self.lowered.sources[i].packed
                and (product := products.get(id(values[i]))) is not None
                and lasting.isdisjoint({memory_start(product.left), memory_start(product.right)})
                and agree([product.dense()], [g for g in [values[i].grad] if g is not None])
            ]
        return [i for i in self._factorable if id(values[i]) in products]

    def _one(self, position: int, loss: Tensor) -> Tensor:
        """What the backward of a loss starts with: made once."""
        if position not in self._ones:
            self._ones[position] = torch.ones_like(loss, requires_grad=False)
        return self._ones[position]

    def evaluate(self, leaves: Leaves, drawn: Drawn, *, undo: bool = True) -> list[Tensor]:
        """One forward without gradients; buffers may already be written when it raises."""
        with torch.no_grad():
            return list(self._forward(self._handed(leaves, drawn, undo)))

    def _handed(self, leaves: Leaves, drawn: Drawn, undo: bool) -> list[Tensor]:
        """The tensors of all sources for one batch; with `undo`, buffers are kept."""
        values = self._values.copy()
        for position, name, dtype, shape in self._inputs:
            values[position] = expected_leaf(leaves, name, dtype, shape)
        for position, source in self._random:
            values[position] = drawn[tuple(node.name for node in source.nodes)]
        for position, parameter in self._idle:
            values[position] = parameter.detach()
        if self._buffers and undo:
            with torch.no_grad():  # a module may write parameters, too
                many_tensors.copy_(self._before, self._buffers)
        scale = [] if self._scale is None else [self._scale]
        return [*values, *scale]  # type: ignore[list-item]

    def commit(self, results: Sequence[Tensor]) -> None:
        """Write the buffers' new values."""
        if not self.updates:
            return
        with torch.no_grad():
            targets = [target for _, target in self.updates]
            many_tensors.copy_(targets, [results[position] for position, _ in self.updates])

    def restore(self) -> None:
        """Undo what a failed run wrote into buffers."""
        if self._buffers:
            with torch.no_grad():
                many_tensors.copy_(self._buffers, self._before)


def lanes_of(result: LoweredResult, value: Tensor) -> Iterator[tuple[Output, Tensor]]:
    """Each output of a result with its own value."""
    return zip(result.outputs, value.unbind(0) if result.packed else [value], strict=True)


def _expected(node: Node) -> tuple[str, torch.dtype, torch.Size]:
    type_ = node.types[0]
    assert type_ is not None
    return str(node.keyword("leaf")), torch_dtype(type_.dtype), torch.Size(type_.shape)


def expected_leaf(leaves: Leaves, name: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A leaf of a batch that has to be as the first batch's was.

    Raises:
        DataError: it is missing, or of another type.
    """
    leaf = leaves.get(name)
    if leaf is None:
        raise DataError(f"the batch has no {name}; it has {', '.join(leaves)}")
    if leaf.dtype is not dtype or leaf.shape != shape:
        raise DataError(
            f"the batch's {name} is {leaf.dtype} {list(leaf.shape)}; the first batch's was "
            f"{dtype} {list(shape)}"
        )
    return leaf
