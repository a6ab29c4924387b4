"""The intermediate representation: an immutable graph of ATen operators with owners.

One `Graph` holds every program of every merged model: a training program for each batch
shape, an evaluation program for each batch shape. Programs share nodes (parameters, buffers,
what passes have merged); an `Output` says which program and which model a value is for.
`torch.fx` stands at both ends: capture reads it, lowering writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cgo.dtypes import torch_dtype
from cgo.errors import GraphError

ModelId = str


@dataclass(frozen=True, slots=True)
class Ref:
    """Output number `index` of the node called `name`."""

    name: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Symbol:
    """A torch constant that is no Python number: kind is dtype, layout, memory_format or device.

    A device's value is always "trial": the device the trial runs on, bound by lowering.
    """

    kind: str
    value: str


Argument = None | bool | int | float | str | Ref | Symbol | tuple["Argument", ...]


@dataclass(frozen=True, slots=True)
class TensorType:
    """What a tensor is before it is computed; `stride` is None when contiguous."""

    dtype: str  # "float32", "int64", ...
    shape: tuple[int, ...]  # elements
    stride: tuple[int, ...] | None = None  # elements
    device: str = "trial"


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call, computed for one or more models.

    Sources (`cgo.input`, `cgo.parameter`, `cgo.buffer`, `cgo.constant`) take no references;
    their keyword arguments say where the value comes from:

    - `cgo.input`: data (digest of the DataSpec), split ("train" or "validation"), size (samples
      in the batch), leaf (path in the batch: "input", "input.0", "input.mask", "target")
    - `cgo.parameter`: model, path, trainable, content (hash of a frozen one's value, else "")
    - `cgo.buffer`: model, path, content (hash of its first value)
    - parameters and buffers that passes have shared: twins, the (model, path) of each further
      one that this node stands for; `prune` moves the node to a twin when its model is gone
    - `cgo.constant`: content (hash; the value is in the document's constants file)
    """

    name: str  # unique in its graph; prints as %name
    op: str  # "aten.linear.default" or "cgo.input"
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]  # sorted by key
    types: tuple[TensorType | None, ...]  # one an output; None: an output that is no tensor
    owners: frozenset[ModelId]  # models that need it; never empty
    autocast: str | None = None  # dtype of the autocast region it runs in
    group: str | None = None  # neighbours of one group may be executed as one operator

    def keyword(self, key: str) -> Argument:
        """The keyword argument `key`, or None."""
        for name, value in self.kwargs:
            if name == key:
                return value
        return None


@dataclass(frozen=True, slots=True)
class Output:
    """A value that leaves the graph for one model.

    role is "loss", "prediction" (evaluation programs) or "update" (key: the buffer's path).
    """

    model: ModelId
    program: str  # "train/64": split and samples in the batch
    role: str
    key: str
    ref: Ref


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order, and what leaves them."""

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]


SOURCES = frozenset({"cgo.input", "cgo.parameter", "cgo.buffer", "cgo.constant"})
#: Nodes that compute nothing from others: their values are handed to a program.
HANDED = SOURCES | {"cgo.random"}
#: Sources that a model owns: their keyword arguments name it and the path in its module.
STATE = frozenset({"cgo.parameter", "cgo.buffer"})


def bytes_of(type_: TensorType | None) -> int:
    """The size of a value of this type; nothing for what is no tensor."""
    if type_ is None:
        return 0
    itemsize: int = torch_dtype(type_.dtype).itemsize
    return math.prod(type_.shape) * itemsize


def program_of(node: Node) -> str:
    """The program that an operator was captured for: "train/64", split and samples of a batch."""
    return "/".join(node.name.split("/")[1:3])


def is_training(node: Node) -> bool:
    """Whether an operator was captured for a training program."""
    return program_of(node).startswith("train/")


def references(argument: Argument) -> Iterator[Ref]:
    """All references in an argument tree, left to right."""
    if type(argument) is Ref:
        yield argument
    elif type(argument) is tuple:
        for item in argument:
            yield from references(item)


def inputs_of(node: Node) -> Iterator[Ref]:
    """The references a node reads, in argument order."""
    for argument in node.args:
        yield from references(argument)
    for _, argument in node.kwargs:
        yield from references(argument)


def homes(node: Node) -> tuple[tuple[ModelId, str], ...]:
    """The (model, path) of each parameter or buffer that a node stands for; first its own."""
    model, path, twins = (node.keyword(key) for key in ("model", "path", "twins"))
    if type(model) is not str or type(path) is not str:
        return ()
    others = twins if type(twins) is tuple else ()
    return ((model, path), *others)  # type: ignore[arg-type]


def with_homes(node: Node, places: Sequence[tuple[ModelId, str]]) -> Node:
    """The same parameter or buffer, standing for other `homes`."""
    kwargs: dict[str, Argument] = dict(node.kwargs)
    kwargs.pop("twins", None)
    (kwargs["model"], kwargs["path"]), *twins = places
    if twins:
        kwargs["twins"] = tuple(twins)
    return replace(node, kwargs=tuple(sorted(kwargs.items())))


def map_references(argument: Argument, change: Callable[[Ref], Argument]) -> Argument:
    """The same argument tree with every reference replaced; the same object if none changed."""
    if type(argument) is Ref:
        return change(argument)
    if type(argument) is tuple:
        mapped = tuple(map_references(item, change) for item in argument)
        return argument if all(a is b for a, b in zip(mapped, argument)) else mapped
    return argument


def with_inputs(node: Node, change: Callable[[Ref], Argument]) -> Node:
    """The node with its references replaced; the same object if none changed."""
    args = tuple(map_references(argument, change) for argument in node.args)
    kwargs = tuple((key, map_references(value, change)) for key, value in node.kwargs)
    same = all(a is b for a, b in zip(args, node.args)) and all(
        a[1] is b[1] for a, b in zip(kwargs, node.kwargs)
    )
    return node if same else replace(node, args=args, kwargs=kwargs)


def rebuild(graph: Graph, nodes: Iterable[Node], renamed: Mapping[str, str]) -> Graph:
    """`graph` with other nodes, outputs following `renamed`, and owners and liveness recomputed."""
    outputs = tuple(
        replace(output, ref=replace(output.ref, name=renamed[output.ref.name]))
        if output.ref.name in renamed
        else output
        for output in graph.outputs
    )
    return prune(Graph(tuple(nodes), outputs))


def prune(graph: Graph) -> Graph:
    """Drop what no output needs, and give each node exactly the owners that need it."""
    owners = needed_by(graph)
    nodes = tuple(_owned(node, owners[node.name]) for node in graph.nodes if node.name in owners)
    return graph if _same(nodes, graph.nodes) else Graph(nodes, graph.outputs)


def _owned(node: Node, owners: frozenset[ModelId]) -> Node:
    """The node with these owners; a parameter or buffer stands for no other model's."""
    if node.owners == owners:
        return node
    if node.op in STATE:
        places = homes(node)
        kept = [place for place in places if place[0] in owners]
        if kept and len(kept) < len(places):
            node = with_homes(node, kept)
    return replace(node, owners=owners)


def needed_by(graph: Graph) -> dict[str, frozenset[ModelId]]:
    """For each node that some output needs, the models whose outputs need it."""
    # Sets of models are the bits of an integer: a union is one operation, and few are distinct.
    bits: dict[ModelId, int] = {}
    masks: dict[str, int] = {}
    for output in graph.outputs:
        bit = bits.setdefault(output.model, 1 << len(bits))
        masks[output.ref.name] = masks.get(output.ref.name, 0) | bit
    for node in reversed(graph.nodes):
        mine = masks.get(node.name)
        if mine is not None:
            for ref in inputs_of(node):
                masks[ref.name] = masks.get(ref.name, 0) | mine
    sets = {
        mask: frozenset(model for model, bit in bits.items() if mask & bit)
        for mask in set(masks.values())
    }
    return {name: sets[mask] for name, mask in masks.items()}


def restrict(
    graph: Graph,
    *,
    models: Collection[ModelId] | None = None,
    program: str | None = None,
) -> Graph:
    """The part of `graph` that the given models (and program) need."""
    outputs = tuple(
        output
        for output in graph.outputs
        if (models is None or output.model in models)
        and (program is None or output.program == program)
    )
    return prune(Graph(graph.nodes, outputs))


def programs(graph: Graph) -> tuple[str, ...]:
    """Names of the programs in the graph, in order of first appearance."""
    return tuple(dict.fromkeys(output.program for output in graph.outputs))


def verify(graph: Graph) -> None:
    """Check the rules that every pass relies on.

    Raises:
        GraphError: a duplicate name, a reference to nothing or to a later node, an output index
            out of range, unsorted keywords, an argument that is no `Argument`, a source with
            references, a graph output given twice, owners that are not exactly the models in
            need, a parameter or buffer of a model that does not own it, or a group that is not
            contiguous, mixes operators or reads itself.
    """
    sizes: dict[str, int] = {}  # outputs of each node
    groups = _Groups()
    for node in graph.nodes:
        if node.name in sizes:
            raise GraphError(f"two nodes are called %{node.name}")
        _check_form(node)
        refs = _checked_references(node)
        groups.check(node, refs)
        if refs and node.op in SOURCES:
            raise GraphError(f"%{node.name}: a {node.op} takes no references")
        for ref in refs:
            _check_ref(ref, sizes, f"%{node.name}")
        sizes[node.name] = len(node.types)
    _check_outputs(graph, sizes)
    owners = needed_by(graph)
    for node in graph.nodes:
        _check_owners(node, owners.get(node.name, frozenset()))


class _Groups:
    """Checks that a group's members stand together, are alike and do not read each other."""

    def __init__(self) -> None:
        self._closed: set[str] = set()
        self._first: Node | None = None
        self._members: set[str] = set()

    def check(self, node: Node, refs: Iterable[Ref]) -> None:
        first = self._first
        if first is None or node.group != first.group:
            if first is not None and first.group is not None:
                self._closed.add(first.group)
            if node.group in self._closed:
                raise GraphError(f"%{node.name}: group {node.group!r} is not contiguous")
            self._first, self._members = node, {node.name}
            return
        if node.group is None:
            return
        if node.op != first.op or node.autocast != first.autocast:
            raise GraphError(
                f"%{node.name}: group {node.group!r} mixes {first.op} and {node.op}, or autocast "
                f"{first.autocast} and {node.autocast}"
            )
        for ref in refs:
            if ref.name in self._members:
                raise GraphError(f"%{node.name} reads %{ref.name} of its own group {node.group!r}")
        self._members.add(node.name)


def _check_form(node: Node) -> None:
    for (left, _), (right, _) in pairwise(node.kwargs):
        if left >= right:
            raise GraphError(f"%{node.name}: keyword arguments are not sorted, or one is repeated")
    if not node.types:
        raise GraphError(f"%{node.name}: a node has at least one output")


_LITERALS = frozenset({type(None), bool, int, float, str, Symbol})


def _checked_references(node: Node) -> list[Ref]:
    refs: list[Ref] = []
    pending: list[object] = [*node.args, *(value for _, value in node.kwargs)]
    while pending:
        argument = pending.pop()
        kind = type(argument)
        if kind is Ref:
            refs.append(argument)  # type: ignore[arg-type]
        elif kind is tuple:
            pending.extend(argument)  # type: ignore[arg-type]
        elif kind not in _LITERALS:
            raise GraphError(
                f"%{node.name}: {argument!r} of type {kind.__name__} cannot be an argument"
            )
    return refs


def _check_ref(ref: Ref, sizes: Mapping[str, int], where: str) -> None:
    if ref.name not in sizes:
        raise GraphError(f"{where} reads %{ref.name}, which is not defined before it")
    if not 0 <= ref.index < sizes[ref.name]:
        raise GraphError(
            f"{where} reads output {ref.index} of %{ref.name}, which has {sizes[ref.name]}"
        )


def _check_outputs(graph: Graph, sizes: Mapping[str, int]) -> None:
    given: set[tuple[ModelId, str, str, str]] = set()
    for output in graph.outputs:
        where = f"output {output.role} of model {output.model!r}"
        _check_ref(output.ref, sizes, where)
        identity = (output.model, output.program, output.role, output.key)
        if identity in given:
            key = f" {output.key!r}" if output.key else ""
            raise GraphError(f"{where}{key} is given twice in program {output.program!r}")
        given.add(identity)


def _check_owners(node: Node, needed: frozenset[ModelId]) -> None:
    if node.owners != needed:
        raise GraphError(
            f"%{node.name}: owned by {sorted(node.owners)}, needed by {sorted(needed)}"
        )
    if node.op in STATE:
        for place in homes(node):
            if type(place) is not tuple or [type(part) for part in place] != [str, str]:
                raise GraphError(f"%{node.name}: twin {place!r} is no (model, path)")
            model, path = place
            if model not in needed:
                raise GraphError(
                    f"%{node.name}: stands for {path!r} of model {model!r}, which does not own it"
                )


def _same(left: tuple[Node, ...], right: tuple[Node, ...]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right))


# --- text -------------------------------------------------------------------------------------

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def format_type(type_: TensorType | None) -> str:
    """`f32[64, 8]`; a stride follows where it is not the contiguous one: `f32[64, 8]@[1, 64]`."""
    if type_ is None:
        return "none"
    letters = type_.dtype.rstrip("0123456789")
    text = f"{_SHORT.get(letters, letters)}{type_.dtype[len(letters) :]}{list(type_.shape)}"
    return text if type_.stride is None else f"{text}@{list(type_.stride)}"


def format_argument(argument: Argument) -> str:
    """An argument as `dump` prints it: references as `%name` or `%name#index`."""
    if type(argument) is Ref:
        return f"%{argument.name}" + (f"#{argument.index}" if argument.index else "")
    if type(argument) is Symbol:
        return f"{argument.kind}:{argument.value}"
    if type(argument) is tuple:
        return f"[{', '.join(map(format_argument, argument))}]"
    return repr(argument)


def dump(graph: Graph) -> str:
    """The whole graph as text, one node a line, then one output a line."""
    lines = []
    for node in graph.nodes:
        parts = [format_argument(argument) for argument in node.args]
        parts += [f"{key}={format_argument(value)}" for key, value in node.kwargs]
        types = ", ".join(map(format_type, node.types))
        mode = f" autocast={node.autocast}" if node.autocast else ""
        mode += f" group={node.group}" if node.group else ""
        owners = ", ".join(sorted(node.owners))
        lines.append(f"%{node.name} = {node.op}({', '.join(parts)}) : {types}{mode} {{{owners}}}")
    for output in graph.outputs:
        key = f" {output.key}" if output.key else ""
        lines.append(
            f"{output.model} {output.program} {output.role}{key} <- {format_argument(output.ref)}"
        )
    return "\n".join(lines)
