"""From a program of the graph to a Python function over tensors.

Lowering writes a `torch.fx` graph and lets fx generate straight-line code, so that a training step
pays for its operators and for nothing that walks a graph. A group of nodes becomes one fused
operator where a form of `cgo.runtime.forms` applies, else what `vmap` makes of its operator, else a
loop over its members.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cgo.errors import GraphError
from cgo.graph import (
    SOURCES,
    STATE,
    Argument,
    Graph,
    Node,
    Output,
    Ref,
    Symbol,
    homes,
    inputs_of,
    restrict,
)
from cgo.operators import aten
from cgo.runtime.choice import LOOP, LOOPED, Way
from cgo.runtime.emitter import Emitter, Group, Packed, Types, item, make_group, returns_list, runs
from cgo.runtime.forms import forms_of
from cgo.runtime.forms.elementwise import adds_nothing
from cgo.runtime.forms.general import vectorise
from cgo.runtime.layouts import STACKED
from cgo.runtime.operators import batch_norm, batch_norm_copying, symbol_value
from cgo.runtime.packing import Pack, Place
from cgo.runtime.peepholes import simplify
from cgo.runtime.solo import kernel_for

#: The general rule's name, beside those of forms.
VMAP = "vmap"

#: Nodes whose value is handed to the program.
HANDED = SOURCES | {"cgo.random"}


@dataclass(frozen=True)
class Source:
    """A value that the program is given: one node's, or several nodes' as (M, ...)."""

    nodes: tuple[Node, ...]
    packed: bool = False


@dataclass(frozen=True)
class Result:
    """A value that the program gives: one output's, or several outputs' as (M, ...)."""

    outputs: tuple[Output, ...]
    packed: bool = False


@dataclass(frozen=True)
class Decision:
    """How one group is executed; `form` is None for a loop over its members."""

    operator: str
    size: int
    form: str | None
    reason: str = ""  # of a loop
    example: str = ""  # the first member's name
    gathers: int = 0  # inputs whose values had to be copied together


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
            with region.context(self.device):
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

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=getattr(torch, self.autocast))


def lower(
    graph: Graph,
    program: str,
    device: torch.device,
    packs: Sequence[Pack] = (),
    *,
    ways: Mapping[str, Way] | None = None,
    keep_layouts: bool = False,
) -> Lowered:
    """Make one program of a graph executable.

    Args:
        graph: The merged graph, restricted to the models that are to run.
        program: The program's name, such as "train/64".
        device: Where its tensors are.
        packs: Parameters and buffers that will be handed over as one tensor.
        ways: How groups are executed, by name; others in the first form that applies.
        keep_layouts: Leave images in the memory format that they come in, so that a capture rounds
            as its module does.

    Raises:
        GraphError: the graph has no such program, or nodes of different autocast settings feed
            each other.
    """
    part = restrict(graph, program=program)
    if not part.outputs:
        raise GraphError(f"the graph has no program {program!r}")
    images_last = device.type == "cpu" and not keep_layouts
    return _Lowering(part, device, packs, images_last, ways or {}).lowered()


class _Lowering:
    """One program on its way; results are collected over its regions."""

    def __init__(
        self,
        part: Graph,
        device: torch.device,
        packs: Sequence[Pack],
        images_last: bool,
        ways: Mapping[str, Way],
    ) -> None:
        self.part, self.device, self.images_last, self.ways = part, device, images_last, ways
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
        function = builder.finish(results)
        self.calls += sum(n.op == "call_function" for n in builder.emitter.graph.nodes)
        return _Region(setting, function, reads, tuple(range(first, len(self.results))))

    def _results(self, emitter: Emitter, outputs: Sequence[Output]) -> list[Result]:
        """What has to leave the region: updates of packed buffers together, where they can."""
        open_: dict[Place, Output] = {}
        results = self._losses(emitter, [o for o in outputs if o.role == "loss"])
        for output in outputs:
            if output.role not in ("update", "loss"):
                results.append(Result((output,)))
            elif output.role == "update" and output.ref in emitter.written and self._own(output):
                self.written.append(output)
            elif output.role == "update":
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


class Builder:
    """Writes the nodes of one region."""

    def __init__(
        self, emitter: Emitter, setting: str | None, ways: Mapping[str, Way] | None = None
    ) -> None:
        self.emitter = emitter
        self.ways = ways or {}
        self.decisions: list[Decision] = []
        self.setting = setting

    def place(self, sources: Sequence[Source]) -> None:
        """Make sources the function's arguments."""
        for index, source in enumerate(sources):
            placeholder = self.emitter.graph.placeholder(f"s{index}")
            if source.packed:
                packed = Packed(placeholder, STACKED)
                self.emitter.set_packed([Ref(node.name) for node in source.nodes], packed)
                self.emitter.sources.add(id(packed))
            else:
                self.emitter.set(Ref(source.nodes[0].name), placeholder)

    def add(self, members: Sequence[Node]) -> None:
        """Write a group; a single node is a loop of one, which needs no decision."""
        if len(members) > 1:
            decision = self._fuse(make_group(members, self.emitter.types))
            self.decisions.append(decision)
            if decision.form is not None:
                return
        for node in members:
            self._call(node)

    def _fuse(self, group: Group) -> Decision:
        gathers = self.emitter.gathers
        form, reason = self._write(group)
        return Decision(
            group.operator,
            group.size,
            form,
            reason,
            group.nodes[0].name,
            self.emitter.gathers - gathers,
        )

    def _write(self, group: Group) -> tuple[str | None, str]:
        """Write a group in the first form that takes it; the form's name, or why none does."""
        if (group.nodes[0].group or "").endswith(LOOP):
            return None, "one by one costs less here"
        if all(column.shared for column in group.columns):
            return None, "every member reads the same values"
        way = self.ways.get(group.nodes[0].group or "")
        if way is not None and self._write_form(group, way):
            return way.form, ""
        for form in forms_of(group.operator):
            if self._write_form(group, Way(form.name)):
                return form.name, ""
        values, reason = vectorise(self.emitter, group)
        if values is None:
            return None, reason
        self._set(group, values)
        return VMAP, ""

    def _write_form(self, group: Group, way: Way) -> bool:
        """Write a group in a form, unless that does not apply."""
        self.emitter.preferred = way.layout
        values: Sequence[Packed] | None
        try:
            if way.form == VMAP:
                values, _ = vectorise(self.emitter, group)
            else:
                rules = [form.rule for form in forms_of(group.operator) if form.name == way.form]
                values = rules[0](self.emitter, group) if rules else None
        finally:
            self.emitter.preferred = None
        if values is not None:
            self._set(group, values)
        return values is not None

    def write_way(self, group: Group, way: Way) -> list[fx.Node] | None:
        """Write a group one way, and give what holds its results; None where that is impossible."""
        refs = [ref for i in range(len(group.types)) for ref in group.refs(i)]
        wanted = [ref for ref in refs if self.emitter.readers[ref]]
        if way.form == LOOPED:
            for node in group.nodes:
                self._call(node)
            return [self.emitter.value(ref) for ref in wanted]
        if not self._write_form(group, way):
            return None
        packed = [self.emitter.packed(ref) for ref in wanted]
        return list({id(p): p.node for p in packed if p is not None}.values())

    def _set(self, group: Group, values: Sequence[Packed]) -> None:
        for index, value in enumerate(values):
            type_ = group.types[index]
            if self.setting is not None and type_ is not None:
                # Autocast may give the parts of a form another dtype than the operator has.
                dtype = getattr(torch, type_.dtype)
                value = Packed(self.emitter.call(torch.Tensor.to, value.node, dtype), value.layout)
            self.emitter.set_packed(group.refs(index), value)

    def _call(self, node: Node) -> None:
        emitter = self.emitter
        if adds_nothing(node, emitter.types):
            assert isinstance(node.args[0], Ref)
            emitter.set(Ref(node.name), emitter.value(node.args[0]))
            return
        kernel = kernel_for(make_group([node], emitter.types)) if emitter.images_last else None
        args = tuple(self._argument(argument) for argument in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs}
        images = node.op in _CONVOLUTIONS
        if images:
            args = (emitter.images(args[0]), *args[1:])
        function = self._kernel(node) if kernel is None else kernel.function
        result = emitter.graph.call_function(function, args, kwargs)
        if len(node.types) == 1 and node.types[0] is not None:
            result.meta["ndim"] = len(node.types[0].shape)
        if images:  # of one channel both formats are one, and the kernel takes the other
            result = emitter.images(result)
        if len(node.types) == 1 and not returns_list(node):
            emitter.set(Ref(node.name), result)
            return
        for index in range(len(node.types)):
            ref = Ref(node.name, index)
            if emitter.readers[ref]:
                emitter.set(ref, emitter.call(item, result, index))

    def finish(self, results: Sequence[Result]) -> Callable[..., Sequence[Tensor]]:
        """Compile what was written to a function that gives these results."""
        emitter = self.emitter
        emitter.graph.output(tuple(self._leaving(result) for result in results))
        emitter.graph.eliminate_dead_code(_has_effect)
        simplify(emitter.graph)
        module = fx.GraphModule(torch.nn.Module(), emitter.graph)
        # The plain function: a module call costs more than several small operators.
        forward: Callable[..., Sequence[Tensor]] = type(module).forward

        def run(*values: Tensor) -> Sequence[Tensor]:
            return forward(module, *values)

        return run

    def _leaving(self, result: Result) -> fx.Node:
        if not result.packed:
            return self.emitter.value(result.outputs[0].ref)
        whole = self.emitter.whole([output.ref for output in result.outputs])
        assert whole is not None
        return whole.node

    def _kernel(self, node: Node) -> Callable[..., Any]:
        if node.op == "cgo.batch_norm":
            alone = all(
                isinstance(argument, Ref) and self.emitter.readers[argument] == 1
                for argument in node.args[3:5]
            )
            if alone:
                self.emitter.written |= {Ref(node.name, 1), Ref(node.name, 2)}
            return batch_norm if alone else batch_norm_copying
        overload = aten(node.op)
        if overload is None:
            raise GraphError(f"%{node.name}: operator {node.op} has no kernel")
        # A lane of a packed value is not always contiguous.
        return _ANY_STRIDES.get(node.op, overload)  # type: ignore[no-any-return]

    def _argument(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return self.emitter.value(argument)
        if isinstance(argument, Symbol):
            return symbol_value(argument, self.emitter.device)
        if isinstance(argument, tuple):
            return [self._argument(item) for item in argument]
        return argument


#: Over images, whose memory format they keep.
_CONVOLUTIONS = {"aten.conv2d.default", "aten.conv2d.padding", "aten.conv_transpose2d.input"}

_ANY_STRIDES = {
    "aten.view.default": torch.ops.aten.reshape.default,
    "aten._unsafe_view.default": torch.ops.aten.reshape.default,
}


def _has_effect(node: fx.Node) -> bool:
    """Writing statistics is an effect; what else is not read need not be computed."""
    return node.op in ("placeholder", "output") or node.target in (batch_norm,)
