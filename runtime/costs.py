"""What groups cost, measured: forward and backward of every way of executing one.

What the table of costs (`cgo.runtime.cost_table`) does not hold is measured when a trial starts, as
far as its budget goes, and interpolated between sizes beyond that.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from cgo.graph import HANDED, Graph, Node, Ref, TensorType, inputs_of
from cgo.passes.sharing import argument_key
from cgo.runtime.accelerator import (
    Accelerator,
    accelerator_for,
    captured_seconds,
    without_frames,
)
from cgo.runtime.builder import Builder
from cgo.runtime.chains import behind_norms
from cgo.runtime.choice import LOOPED, Way
from cgo.runtime.cost_table import CostTable, Signature
from cgo.runtime.emitter import Column, Emitter, Group, Packed, Types, make_group
from cgo.runtime.gradients import learning_refs
from cgo.runtime.layouts import IMAGES, gather, to_channels, unstack
from cgo.runtime.precision import autocasting
from cgo.runtime.tape import Replay, TapeError, compile_tape, interpreted, record
from cgo.tuning import CHANNELS, LANES, STACKED

log = logging.getLogger(__name__)

#: Timed rounds of one measurement, and its most seconds.
_ROUNDS = 5
_MOST_S = 0.02

#: The least that an operator costs.
_LEAST_S = 1e-6

#: Inputs are rotated until they fill this much, as in a step, where others' values lie between.
_ROTATED_BYTES = 4e6
_MOST_SETS = 8

#: How what follows a norm is executed where that takes it over.
BEHIND = Way("elementwise", CHANNELS)

#: Widths at which fused forms are measured; between them costs a member are interpolated.
WIDTHS = (2, 4, 8, 16, 32)


def shared_inputs(nodes: Sequence[Node]) -> list[bool]:
    """Of each input of a group, whether all members read the same."""
    return [len(set(column)) == 1 for column in zip(*map(inputs_of, nodes))]


def signature_of(
    node: Node, types: Types, shared: Sequence[bool], idle: Sequence[int] = ()
) -> Signature:
    """The signature of a node in a group, of whose inputs some are the same for all members.

    Args:
        node: One of the group's members.
        types: Of all references.
        shared: For each of its inputs.
        idle: Inputs that were computed as floating-point numbers and carry no gradient.
    """
    refs: list[Any] = []
    arguments = (argument_key(node.args, refs), argument_key(node.kwargs, refs))
    read = [types[ref] for ref in refs]
    kinds = [None if t is None else (t.dtype, len(t.shape)) for t in (*read, *node.types)]
    shapes = [() if t is None else t.shape for t in (*read, *node.types)]
    family = repr((node.op, arguments, kinds, tuple(shared), node.autocast, *idle))
    elements = max((math.prod(shape) for shape in shapes), default=1)
    return Signature(_short(family), _short(repr(shapes)), elements)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Given:
    """A tensor that a group reads."""

    type: TensorType  # of a member's
    shape: tuple[int, ...]
    learns: bool
    images: bool
    layout: str  # of members' lanes in it; "lanes": it is one member's, or all read the same


@dataclass(frozen=True)
class Built:
    """A group as a function of what it reads."""

    function: Callable[..., Sequence[Tensor]]
    given: Sequence[Given]
    layouts: Sequence[str]  # of its results


class Timer:
    """Measures groups of a graph on a device.

    Args:
        device: Where.
        graph: What the groups are of.
        images_last: Images have channels last in memory; None: on a CPU.

    Attributes:
        types: The type of every reference in the graph.
    """

    def __init__(
        self, device: torch.device, graph: Graph, *, images_last: bool | None = None
    ) -> None:
        self._device = device
        self._last = device.type == "cpu" if images_last is None else images_last
        self._sources = {node.name: node for node in graph.nodes if node.op in HANDED}
        self._learning = learning_refs(graph)
        self._graph = graph
        self.types: Types = {
            Ref(node.name, index): type_
            for node in graph.nodes
            for index, type_ in enumerate(node.types)
        }

    @property
    def marked_last(self) -> bool:
        """Whether images have channels last where they would not by themselves."""
        return self._last and self._device.type != "cpu"

    @cached_property
    def _behind(self) -> Mapping[str, Sequence[Sequence[Node]]]:
        return behind_norms(self._graph)

    def behind(self, nodes: Sequence[Node]) -> Sequence[Sequence[Node]]:
        """Groups behind a group of batch norms that a kernel takes over, see `behind_norms`."""
        return self._behind.get(nodes[0].group or "", ())

    def applies(self, nodes: Sequence[Node], way: Way) -> bool:
        """Whether a group can be executed one way."""
        return self.built(nodes, way) is not None

    def timed(self, function: Callable[..., Sequence[Tensor]], sets: list[list[Tensor]]) -> float:
        """Median seconds of a forward and backward over values, which are given several times."""
        return _timed(function, sets)

    def repacked(self, kind: str, size: int) -> float:
        """Seconds of one of `KINDS`, for `_LANES` images of 8 channels, so high and wide."""
        return _repack_seconds(kind, size, self._device)

    def signature(self, nodes: Sequence[Node]) -> Signature:
        """What the cost of a group depends on."""
        idle = [
            position
            for position, refs in enumerate(zip(*map(inputs_of, nodes)))
            if self._is_computed(refs[0]) and not self._learns(refs)
        ]
        return signature_of(nodes[0], self.types, shared_inputs(nodes), idle)

    def _is_computed(self, ref: Ref) -> bool:
        """Whether a value is a floating-point number that no source hands over."""
        type_ = self.types[ref]
        floats = type_ is not None and type_.dtype.startswith(("float", "bfloat"))
        return floats and ref.name not in self._sources

    def seconds(
        self, nodes: Sequence[Node], way: Way, behind: Sequence[Sequence[Node]] = ()
    ) -> float:
        """Forward and backward of a group executed one way; infinite where that is impossible.

        With groups `behind` it, each of which reads the one before, element by element.

        Whatever it raises, running out of memory or a backward that an operator does not have,
        is raised by this way of executing the group alone: another is chosen.
        """
        built = self.built(nodes, way, behind)
        if built is None:
            return math.inf
        size = sum(math.prod(given.shape) * 4 for given in built.given)
        sets = max(1, min(_MOST_SETS, int(_ROTATED_BYTES / max(size, 1))))
        try:
            return self.timed(built.function, [self.values(built.given) for _ in range(sets)])
        except Exception as error:
            log.debug("%s as %s cannot be measured: %s", nodes[0].op, way, without_frames(error))
            return math.inf  # another way, or the rules

    def prepare(
        self, nodes: Sequence[Node], way: Way, behind: Sequence[Sequence[Node]] = ()
    ) -> None:
        """Have what `seconds` is to measure compiled; what is compiled is kept on disk."""
        if self._device.type == "cuda":
            self.seconds(nodes, way, behind)

    def built(
        self, nodes: Sequence[Node], way: Way, behind: Sequence[Sequence[Node]] = ()
    ) -> Built | None:
        """A group executed one way, as a function; None where that is impossible."""
        group = make_group(nodes, self.types)
        every = [node for several in (nodes, *behind) for node in several]
        emitter = Emitter(self._device, self.types, _once(every), self._last)
        builder = Builder(emitter, nodes[0].autocast)
        given = self._given(emitter, group, way)
        results = builder.write_way(group, way)
        for several in behind:
            group = make_group(several, self.types)
            given += self._given(emitter, group, BEHIND)
            results = results and builder.write_way(group, BEHIND)
        if results is None:
            return None
        packed = [emitter.packed(group.refs(i)[0]) for i in range(len(group.types))]
        layouts = {value.node: value.layout for value in packed if value is not None}
        function = self._under(nodes[0].autocast, builder.compiled(results))
        return Built(function, given, [layouts.get(node, LANES) for node in results])

    def values(self, given: Sequence[Given]) -> list[Tensor]:
        """Random values of what a group reads."""
        return [self._value(one) for one in given]

    def _under(
        self, setting: str | None, function: Callable[..., Sequence[Tensor]]
    ) -> Callable[..., Sequence[Tensor]]:
        """The function as its region runs it."""
        if setting is None:
            return function

        def run(*given: Tensor) -> Sequence[Tensor]:
            with autocasting(setting, self._device):
                return function(*given)

        return run

    def _given(self, emitter: Emitter, group: Group, way: Way) -> list[Given]:
        """What the group reads, as placeholders."""
        found: list[Given] = []
        done: set[Any] = set()

        def take(
            column: Column, shape: tuple[int, ...], refs: Sequence[Ref], layout: str
        ) -> fx.Node:
            images = column.ndim == IMAGES and column.refs[0].name not in self._sources
            found.append(Given(column.type, shape, self._learns(refs), images, layout))
            return emitter.graph.placeholder(f"s{len(emitter.graph.nodes)}")

        for column in group.columns:
            if column.refs in done or emitter.whole(column.refs) is not None:
                continue
            done.add(column.refs)
            if column.shared or way.form == LOOPED:
                for ref in dict.fromkeys(column.refs):
                    emitter.set(ref, take(column, column.shape, [ref], LANES))
                continue
            layout = self._layout(column, way)
            shape = _packed_shape(column.shape, len(column.refs), layout)
            packed = Packed(take(column, shape, column.refs, layout), layout)
            emitter.set_packed(column.refs, packed)
            if column.refs[0].name in self._sources:
                emitter.sources.add(id(packed))
        return found

    def _layout(self, column: Column, way: Way) -> str:
        computed = column.refs[0].name not in self._sources
        return CHANNELS if way.layout == CHANNELS and computed and column.ndim >= 2 else STACKED

    def _learns(self, refs: Sequence[Ref]) -> bool:
        """Whether values carry a gradient, alone or as lanes of one."""
        return not self._learning.isdisjoint(refs)

    def _value(self, given: Given) -> Tensor:
        dtype, shape = getattr(torch, given.type.dtype), given.shape
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        if given.images and self._last:  # behind an axis of members or not
            last = (*shape[:-3], *shape[-2:], shape[-3])
            value = torch.rand(last, dtype=dtype, device=self._device).movedim(-1, -3)
        else:
            value = torch.rand(shape, dtype=dtype, device=self._device)
        return value.requires_grad_(given.learns)


def _once(nodes: Sequence[Node]) -> Counter[Any]:
    """Every input is read once, and every result but the statistics of a norm."""
    readers: Counter[Any] = Counter(ref for node in nodes for ref in set(inputs_of(node)))
    for node in nodes:
        outputs = 1 if node.op == "cgo.batch_norm" else len(node.types)
        readers.update(Ref(node.name, i) for i in range(outputs) if node.types[i] is not None)
    return readers


def _packed_shape(shape: tuple[int, ...], size: int, layout: str) -> tuple[int, ...]:
    if layout == STACKED:
        return (size, *shape)
    return (shape[0], size * shape[1], *shape[2:])


def _timed(function: Callable[..., Sequence[Tensor]], sets: list[list[Tensor]]) -> float:
    """Median seconds of a forward and backward, without what a whole step pays only once."""
    if sets[0] and sets[0][0].is_cuda:
        return max(_LEAST_S, timed_captured(function, sets[0], accelerator_for(sets[0][0].device)))
    return max(_LEAST_S, _median(function, sets) - _fixed_s(sets[0][0].device if sets[0] else None))


@cache
def _fixed_s(device: torch.device | None) -> float:
    """Seconds of a forward and backward of next to nothing: of calls into a program and autograd.

    Without this, two operators measured one by one would seem to cost more than they do together.
    """
    values = [[torch.rand(8, device=device).requires_grad_()] for _ in range(_MOST_SETS)]

    def chain(length: int) -> float:
        def views(x: Tensor) -> list[Tensor]:
            for _ in range(length):
                x = x.view_as(x)
            return [x]

        return min(_median(views, values) for _ in range(5))

    one, five = chain(1), chain(5)
    return one - (five - one) / 4


def _median(function: Callable[..., Sequence[Tensor]], sets: list[list[Tensor]]) -> float:
    """Median seconds of a forward and backward over one of the sets, as a step would run it."""
    once = _replayed(function, sets[0])
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < _ROUNDS and (len(times) < 2 or time.perf_counter() - begun < _MOST_S):
        started = time.perf_counter()
        for values in sets:
            once(*values)
        times.append((time.perf_counter() - started) / len(sets))
    return statistics.median(times)


def timed_captured(
    function: Callable[..., Sequence[Tensor]], values: Sequence[Tensor], accelerator: Accelerator
) -> float:
    """Median seconds of a captured forward and backward, on one stream.

    Launches cost nothing in a captured step, so they must not count here. What may overlap on
    several streams alone does so far less in a whole step (on an H200, 32 cell networks gained 4%).
    """
    # Made beforehand: of a loop they would be a kernel for each member, that no step has.
    ends = [torch.ones_like(r) for r in _computed(function, values) if r.requires_grad]
    once = _forward_backward(function, ends)
    with torch.autograd.set_multithreading_enabled(False):  # kernels are chosen for each thread
        try:
            form: Replay = interpreted(record(once, values)[1])
        except TapeError:  # what was recorded has stopped midway
            form = once
        form(*values)  # chooses kernels
    return captured_seconds(accelerator, form, values, short=True)


def _replayed(function: Callable[..., Sequence[Tensor]], values: Sequence[Tensor]) -> Replay:
    """Forward and backward, by their tape where there can be one."""
    once = _forward_backward(function)
    try:
        replay = compile_tape(record(once, values)[1])
        replay(*values)
        return replay
    except (TapeError, RuntimeError):
        once(*values)
        return once


def _forward_backward(
    function: Callable[..., Sequence[Tensor]], ends: Sequence[Tensor] = ()
) -> Replay:
    """A step of the function that gives its gradients, or what it computes where it has none.

    Args:
        function: Of tensors.
        ends: Gradients of its results; default is ones that each step makes.
    """

    def once(*given: Tensor) -> Sequence[Tensor]:
        learning = [value for value in given if value.requires_grad]
        computed = _computed(function, given)
        results = [result for result in computed if result.requires_grad]
        if not results:
            return computed
        ones = ends or [torch.ones_like(result) for result in results]
        found = torch.autograd.grad(results, learning, ones, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    return once


def _computed(function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor]) -> list[Tensor]:
    return [result for result in function(*given) if isinstance(result, Tensor)]


@dataclass(frozen=True)
class Repacking:
    """What moving values between layouts costs, forward and backward: seconds a lane and a byte."""

    lane: Mapping[str, float]
    byte: Mapping[str, float]

    def __call__(self, kind: str, lanes: int, lane_bytes: int) -> float:
        """Seconds of one of `KINDS`, for so many lanes of so many bytes."""
        return lanes * (self.lane[kind] + self.byte[kind] * lane_bytes)


#: Ways of repacking: between the packed layouts, from lanes to each of them, and to lanes.
KINDS = ("convert", "to stacked", "to channels", "to lanes")


def repacking(
    table: CostTable,
    device: torch.device,
    *,
    measure: bool = True,
    timing: Callable[[str, int], float] | None = None,
) -> Repacking:
    """Costs of repacking at two sizes.

    Args:
        table: Known costs; measurements are added.
        device: Where values are moved.
        measure: Measure what the table does not have; else another device's costs have to do.
        timing: Measures one of `KINDS` at a size; default is on the device.
    """
    timing = timing or partial(_repack_seconds, device=device)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    sizes = _REPACKED.get(device.type, _REPACKED["cpu"])
    for size in sizes:
        for kind in KINDS:
            signature = Signature(f"repacking {kind}", str(size), size)
            known = table.get(signature, kind, _LANES)
            if known is None and not measure:
                known = table.near(signature, kind, _LANES)
                known = _LANES * _REPACK_S if known is None else known
            elif known is None:
                known = timing(kind, size)
                table.put(signature, kind, _LANES, known)
            seconds[kind].append(known / _LANES)
    small, large = (32 * 8 * size * size * 4 for size in sizes)
    byte = {k: max(0.0, (b - a) / (large - small)) for k, (a, b) in seconds.items()}
    lane = {k: max(0.0, a - byte[k] * small) for k, (a, _) in seconds.items()}
    return Repacking(lane, byte)


#: Heights and widths of images of 8 channels: within a cache, and beyond it on a GPU, where what is
#: small takes no time beside a launch.
_REPACKED = {"cpu": (2, 12), "cuda": (4, 80)}
_LANES = 8

#: About what moving a lane costs where nothing is known.
_REPACK_S = 2e-6


def _repack_seconds(kind: str, size: int, device: torch.device) -> float:
    return _timed(*repacking_of(kind, size, device))


def repacking_of(
    kind: str, size: int, device: torch.device
) -> tuple[Callable[..., Sequence[Tensor]], list[list[Tensor]]]:
    """One of `KINDS` as a function, and values for it: images of 8 channels, so high and wide."""
    stacked = [
        torch.rand(_LANES, 32, size, size, 8, device=device).movedim(-1, -3).requires_grad_()
        for _ in range(4)
    ]
    lanes = [[lane.detach().requires_grad_() for lane in value.unbind(0)] for value in stacked]
    given = lanes if kind in ("to stacked", "to channels") else [[value] for value in stacked]
    functions: dict[str, Callable[..., Sequence[Tensor]]] = {
        "convert": lambda value: [to_channels(value, _LANES)],
        "to stacked": lambda *own: [gather(list(own), STACKED)],
        "to channels": lambda *own: [gather(list(own), CHANNELS)],
        "to lanes": lambda value: list(unstack(value)),
    }
    return functions[kind], given
