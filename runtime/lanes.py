"""How the models of one loader compute their losses: merged, or each by its own module.

Both kinds have the same two methods. `train` computes losses and gradients, `evaluate` losses and
predictions; both return a result or an exception for each model, so that a model that fails leaves
its neighbours' numbers as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgo.errors import DataError
from cgo.graph import Graph, ModelId, Node, Output, restrict
from cgo.model import loss_function
from cgo.runtime.data import Leaves, preserved_random_state
from cgo.runtime.lower import Lowered, lower
from cgo.runtime.member import Member
from cgo.runtime.operators import drawer
from cgo.runtime.state import RandomState
from cgo.runtime.step import autocast, compute, eval_mode


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
    ) -> None:
        self.members = {member.id: member for member in members}
        self._graph = graph
        self._constants = constants
        self._device = device
        self._programs: dict[tuple[str, tuple[ModelId, ...]], _Bound] = {}

    def train(self, models: Sequence[ModelId], leaves: Leaves, size: int) -> dict[ModelId, Outcome]:
        """Losses of the given models; their gradients are in the parameters' `.grad`."""
        bound = self._bound(f"train/{size}", models)
        drawn = bound.draw()
        try:
            return self._train(bound, leaves, drawn)
        except Exception as error:
            bound.restore()
            if len(models) == 1:
                return {models[0]: error}
            return self._train_apart(models, leaves, size, drawn)

    def _train(
        self, bound: _Bound, leaves: Leaves, drawn: Mapping[str, Tensor]
    ) -> dict[ModelId, Outcome]:
        results = bound.run(leaves, drawn)
        losses = {model: results[position] for model, position in bound.losses}
        learning = [loss for loss in losses.values() if loss.requires_grad]
        if learning:  # gradients of the sum of losses, without computing the sum
            torch.autograd.backward(learning)
        bound.commit(results)
        return {model: Result(loss) for model, loss in losses.items()}

    def _train_apart(
        self, models: Sequence[ModelId], leaves: Leaves, size: int, drawn: Mapping[str, Tensor]
    ) -> dict[ModelId, Outcome]:
        """Run each model alone on the same random numbers, to find which of them raises."""
        outcomes: dict[ModelId, Outcome] = {}
        for model in models:
            self.members[model].updater.zero_grad()
            bound = self._bound(f"train/{size}", [model])
            try:
                outcomes |= self._train(bound, leaves, drawn)
            except Exception as error:
                bound.restore()
                outcomes[model] = error
        return outcomes

    def evaluate(
        self, models: Sequence[ModelId], leaves: Leaves, size: int
    ) -> dict[ModelId, Outcome]:
        """Losses and predictions of the given models, without gradients."""
        bound = self._bound(f"validation/{size}", models)
        try:
            with torch.no_grad():
                results = bound.run(leaves, bound.draw())
            bound.commit(results)  # a module may keep count in evaluation mode, too
        except Exception as error:
            bound.restore()
            if len(models) == 1:
                return {models[0]: error}
            outcomes: dict[ModelId, Outcome] = {}
            for model in models:
                outcomes |= self.evaluate([model], leaves, size)
            return outcomes
        found: dict[ModelId, dict[str, Tensor]] = {model: {} for model in models}
        for output, value in zip(bound.lowered.outputs, results):
            found[output.model][output.role] = value
        return {m: Result(roles["loss"], roles.get("prediction")) for m, roles in found.items()}

    def _bound(self, program: str, models: Sequence[ModelId]) -> _Bound:
        key = program, tuple(models)
        bound = self._programs.get(key)
        if bound is None:
            part = restrict(self._graph, models=set(models))
            lowered = lower(part, program, self._device)
            bound = _Bound(lowered, self.members, self._constants)
            self._programs[key] = bound
        return bound

    def forget(self, model: ModelId) -> None:
        """Drop the programs that an ended model was part of."""
        self._programs = {key: b for key, b in self._programs.items() if model not in key[1]}


class _Bound:
    """A lowered program with the tensors that its sources stand for."""

    def __init__(
        self,
        lowered: Lowered,
        members: Mapping[ModelId, Member],
        constants: Mapping[str, Tensor],
    ) -> None:
        self.lowered = lowered
        self._values: list[Tensor | None] = []
        self._inputs: list[tuple[int, str, torch.dtype, torch.Size]] = []
        random: list[tuple[int, Node]] = []
        for position, node in enumerate(lowered.sources):
            value: Tensor | None = None
            if node.op == "cgo.input":
                self._inputs.append((position, *_expected(node)))
            elif node.op == "cgo.random":
                random.append((position, node))
            elif node.op == "cgo.constant":
                value = constants[str(node.keyword("content"))]
            else:
                owner = members[str(node.keyword("model"))]
                value = owner.state.tensors[str(node.keyword("path"))]
            self._values.append(value)
        # Each model's draws in its own operator order; the order between models is of no account.
        random.sort(key=lambda item: int(item[1].keyword("order")))  # type: ignore[arg-type]
        self._random = [(position, node.name) for position, node in random]
        self._draws = [
            (
                node.name,
                drawer(node, lowered.device),
                members[str(node.keyword("model"))].state.generator,
            )
            for _, node in random
        ]
        self.losses = [
            (output.model, position)
            for position, output in enumerate(lowered.outputs)
            if output.role == "loss"
        ]
        self._updates = self._find_updates(members)
        buffers = {id(buffer): buffer for _, _, buffer in self._updates}
        self._buffers = list(buffers.values())
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    def _find_updates(self, members: Mapping[ModelId, Member]) -> list[tuple[int, Output, Tensor]]:
        return [
            (position, output, members[output.model].state.tensors[output.key])
            for position, output in enumerate(self.lowered.outputs)
            if output.role == "update"
        ]

    def draw(self) -> dict[str, Tensor]:
        """This step's random tensors, each model's from its own stream in its own order."""
        return {name: draw(generator) for name, draw, generator in self._draws}

    def run(self, leaves: Leaves, drawn: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the program on one batch; buffers may already be written when it raises."""
        values = self._values.copy()
        for position, name, dtype, shape in self._inputs:
            leaf = leaves.get(name)
            if leaf is None or leaf.dtype is not dtype or leaf.shape != shape:
                raise _unexpected(leaves, name, dtype, shape)
            values[position] = leaf
        for position, name in self._random:
            values[position] = drawn[name]
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        return self.lowered(values)  # type: ignore[arg-type]

    def commit(self, results: Sequence[Tensor]) -> None:
        """Write the buffers' new values."""
        if not self._updates:
            return
        with torch.no_grad():
            for position, _, buffer in self._updates:
                if results[position] is not buffer:
                    buffer.copy_(results[position])

    def restore(self) -> None:
        """Undo what a failed run wrote into buffers."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)


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
