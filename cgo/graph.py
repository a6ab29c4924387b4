"""The intermediate representation: an immutable graph of ATen operators with owners.

One `Graph` holds every program of every merged model: a training program for each batch
shape, an evaluation program for each batch shape. Programs share nodes (parameters, buffers,
what passes have merged); an `Output` says which program and which model a value is for.
`torch.fx` stands at both ends: capture reads it, lowering writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

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
    - `cgo.constant`: content (hash; the value is in the document's constants file)
    """

    name: str  # unique in its graph; prints as %name
    op: str  # "aten.linear.default" or "cgo.input"
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]  # sorted by key
    types: tuple[TensorType | None, ...]  # one an output; None: an output that is no tensor
    owners: frozenset[ModelId]  # models that need it; never empty
    autocast: str | None = None  # dtype of the autocast region it runs in

    def keyword(self, key: str) -> Argument:
        """The keyword argument `key`, or None."""
        return dict(self.kwargs).get(key)


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
    nodes = tuple(
        node if node.owners == owners[node.name] else replace(node, owners=owners[node.name])
        for node in graph.nodes
        if node.name in owners
    )
    return graph if _same(nodes, graph.nodes) else Graph(nodes, graph.outputs)


def needed_by(graph: Graph) -> dict[str, frozenset[ModelId]]:
    """For each node that some output needs, the models whose outputs need it."""
    owners: dict[str, frozenset[ModelId]] = {}
    for output in graph.outputs:
        owners[output.ref.name] = owners.get(output.ref.name, frozenset()) | {output.model}
    for node in reversed(graph.nodes):
        mine = owners.get(node.name)
        if mine is None:
            continue
        for ref in inputs_of(node):
            theirs = owners.get(ref.name)
            if theirs is None:
                owners[ref.name] = mine
            elif not mine <= theirs:
                owners[ref.name] = theirs | mine
    return owners


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
            out of range, unsorted keywords, or owners that are not exactly the models in need.
    """
    seen: dict[str, Node] = {}
    for node in graph.nodes:
        if node.name in seen:
            raise GraphError(f"two nodes are called %{node.name}")
        if list(node.kwargs) != sorted(node.kwargs, key=lambda item: item[0]):
            raise GraphError(f"%{node.name}: keyword arguments are not sorted")
        if not node.types:
            raise GraphError(f"%{node.name}: a node has at least one output")
        for ref in inputs_of(node):
            _check_ref(ref, seen, f"%{node.name}")
        seen[node.name] = node
    for output in graph.outputs:
        _check_ref(output.ref, seen, f"output {output.role} of model {output.model!r}")
    owners = needed_by(graph)
    for node in graph.nodes:
        needed = owners.get(node.name, frozenset())
        if node.owners != needed:
            raise GraphError(
                f"%{node.name}: owned by {sorted(node.owners)}, needed by {sorted(needed)}"
            )


def _check_ref(ref: Ref, seen: Mapping[str, Node], where: str) -> None:
    if ref.name not in seen:
        raise GraphError(f"{where} reads %{ref.name}, which is not defined before it")
    if not 0 <= ref.index < len(seen[ref.name].types):
        raise GraphError(f"{where} reads output {ref.index} of %{ref.name}, which has "
                         f"{len(seen[ref.name].types)}")


def _same(left: tuple[Node, ...], right: tuple[Node, ...]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right))


# --- text -------------------------------------------------------------------------------------

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def format_type(type_: TensorType | None) -> str:
    """`f32[64, 8]`; a stride follows where it is not the contiguous one: `f32[64, 8]@[1, 64]`."""
    if type_ is None:
        return "none"
    letters = type_.dtype.rstrip("0123456789")
    text = f"{_SHORT.get(letters, letters)}{type_.dtype[len(letters):]}{list(type_.shape)}"
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
        owners = ", ".join(sorted(node.owners))
        lines.append(f"%{node.name} = {node.op}({', '.join(parts)}) : {types}{mode} {{{owners}}}")
    for output in graph.outputs:
        key = f" {output.key}" if output.key else ""
        lines.append(
            f"{output.model} {output.program} {output.role}{key} <- {format_argument(output.ref)}"
        )
    return "\n".join(lines)
