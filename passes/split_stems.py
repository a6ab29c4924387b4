"""Frozen stems apart from what trains on them, so that their values can be stored.

A stem's value for a sample is the same in every epoch where it depends on that sample's input and
on frozen values alone. Such values are cut out of the graph; what trains reads them as further
leaves of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from cgo.graph import (
    SOURCES,
    STATE,
    Argument,
    Graph,
    ModelId,
    Node,
    Output,
    Ref,
    TensorType,
    bytes_of,
    homes,
    inputs_of,
    program_of,
    prune,
    with_inputs,
)
from cgo.passes.samplewise import SIZED, Operand, equal_rows, flops, operator, sample_wise
from cgo.passes.sharing import argument_key, is_own, pure

#: What the names of stored leaves begin with.
STEM = "stem."


@dataclass(frozen=True)
class StemValue:
    """A value of a stem that the rest reads, for each sample of a split."""

    leaf: str  # "stem.0"; the same for the same value in every program
    split: str  # "train" or "validation"
    type: TensorType  # of one sample
    models: frozenset[ModelId]  # whose programs read it

    @property
    def sample_bytes(self) -> int:
        """The size of one sample's value."""
        return bytes_of(self.type)


@dataclass(frozen=True)
class Split:
    """A graph in two parts.

    `stem` has outputs of role "stem", keyed by leaf; `rest` reads them as `cgo.input` nodes of
    that leaf, and is the graph itself where there is nothing to store.
    """

    stem: Graph
    rest: Graph
    values: tuple[StemValue, ...]


@dataclass(frozen=True)
class SplitStems:
    """Splits a merged graph into frozen stems and the rest.

    A value may be stored when it is computed by operators of `cgo.passes.samplewise` from inputs
    (no targets), frozen parameters, buffers that no program updates, and constants; and when all
    programs of its split compute it, whatever their batch: a value is found again by operators,
    literals and frozen contents, the number of samples left out. It is worth it when much is
    computed for few bytes.

    Args:
        least_flops: Operations of products a sample that a stored value must stand for.
        flops_a_byte: And for each of its bytes: to gather it takes time as well.
    """

    least_flops: int = 2**14
    flops_a_byte: int = 8

    def __call__(self, graph: Graph) -> Split:
        """Split a graph that verifies; it is left as it is."""
        stems = _Stems(graph)
        common = stems.common()
        looked_into = {r.name for n in graph.nodes if "as_strided" in n.op for r in inputs_of(n)}
        stored = {
            name: number
            for name, number in stems.numbers.items()
            if number in common[stems.streams[name][:2]]
            and name not in looked_into  # it reads memory by strides, which storing changes
            and self._worth(stems, name)
        }
        read = _read(graph, stored)
        return _cut(graph, stems, read) if read else Split(Graph((), ()), graph, ())

    def _worth(self, stems: _Stems, name: str) -> bool:
        size = sum(bytes_of(type_) for type_ in stems.nodes[name].types)
        a_sample = size // stems.streams[name].size
        return stems.work[name] >= max(self.least_flops, self.flops_a_byte * a_sample)


class _Stream(NamedTuple):
    """The batches that a value belongs to; size 0 for fixed values."""

    data: str  # "" where no input is read: a batch of equal samples
    split: str
    size: int


_FIXED = _Stream("", "", 0)


class _Stems:
    """What of a graph is fixed or computed sample by sample, and which values are the same."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.streams: dict[str, _Stream] = {}  # of stem nodes and fixed values
        self.numbers: dict[str, int] = {}  # of stem nodes that read an input
        self.work: dict[str, int] = {}  # operations a sample, on the heaviest path to a node
        self._keys: dict[str, int] = {}  # numbers of fixed values, too
        self._ids: dict[object, int] = {}
        updated = {(o.model, o.key) for o in graph.outputs if o.role == "update"}
        for node in graph.nodes:
            stream = self._stream(node, updated)
            if stream is not None:
                self._enter(node, stream)

    def _stream(self, node: Node, updated: set[tuple[ModelId, str]]) -> _Stream | None:
        """The node's stream, or None where it is no part of a stem."""
        if node.op == "cgo.input":
            return _input_stream(node)
        if node.op in SOURCES:
            return None if is_own(node) or not updated.isdisjoint(homes(node)) else _FIXED
        refs = list(inputs_of(node))
        if any(ref.name not in self.streams for ref in refs) or not pure(node):
            return None
        stream = _joined([self.streams[ref.name] for ref in refs])
        if stream is None:
            return None
        if stream == _FIXED:
            size = _program_size(node)
            equal = equal_rows(node, [self._operand(ref) for ref in refs], size)
            return _Stream("", "", size) if equal else _FIXED
        return stream if sample_wise(node, self._given, stream.size) else None

    def _operand(self, ref: Ref) -> Operand:
        type_ = self.nodes[ref.name].types[ref.index]
        assert type_ is not None
        return Operand(type_, self.streams[ref.name].size > 0)

    def _given(self, argument: object) -> object:
        if type(argument) is tuple:
            return tuple(map(self._given, argument))
        return self._operand(argument) if type(argument) is Ref else argument

    def _enter(self, node: Node, stream: _Stream) -> None:
        refs = list(inputs_of(node))
        self.streams[node.name] = stream
        before = max((self.work[ref.name] for ref in refs), default=0)
        self.work[node.name] = before + flops(node, [self._operand(ref) for ref in refs])
        key = self._key(node, stream)
        self._keys[node.name] = self._ids.setdefault(key, len(self._ids))
        if stream.split and node.op not in SOURCES:
            self.numbers[node.name] = self._keys[node.name]

    def _key(self, node: Node, stream: _Stream) -> object:
        """Equal where two programs compute one value, the number of samples left out."""
        types = tuple(_sample(type_) if stream.size else type_ for type_ in node.types)
        if node.op == "cgo.input":
            return node.op, stream.data, node.keyword("leaf"), types
        if node.op in STATE or node.op == "cgo.constant":
            return node.op, node.keyword("content") or node.name, types
        refs: list[Ref] = []
        args = _without_size(node, stream.size) if stream.size else node.args
        literals = argument_key(args, refs), argument_key(node.kwargs, refs)
        inputs = tuple(self._keys[ref.name] for ref in refs)
        return node.op, literals, inputs, types, node.autocast, stream.size > 0

    def common(self) -> dict[tuple[str, str], set[int]]:
        """For each data and split, the values that all its batch sizes compute."""
        found: dict[tuple[str, str], dict[int, set[int]]] = {}
        for node in self.graph.nodes:
            if node.op == "cgo.input":
                data, split, size = (node.keyword(key) for key in ("data", "split", "size"))
                found.setdefault((str(data), str(split)), {})[int(str(size))] = set()
        for name, number in self.numbers.items():
            data, split, size = self.streams[name]
            found[data, split][size].add(number)
        return {stream: set.intersection(*sizes.values()) for stream, sizes in found.items()}

    def outputs(self, ref: Ref, leaf: str) -> Iterator[Output]:
        """The value of `ref` as an output of each program of its split."""
        number, (data, split, _) = self.numbers[ref.name], self.streams[ref.name]
        firsts = {
            self.streams[name].size: name
            for name, other in reversed(self.numbers.items())
            if other == number and self.streams[name][:2] == (data, split)
        }
        for size, name in sorted(firsts.items(), reverse=True):
            model = min(self.nodes[name].owners)
            yield Output(model, f"{split}/{size}", "stem", leaf, Ref(name, ref.index))


def _input_stream(node: Node) -> _Stream | None:
    leaf, size = str(node.keyword("leaf")), node.keyword("size")
    type_ = node.types[0]
    if leaf.partition(".")[0] == "target" or type_ is None or type_.shape[:1] != (size,):
        return None
    return _Stream(str(node.keyword("data")), str(node.keyword("split")), type_.shape[0])


def _joined(streams: list[_Stream]) -> _Stream | None:
    """The stream of what reads all these, or None where they are of different batches."""
    sampled = {stream for stream in streams if stream.size}
    reading = {stream for stream in sampled if stream.split}
    if len(reading) > 1 or len({stream.size for stream in sampled}) > 1:
        return None
    return next(iter(reading or sampled), _FIXED)


def _program_size(node: Node) -> int:
    size = program_of(node).rpartition("/")[2]
    return int(size) if size.isdigit() else 0


def _sample(type_: TensorType | None) -> object:
    """A type without its batch; strides follow from the sample's and do not matter for values."""
    return None if type_ is None else (type_.dtype, type_.shape[1:])


def _without_size(node: Node, size: int) -> tuple[Argument, ...]:
    """The arguments with the number of samples in a shape replaced."""
    if operator(node) not in SIZED:
        return node.args
    return tuple(
        ("N", *argument[1:]) if type(argument) is tuple and argument[:1] == (size,) else argument
        for argument in node.args
    )


def _read(graph: Graph, stored: Mapping[str, int]) -> dict[Ref, int]:
    """The stored values that something outside of the stem reads, with their numbers."""
    nodes = {node.name: node for node in graph.nodes}
    found: dict[Ref, int] = {}
    pending = [output.ref for output in graph.outputs]
    seen: set[str] = set()
    while pending:
        ref = pending.pop()
        if ref.name in stored:
            found[ref] = stored[ref.name]
        elif ref.name not in seen:
            seen.add(ref.name)
            pending.extend(inputs_of(nodes[ref.name]))
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0].name], item[0].index)))


def _cut(graph: Graph, stems: _Stems, read: Mapping[Ref, int]) -> Split:
    leaves: dict[tuple[int, int], str] = {}
    inputs: dict[Ref, Node] = {}
    for ref, number in read.items():
        leaf = leaves.setdefault((number, ref.index), f"{STEM}{len(leaves)}")
        inputs[ref] = _leaf_input(stems, ref, leaf)

    def rename(ref: Ref) -> Ref:
        return Ref(inputs[ref].name) if ref in inputs else ref

    nodes = (*inputs.values(), *(with_inputs(node, rename) for node in graph.nodes))
    rest = prune(Graph(nodes, tuple(replace(o, ref=rename(o.ref)) for o in graph.outputs)))
    owners = {node.name: node.owners for node in rest.nodes}
    values: dict[tuple[str, str], StemValue] = {}
    outputs: dict[tuple[str, str], list[Output]] = {}
    for ref, node in inputs.items():
        leaf, split = str(node.keyword("leaf")), str(node.keyword("split"))
        if (value := values.get((leaf, split))) is None:
            type_ = _one_sample(node)
            values[leaf, split] = StemValue(leaf, split, type_, owners[node.name])
            outputs[leaf, split] = list(stems.outputs(ref, leaf))
        else:
            models = value.models | owners[node.name]
            values[leaf, split] = replace(value, models=models)
    stem = prune(Graph(graph.nodes, tuple(o for found in outputs.values() for o in found)))
    return Split(stem, rest, tuple(values.values()))


def _leaf_input(stems: _Stems, ref: Ref, leaf: str) -> Node:
    """What stands for a stored value in the rest; gathered values are contiguous."""
    node, (data, split, size) = stems.nodes[ref.name], stems.streams[ref.name]
    type_ = node.types[ref.index]
    assert type_ is not None
    kwargs = (("data", data), ("leaf", leaf), ("size", size), ("split", split))
    types = (replace(type_, stride=None),)
    return Node(f"{node.name}/{leaf}", "cgo.input", (), kwargs, types, node.owners)


def _one_sample(node: Node) -> TensorType:
    type_ = node.types[0]
    assert type_ is not None
    return replace(type_, shape=type_.shape[1:])
