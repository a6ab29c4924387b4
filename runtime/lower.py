"""From a program of the graph to a Python function over tensors.

Lowering writes a `torch.fx` graph and lets fx generate straight-line code, so that a training step
pays for its operators and for nothing that walks a graph. A group of nodes becomes one fused
operator where a form of `cgo.runtime.forms` applies, else what `vmap` makes of its operator, else a
loop over its members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgo.errors import GraphError
from cgo.graph import (
    HANDED,
    STATE,
    Graph,
    Node,
    Output,
    Ref,
    homes,
    inputs_of,
    restrict,
)
from cgo.runtime.builder import Builder, Decision, Result, Source
from cgo.runtime.choice import Way
from cgo.runtime.emitter import Emitter, Types, runs
from cgo.runtime.gradients import Place
from cgo.runtime.packing import Pack
from cgo.runtime.precision import autocasting
from cgo.tuning import STACKED


@dataclass(frozen=True)
class Lowered:
    """One program, ready to run.

    Calling it with one tensor for each of `sources`, in order, gives one tensor for each of
    `results`, in order. Outputs that it writes straight into their buffers are in `written`.
    """

    sources: tuple[Source, ...]
    results: tuple[Result, ...]
    written: tuple[Output, ...]
    decisions: tuple[Decision, ...]
    calls: int  # of torch functions
    regions: tuple[_Region, ...]
    device: torch.device
    read_once: frozenset[int]  # positions of sources that one call reads, once, and once a step

    @property
    def gathers(self) -> int:
        """Times that members' values are copied together for a group."""
        return sum(decision.gathers for decision in self.decisions)

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Run the program."""
        if len(self.regions) == 1 and self.regions[0].autocast is None:
            region = self.regions[0]  # reads all sources and writes all results, in order
            return list(region.function(*values))
        results: list[Tensor] = [None] * len(self.results)  # type: ignore[list-item]
        for region in self.regions:
            with autocasting(region.autocast, self.device):
                returned = region.function(*[values[index] for index in region.reads])
            for index, value in zip(region.writes, returned):
                results[index] = value
        return results


@dataclass(frozen=True)
class _Region:
    """The nodes of a program that run under one autocast setting; regions are independent."""

    autocast: str | None
    function: Callable[..., Sequence[Tensor]]
    reads: tuple[int, ...]  # positions in sources
    writes: tuple[int, ...]  # positions in results


def lower(
    graph: Graph,
    program: str,
    device: torch.device,
    packs: Sequence[Pack] = (),
    *,
    ways: Mapping[str, Way] | None = None,
    images_last: bool | None = None,
    recompute: bool = False,
) -> Lowered:
    """Make one program of a graph executable.

    Args:
        graph: The merged graph, restricted to the models that are to run.
        program: The program's name, such as "train/64".
        device: Where its tensors are.
        packs: Parameters and buffers that will be handed over as one tensor.
        ways: How groups are executed, by name; others in the first form that applies.
        images_last: Convolve images with channels last in memory; None: on a CPU. False leaves them
            in the format that they come in, so that a capture rounds as its module does.
        recompute: Keep little for the backward, and compute most once more there; the bits are the
            same.

    Raises:
        GraphError: the graph has no such program, or nodes of different autocast settings feed
            each other.
    """
    part = restrict(graph, program=program)
    if not part.outputs:
        raise GraphError(f"the graph has no program {program!r}")
    if images_last is None:
        images_last = device.type == "cpu"
    return _Lowering(part, device, packs, images_last, ways or {}, recompute).lowered()


class _Lowering:
    """One program on its way; results are collected over its regions."""

    def __init__(
        self,
        part: Graph,
        device: torch.device,
        packs: Sequence[Pack],
        images_last: bool,
        ways: Mapping[str, Way],
        recompute: bool,
    ) -> None:
        self.part, self.device, self.images_last, self.ways = part, device, images_last, ways
        self.recompute = recompute
        self.nodes = {node.name: node for node in part.nodes}
        self.types: Types = {
            Ref(node.name, index): type_
            for node in part.nodes
            for index, type_ in enumerate(node.types)
        }
        self.readers = _readers(part)
        self.settings = _settings(part)
        self.sources = _sources(part, packs)
        self.packs = packs
        self.results: list[Result] = []
        self.written: list[Output] = []
        self.decisions: list[Decision] = []
        self.calls = 0
        self.reads: Counter[int] = Counter()  # of each source, by calls

    def lowered(self) -> Lowered:
        regions = [self._region(s) for s in dict.fromkeys(self.settings.values())]
        return Lowered(
            self.sources,
            tuple(self.results),
            tuple(self.written),
            tuple(self.decisions),
            self.calls,
            tuple(regions),
            self.device,
            frozenset(i for i, n in self.reads.items() if n == 1 and not self.recompute),
        )

    def _region(self, setting: str | None) -> _Region:
        nodes = [
            n for n in self.part.nodes if n.op not in HANDED and self.settings[n.name] == setting
        ]
        outputs = [o for o in self.part.outputs if self.settings[o.ref.name] == setting]
        needed = {ref.name for node in nodes for ref in inputs_of(node)}
        needed |= {output.ref.name for output in outputs}
        reads = tuple(
            index
            for index, source in enumerate(self.sources)
            if any(node.name in needed for node in source.nodes)
        )
        emitter = Emitter(self.device, self.types, self.readers, self.images_last)
        builder = Builder(emitter, setting, self.ways)
        builder.place([self.sources[index] for index in reads])
        for members in runs(nodes):
            builder.add(members)
        results = self._results(builder.emitter, outputs)
        first = len(self.results)
        self.results += results
        self.decisions += builder.decisions
        function = builder.finish(results, recompute=self.recompute)
        for index, count in zip(reads, builder.reads(), strict=True):
            self.reads[index] += count
        self.calls += sum(n.op == "call_function" for n in builder.emitter.graph.nodes)
        return _Region(setting, function, reads, tuple(range(first, len(self.results))))

    def _results(self, emitter: Emitter, outputs: Sequence[Output]) -> list[Result]:
        """What has to leave the region: updates of packed buffers together, where they can."""
        open_: dict[Place, Output] = {}
        results = self._losses(emitter, [o for o in outputs if o.role == "loss"])
        results += [Result((o,)) for o in outputs if o.role not in ("loss", "update")]
        for output in (o for o in outputs if o.role == "update"):
            if output.ref in emitter.written and self._own(output):
                self.written.append(output)
            else:
                open_[output.model, output.key] = output
        for pack in self.packs:
            lanes = [open_[place] for place in pack.places if place in open_]
            if len(lanes) == len(pack.places):
                whole = emitter.whole([lane.ref for lane in lanes])
                if whole is not None and whole.layout == STACKED:
                    results.append(Result(tuple(lanes), packed=True))
                    for place in pack.places:
                        del open_[place]
        return results + [Result((output,)) for output in open_.values()]

    def _losses(self, emitter: Emitter, outputs: Sequence[Output]) -> list[Result]:
        """Losses as they were computed: those of a fused loss together."""
        by_ref = {output.ref: output for output in outputs}
        results: list[Result] = []
        done: set[Ref] = set()
        for output in outputs:
            whole = emitter.packed(output.ref)
            together = whole is not None and whole.layout == STACKED and len(by_ref) == len(outputs)
            if whole is not None and together and all(ref in by_ref for ref in whole.refs):
                if output.ref not in done:
                    results.append(Result(tuple(by_ref[ref] for ref in whole.refs), packed=True))
                    done.update(whole.refs)
            else:
                results.append(Result((output,)))
        return results

    def _own(self, output: Output) -> bool:
        """Whether the buffer that the norm writes is the output's, and no twin of it."""
        norm = self.nodes[output.ref.name]
        argument = norm.args[2 + output.ref.index]
        assert isinstance(argument, Ref)
        source = self.nodes[argument.name]
        # Capture lowers programs whose state has no model yet.
        first = homes(source)[:1] or ((output.model, source.keyword("path")),)
        return source.op in STATE and first[0] == (output.model, output.key)


def _settings(part: Graph) -> dict[str, str | None]:
    """The autocast setting under which each node runs; a source alone has none."""
    settings: dict[str, str | None] = {}
    for node in part.nodes:
        if node.op in HANDED:
            continue
        for ref in inputs_of(node):
            if settings.get(ref.name, node.autocast) != node.autocast:
                raise GraphError(
                    f"%{node.name} (autocast {node.autocast}) reads %{ref.name} "
                    f"(autocast {settings[ref.name]})"
                )
        settings[node.name] = node.autocast
    for output in part.outputs:  # an output that is a source itself
        settings.setdefault(output.ref.name, None)
    return settings


def _sources(part: Graph, packs: Sequence[Pack]) -> tuple[Source, ...]:
    """Packs first, then random tensors that a group reads together, then single nodes."""
    nodes = {node.name: node for node in part.nodes}
    found: list[Source] = []
    taken: set[str] = set()
    for pack in packs:
        if any(name in nodes for name in pack.names):
            # A lane that this program does not read is there all the same.
            lanes = tuple(nodes.get(name, _absent(name)) for name in pack.names)
            found.append(Source(lanes, packed=True))
            taken.update(pack.names)
    for members in runs([node for node in part.nodes if node.op not in HANDED]):
        for column in zip(*(inputs_of(member) for member in members)) if len(members) > 1 else ():
            drawn = tuple(nodes[ref.name] for ref in column)
            names = {node.name for node in drawn}
            if _drawn_together(drawn) and len(names) == len(drawn) and taken.isdisjoint(names):
                found.append(Source(drawn, packed=True))
                taken |= names
    rest = [n for n in part.nodes if n.op in HANDED and n.name not in taken]
    return (*found, *(Source((node,)) for node in rest))


def _absent(name: str) -> Node:
    return Node(name, "cgo.buffer", (), (), (None,), frozenset())


def _drawn_together(drawn: Sequence[Node]) -> bool:
    if any(node.op != "cgo.random" or node.types != drawn[0].types for node in drawn):
        return False
    type_ = drawn[0].types[0]
    return type_ is not None and type_.stride is None


def _readers(part: Graph) -> Counter[Ref]:
    readers = Counter(ref for node in part.nodes for ref in inputs_of(node))
    for ref in {output.ref for output in part.outputs}:
        readers[ref] += 1
    return readers
