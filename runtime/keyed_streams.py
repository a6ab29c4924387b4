"""The keyed streams of the models on one device: their steps, and the draws of one program.

What a number is, `cgo.runtime.keyed_draws` defines. A model's step is how many batches it has been
trained on, or evaluated on, before: the count lies on the device, and a captured step raises it
itself. It is part of the model's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgo.dtypes import torch_dtype
from cgo.graph import Graph, ModelId, Node, TensorType
from cgo.runtime import triton_kernels
from cgo.runtime.builder import Source
from cgo.runtime.keyed_draws import DOMAINS, Draw, check, fill, stream_key
from cgo.runtime.member import Member
from cgo.runtime.operators import empty, parameters_of
from cgo.tuning import Tuning

#: Tensors that are cut from one start at multiples of so many elements, for aligned reads.
_ALIGNED = 64


def are_keyed(device: torch.device, wanted: str | None) -> bool:
    """Whether models draw from keyed streams on a device.

    Args:
        device: Where.
        wanted: `Tuning.streams`.
    """
    return device.type == "cuda" if wanted is None else wanted == "keyed"


class Streams:
    """The streams of the models on one device.

    Args:
        members: The models.
        graph: What they compute.
        device: Where.
        kernels: `Tuning.kernels`.
    """

    def __init__(
        self,
        members: Mapping[ModelId, Member],
        graph: Graph,
        device: torch.device,
        kernels: bool | None = None,
    ) -> None:
        self.device, self.kernels = device, triton_kernels.usable(device, kernels)
        self._members = members
        self._slots = {model: index for index, model in enumerate(members)}
        self._drawing = {
            (str(node.keyword("model")), _split(node))
            for node in graph.nodes
            if node.op == "cgo.random"
        }
        steps = [member.state.steps[split] for split in DOMAINS for member in members.values()]
        #: By split, and by model of a split.
        self.counts = torch.tensor(steps, dtype=torch.int64, device=device)

    @classmethod
    def of(
        cls,
        members: Mapping[ModelId, Member],
        graph: Graph,
        device: torch.device,
        tuning: Tuning,
    ) -> Streams | None:
        """Those that the models draw from; None where each draws from its own generator."""
        if not are_keyed(device, tuning.streams):
            return None
        return cls(members, graph, device, tuning.kernels)

    def slot(self, model: ModelId, split: str) -> int:
        """Where a model's steps are counted."""
        return DOMAINS[split] * len(self._slots) + self._slots[model]

    def key(self, node: Node) -> int:
        """Of a drawing operator's stream."""
        model, order = str(node.keyword("model")), node.keyword("order")
        assert isinstance(order, int)
        return stream_key(self._members[model].entry.seed, order, DOMAINS[_split(node)])

    def one_step(self, models: Sequence[ModelId], split: str) -> Tensor | None:
        """What a step of these models adds to the counts; None where none of them draws."""
        if self._drawing.isdisjoint((model, split) for model in models):
            return None
        added = [0] * len(self.counts)
        for model in models:
            added[self.slot(model, split)] = 1
        return torch.tensor(added, dtype=torch.int64, device=self.device)

    def store(self) -> None:
        """Tell the models' states how far they are; waits for the device."""
        if not self._drawing:
            return
        counts = self.counts.tolist()
        for model, member in self._members.items():
            member.state.steps = {split: counts[self.slot(model, split)] for split in DOMAINS}


def _split(node: Node) -> str:
    """The kind of program that a drawing operator is of; its name is "model/train/64/name"."""
    return node.name.rsplit("/", 3)[1]


@dataclass(frozen=True)
class _Part:
    """Where the random tensor of a source is cut from the one that is filled."""

    names: tuple[str, ...]
    start: int
    elements: int  # of all its lanes
    members: int | None  # lanes, where it is packed
    type: TensorType

    def cut(self, whole: Tensor) -> Tensor:
        shape = self.type.shape if self.members is None else (self.members, *self.type.shape)
        return whole[self.start : self.start + self.elements].view(shape)


@dataclass(frozen=True)
class _Lane:
    """What one model draws there."""

    start: int
    elements: int
    draw: Draw
    slot: int


class KeyedDraws:
    """Everything that one program draws in a step.

    Args:
        sources: Its random tensors.
        streams: What is drawn from.
        models: All models of the program.
        split: Its kind.
    """

    def __init__(
        self, sources: Sequence[Source], streams: Streams, models: Sequence[ModelId], split: str
    ) -> None:
        self._streams = streams
        self._step = streams.one_step(models, split)
        self._sizes: dict[torch.dtype, int] = {}
        self._parts: list[tuple[torch.dtype, _Part]] = []
        self._lanes: dict[torch.dtype, list[_Lane]] = {}
        for source in sources:
            self._place(source)
        self._tables = {dtype: self._planned(dtype) for dtype in self._sizes}

    def _place(self, source: Source) -> None:
        type_ = source.nodes[0].types[0]
        assert type_ is not None
        dtype, one = torch_dtype(type_.dtype), math.prod(type_.shape)
        start, elements = self._sizes.get(dtype, 0), one * len(source.nodes)
        names = tuple(node.name for node in source.nodes)
        members = len(names) if source.packed else None
        self._parts.append((dtype, _Part(names, start, elements, members, type_)))
        self._sizes[dtype] = start + math.ceil(elements / _ALIGNED) * _ALIGNED
        for lane, node in enumerate(source.nodes):
            given = str(node.keyword("distribution")), parameters_of(node)
            draw = Draw(*given, self._streams.key(node))
            check(draw)
            slot = self._streams.slot(str(node.keyword("model")), _split(node))
            if one:
                place = _Lane(start + lane * one, one, draw, slot)
                self._lanes.setdefault(dtype, []).append(place)

    def _planned(self, dtype: torch.dtype) -> list[Any]:
        """What kernels draw of a dtype; the other lanes remain for torch's operators."""
        if not self._streams.kernels:
            return []
        from cgo.runtime.triton_kernels import draws  # where Triton is

        kinds: dict[str, list[draws.Segment]] = {}
        rest: list[_Lane] = []
        for lane in self._lanes.get(dtype, ()):
            kind = draws.kind_of(lane.draw, dtype)
            if kind is None:
                rest.append(lane)
            else:
                segment = draws.Segment(lane.start, lane.elements, lane.draw, lane.slot)
                kinds.setdefault(kind, []).append(segment)
        self._lanes[dtype] = rest
        device = self._streams.device
        return [draws.Table(kind, found, dtype, device) for kind, found in kinds.items()]

    def __call__(self) -> dict[tuple[str, ...], Tensor]:
        """This step's random tensors, by the names of nodes that they stand for; counts it."""
        counts, device = self._streams.counts, self._streams.device
        whole: dict[torch.dtype, Tensor] = {}
        for dtype, size in self._sizes.items():
            whole[dtype] = out = torch.empty(size, dtype=dtype, device=device)
            for table in self._tables[dtype]:
                table.fill(out, counts)
            for lane in self._lanes.get(dtype, ()):
                place = out[lane.start : lane.start + lane.elements]
                fill(place, lane.draw, counts[lane.slot])
        if self._step is not None:
            counts.add_(self._step)
        return {part.names: _laid_out(part, whole[dtype], device) for dtype, part in self._parts}


def _laid_out(part: _Part, whole: Tensor, device: torch.device) -> Tensor:
    """In the memory layout that the program was captured with."""
    value = part.cut(whole)
    if part.type.stride is None or part.members is not None:
        return value
    return empty(part.type, device).copy_(value)
