"""How merged models are executed, as rules: what is fused how wide, and which models together.

Fusing saves the fixed cost of calls. What it costs is cache: a merged step runs all forwards, then
all backwards, so that the activations of all its models lie between, and a group's values pass
through at once. So small models are merged into one program, larger ones into several of a few
models each, which take turns; and operators over large values run one by one.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cgo.graph import (
    SOURCES,
    Graph,
    ModelId,
    Node,
    TensorType,
    bytes_of,
    inputs_of,
    is_training,
    program_of,
    restrict,
)
from cgo.operators import aten
from cgo.runtime.device_profile import CPU, DeviceProfile
from cgo.runtime.emitter import runs
from cgo.runtime.tape import Replay, Tape
from cgo.runtime.taped import Later

#: What operators give that are not worth staying together for.
_CHEAP_BYTES = 1024

#: Widths of a divided group.
_CHUNKS = (2, 4, 8)

#: Elements that kernels can count.
_COUNTED = 2**31 - 1

#: What a fused form must save of a loop's time, over the number of members: narrow groups have
#: least to gain, and pay for copies that no measurement of a single group sees. On a GPU, where
#: launches are all that copies of little values cost, it is no more than what measurements err by.
_CPU_MARGIN = 0.5
_MARGIN = 0.1

#: Marks the name of a group that is executed as a loop.
LOOP = "~"

#: Makes another form of a step from its name, its tape, its replay and one step's inputs, now or
#: later; None where the replay is to be kept.
Improve = Callable[[str, Tape, Replay, Sequence[Tensor]], Replay | Later | None]

#: What such groups are executed by, beside the names of forms.
LOOPED = "loop"


@dataclass(frozen=True)
class Way:
    """How a group is executed: by a form's name, and in which layout where that takes either."""

    form: str
    layout: str | None = None


@dataclass(frozen=True)
class Choice:
    """A graph whose groups are as they will be executed, and the models of each program."""

    graph: Graph
    programs: tuple[tuple[ModelId, ...], ...]
    ways: Mapping[str, Way] = field(default_factory=dict)  # of groups, by name
    taped: bool = False  # steps are recorded, and replayed by an interpreter
    improve: Improve | None = None  # of taped steps
    images_last: bool | None = None  # in memory; None: as the device has it
    limit_bytes: float = math.inf  # of a step, on top of parameters and buffers
    kernels: bool | None = None  # as `Tuning.kernels`, for optimizers
    captured: bool = False  # whole steps are captured, and replayed by the device
    whole: bool = False  # on a CPU, training steps are, where all that they do can be taped
    recompute: bool = False  # training steps keep little for the backward


@dataclass(frozen=True)
class Rules:
    """What is fused on a device.

    Args:
        most_lane_bytes: A group is a loop where one member's largest value is larger.
        most_program_bytes: Models are merged into one program while all that their operators give
            in a training step is no larger.
        chunked_bytes: A group whose members' largest values are larger in all may be divided.
        large_bytes: A group of larger members has to be: it is never fused at full width.
        most_elements: Of a packed value; kernels count in 32 bits.
        margin: What a fused form must save of a loop's time, over the number of members.
    """

    most_lane_bytes: float = math.inf
    most_program_bytes: float = math.inf
    chunked_bytes: float = math.inf
    large_bytes: float = math.inf
    most_elements: float = math.inf
    margin: float = _MARGIN

    def __call__(self, graph: Graph, models: Sequence[ModelId]) -> Choice:
        """Divide models into programs, and groups by program: `g7` becomes `g7.0` and `g7.1`.

        Groups that are loops get a name that ends in `~`. Models that share a stem stay together,
        so that it is computed once.
        """
        programs = self._programs(graph, models)
        types = {node.name: node.types for node in graph.nodes}

        def loops(members: Sequence[Node]) -> bool:
            return _lane_bytes(members[0], types) > self.most_lane_bytes

        return Choice(_regrouped(graph, programs, loops)[0], programs)

    def widths(self, size: int, lane_bytes: int, lane_elements: int) -> list[int]:
        """How many of a group's members may be fused at once, the widest last.

        Args:
            size: Members of the group.
            lane_bytes: Of one member's largest value.
            lane_elements: Likewise.
        """
        parts = max(1, math.ceil(size * lane_elements / self.most_elements))
        widest = -(-size // parts)
        divided = lane_bytes * size > self.chunked_bytes
        chunks = [w for w in _CHUNKS if w < widest] if divided else []
        return chunks if lane_bytes > self.large_bytes and chunks else [*chunks, widest]

    def _programs(self, graph: Graph, models: Sequence[ModelId]) -> tuple[tuple[ModelId, ...], ...]:
        sizes = _activation_bytes(graph)
        found: list[list[ModelId]] = []
        size = math.inf
        for together in _by_likeness(graph, _sharing(graph, models)):
            more = sum(sizes[model] for model in together)
            if size + more > self.most_program_bytes or not found:
                found.append([])
                size = 0
            found[-1] += together
            size += more
        return tuple(tuple(sorted(ids)) for ids in found)


def divided(choice: Choice, most_models: int) -> Choice:
    """The same choice with programs of at most so many models; groups are divided as well.

    Args:
        choice: What was chosen.
        most_models: Models of a program; those that share work stay together all the same.
    """
    programs: list[tuple[ModelId, ...]] = []
    for ids in choice.programs:
        current: list[ModelId] = []
        for together in _sharing(restrict(choice.graph, models=set(ids)), ids):
            if current and len(current) + len(together) > most_models:
                programs.append(tuple(sorted(current)))
                current = []
            current += together
        programs.append(tuple(sorted(current)))
    graph, origin = _regrouped(choice.graph, programs, lambda ms: (ms[0].group or "")[-1:] == LOOP)
    ways = {name: choice.ways[old] for name, old in origin.items() if old in choice.ways}
    return replace(choice, graph=graph, programs=tuple(programs), ways=ways)


def _regrouped(
    graph: Graph,
    programs: Sequence[Sequence[ModelId]],
    loops: Callable[[Sequence[Node]], bool],
) -> tuple[Graph, dict[str, str]]:
    """The graph with groups divided by program and loops marked; names, with those of before."""
    number = {model: index for index, ids in enumerate(programs) for model in ids}
    nodes: list[Node] = []
    origin: dict[str, str] = {}
    for members in runs(graph.nodes):
        old = members[0].group
        if old is None:
            nodes += members
            continue
        parts: dict[int, list[Node]] = defaultdict(list)
        for member in members:
            parts[number[min(member.owners)]].append(member)
        mark = LOOP if loops(members) else ""
        for index, part in parts.items():
            suffix = f".{index}" if len(parts) > 1 else ""
            name = f"{old.removesuffix(LOOP)}{suffix}{mark}" if len(part) > 1 else None
            nodes += [replace(n, group=name) if n.group != name else n for n in part]
            origin |= {} if name is None else {name: old}
    return Graph(tuple(nodes), graph.outputs), origin


def rules_for(device: torch.device) -> Rules:
    """What measurements on devices of this kind suggest (`benchmarks/README.md`)."""
    return rules_of(CPU) if device.type == "cpu" else Rules(most_elements=_COUNTED)


def rules_of(profile: DeviceProfile) -> Rules:
    """The rules that follow from what a device can do.

    On a CPU a group's values pass through a core's cache, which a single member of some size fills;
    a call costs about what moving a few kilobytes does. A GPU needs millions of elements to be
    busy, and its cache is no faster than a few times its memory: there, wider is never worse.
    """
    if profile.kind != "cpu":
        return Rules(most_elements=_COUNTED)
    return Rules(
        most_lane_bytes=profile.cache_bytes / 16,
        most_program_bytes=profile.turn_bytes,
        chunked_bytes=profile.cache_bytes / 8,
        large_bytes=profile.cache_bytes / 4,
        margin=_CPU_MARGIN,
    )


def _sharing(graph: Graph, models: Sequence[ModelId]) -> list[list[ModelId]]:
    """Models that share work worth sharing: not views and counters, which cost nothing."""
    together = {model: [model] for model in models}
    for node in graph.nodes:
        if len(node.owners) > 1 and _costly(node):
            met = _each_once(together[model] for model in node.owners)
            if len(met) > 1:
                whole = sorted(itertools.chain.from_iterable(met))
                together |= dict.fromkeys(whole, whole)
    return _each_once(together.values())


def _each_once(parts: Iterable[list[ModelId]]) -> list[list[ModelId]]:
    return list({id(part): part for part in parts}.values())


def _costly(node: Node) -> bool:
    overload = aten(node.op)
    view = overload is not None and overload.is_view
    return node.op not in SOURCES and not view and sum(map(bytes_of, node.types)) > _CHEAP_BYTES


def _by_likeness(graph: Graph, parts: Sequence[list[ModelId]]) -> list[list[ModelId]]:
    """Parts in an order in which those that stand in the same groups are neighbours."""
    groups: dict[ModelId, set[str]] = defaultdict(set)
    for node in graph.nodes:
        if node.group is not None:
            for model in node.owners:
                groups[model].add(node.group)
    return sorted(parts, key=lambda ids: (sorted(set().union(*(groups[m] for m in ids))), ids))


def _activation_bytes(graph: Graph) -> Mapping[ModelId, int]:
    """Bytes of all that a model's operators give in its largest training program."""
    sizes: dict[tuple[ModelId, str], int] = defaultdict(int)
    for node in graph.nodes:
        if node.op not in SOURCES and is_training(node):
            for model in node.owners:
                sizes[model, program_of(node)] += sum(map(bytes_of, node.types))
    found: dict[ModelId, int] = defaultdict(int)
    for (model, _), size in sizes.items():
        found[model] = max(found[model], size)
    return found


def _lane_bytes(node: Node, types: Mapping[str, tuple[TensorType | None, ...]]) -> int:
    """The largest value that a node reads or gives; weights count as well."""
    read = [types[ref.name][ref.index] for ref in inputs_of(node)]
    return max(map(bytes_of, [*read, *node.types]), default=0)
