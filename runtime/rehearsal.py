"""Steps on fake tensors, which have shapes and storages but no elements, to see what they hold.

The storages that are alive at one time are added up while a program runs forward and backward, so
what autograd keeps for the backward is what it keeps in a true step, and no table of operators has
to say it. The optimizers' step is rehearsed in the same way.

Source of the way: `torch.distributed._tools.mem_tracker`.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cgo.dtypes import torch_dtype
from cgo.errors import ModelError
from cgo.graph import ModelId, TensorType
from cgo.model import TrainingSpec
from cgo.private.dispatch_modes import TorchDispatchMode
from cgo.private.fake_tensors import FakeTensorMode
from cgo.private.operators import OpOverload
from cgo.private.trees import tree_iter
from cgo.runtime.accelerator import accelerator_for
from cgo.runtime.builder import Source
from cgo.runtime.gradients import Place
from cgo.runtime.lower import Lowered
from cgo.runtime.optimizers import Updater, moments_of
from cgo.runtime.packing import Pack, rehome
from cgo.runtime.updates import Updates

log = logging.getLogger(__name__)

#: Sizes that allocators round up to, in bytes, by type of device.
_BLOCKS = {"cuda": 512}


@dataclass(frozen=True)
class Held:
    """Bytes that something holds on top of what it was given: at most, and when it is done."""

    highest: int
    after: int


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive, of those made while it is on.

    Views and results in place have the storage of what they are of, and add nothing.

    Args:
        device_type: Whose allocator rounds sizes up.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.now = 0
        self.highest = 0
        self._block = _BLOCKS.get(device_type, 1)
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor], *, counted: bool) -> None:
        """Know tensors that were made before; where they are not counted, at no bytes."""
        for tensor in tensors:
            self._add(tensor.untyped_storage(), counted)

    def _add(self, storage: torch.UntypedStorage, counted: bool = True) -> None:
        key = id(storage)
        if key in self._alive:
            return
        size = math.ceil(storage.nbytes() / self._block) * self._block if counted else 0

        def ended(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, ended)
        self.now += size
        self.highest = max(self.highest, self.now)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func._schema.name.startswith("aten::_fused_"):
            return None  # steps of optimizers in place, which fake tensors do not all have
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._add(item.untyped_storage())
        return result


def _fake() -> FakeTensorMode:
    # Programs may hold true constants.
    return FakeTensorMode(allow_non_fake_inputs=True)


# --- forward and backward -------------------------------------------------------------------------


def rehearse_program(
    lowered: Lowered, learns: Callable[[Source], bool], device_type: str = "cpu"
) -> Held:
    """What a training program holds on top of its sources; gradients are what stays.

    Args:
        lowered: The program, lowered for the CPU: autograd has no queue for a device that is not
            there. What depends on the device has to have been decided by then.
        learns: Whether a source gets a gradient.
        device_type: Of the device that it is to run on.
    """
    with _fake():
        values = [_value(source).requires_grad_(learns(source)) for source in lowered.sources]
        live = LiveBytes(device_type)
        live.hold(values, counted=False)
        with live:
            _backward(_losses(lowered, values))
        return Held(live.highest, live.now)


def _value(source: Source) -> Tensor:
    type_ = next(node.types[0] for node in source.nodes if node.types[0] is not None)
    dtype = torch_dtype(type_.dtype)
    if source.packed:
        return torch.empty((len(source.nodes), *type_.shape), dtype=dtype)
    if type_.stride is None:
        return torch.empty(type_.shape, dtype=dtype)
    return torch.empty_strided(type_.shape, type_.stride, dtype=dtype)


def _losses(lowered: Lowered, values: Sequence[Tensor]) -> list[Tensor]:
    losses = [
        value
        for value, result in zip(lowered(values), lowered.results)
        if result.outputs[0].role == "loss"
    ]
    return [loss for loss in losses if loss.requires_grad]


def _backward(losses: list[Tensor]) -> None:
    if losses:
        torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])


# --- the optimizers' step -------------------------------------------------------------------------


def rehearse_update(
    types: Mapping[Place, TensorType],
    learning: frozenset[Place],
    packs: Sequence[Pack],
    trainings: Mapping[ModelId, TrainingSpec],
    device_type: str = "cpu",
    kernels: bool = False,
) -> Held:
    """What the first step of all optimizers holds on top of parameters and gradients.

    What stays are the optimizers' own tensors: moments, and hyper-parameters an element where the
    models' differ. Of optimizers that have no common step, torch's are taken to need one more
    gradient's bytes.

    Args:
        types: Of all parameters.
        learning: Those that get a gradient.
        packs: Those that lie in one tensor.
        trainings: By model; others take no step.
        device_type: Of the device that it is to run on.
        kernels: Whether steps are taken by kernels of our own.
    """
    accelerator = None if device_type == "cpu" else accelerator_for(torch.device("cpu"))
    with _fake():
        own = {place: _parameter(type_) for place, type_ in types.items()}
        leaves = [_leaf(own, pack) for pack in packs if pack.trainable]
        packed = {id(lane) for _, lanes in leaves for lane in lanes}
        learned = [leaf for leaf, _ in leaves]
        learned += [p for place, p in own.items() if place in learning and id(p) not in packed]
        for leaf in learned:
            leaf.grad = torch.empty_like(leaf)
        updaters = _updaters(own, trainings)
        live = LiveBytes(device_type)
        live.hold(learned, counted=True)
        live.hold([leaf.grad for leaf in learned if leaf.grad is not None], counted=True)
        given = live.now
        with live:
            updates = Updates(updaters, leaves, accelerator, kernels=kernels)
            if accelerator is not None:
                updates.without_kernels()
            updates.step()
        together = Held(live.highest - given, live.now - given)
    apart = [model for model in trainings if not updates.covers(model)]
    return _with_others(together, apart, types, learning, trainings)


def _parameter(type_: TensorType) -> nn.Parameter:
    return nn.Parameter(torch.empty(type_.shape, dtype=torch_dtype(type_.dtype)))


def _leaf(own: Mapping[Place, Tensor], pack: Pack) -> tuple[Tensor, list[Tensor]]:
    lanes = [own[place] for place in pack.places]
    leaf = torch.stack([lane.detach() for lane in lanes])
    rehome(lanes, leaf)
    return leaf.requires_grad_(True), lanes


def _updaters(
    own: Mapping[Place, Tensor], trainings: Mapping[ModelId, TrainingSpec]
) -> dict[ModelId, Updater]:
    """Of optimizers that can be made of tensors without values; the others step by themselves."""
    found: dict[ModelId, Updater] = {}
    for model, training in trainings.items():
        plain = replace(training, scheduler=None, scheduler_kwargs={})
        try:
            found[model] = Updater(plain, [p for place, p in own.items() if place[0] == model])
        except ModelError as error:
            log.debug("model %s is not rehearsed: %s", model, error)
    return found


def _with_others(
    together: Held,
    apart: Sequence[ModelId],
    types: Mapping[Place, TensorType],
    learning: frozenset[Place],
    trainings: Mapping[ModelId, TrainingSpec],
) -> Held:
    """Adds the optimizers that step by themselves, one after another."""
    after, most = together.after, 0
    for model in apart:
        size = sum(
            math.prod(type_.shape) * torch_dtype(type_.dtype).itemsize
            for place, type_ in types.items()
            if place[0] == model and place in learning
        )
        after += int(size * moments_of(trainings[model]))
        most = max(most, size)
    return Held(max(together.highest + after - together.after, after + most), after)
