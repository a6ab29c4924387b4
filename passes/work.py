"""What a training step costs: operations and bytes counted from shapes, seconds under ceilings.

Only the training program with the largest batch counts: it is nearly all of a model's steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cgo.graph import (
    HANDED,
    SOURCES,
    Graph,
    ModelId,
    Node,
    Output,
    Ref,
    TensorType,
    bytes_of,
    inputs_of,
    prune,
    references,
)
from cgo.operators import aten, named_arguments


@dataclass(frozen=True, slots=True)
class Work:
    """What is counted of a node or a model: one training step, forward and backward."""

    flops: float = 0.0  # a multiplication and an addition are two
    bytes: float = 0.0  # read and written
    kernels: float = 0.0  # the members of a group share theirs

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.bytes + other.bytes, self.kernels + other.kernels
        )

    def seconds(self, ceilings: Ceilings) -> float:
        """The shortest time this takes under the ceilings: the roofline, and the launches."""
        busy = max(self.flops / ceilings.flops_per_s, self.bytes / ceilings.bytes_per_s)
        return busy + self.kernels * ceilings.kernel_s


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at best.

    Args:
        flops_per_s: Floating-point operations a second.
        bytes_per_s: Bytes read or written a second.
        kernel_s: Seconds that a kernel takes however small it is.
    """

    flops_per_s: float = 2e13
    bytes_per_s: float = 1e12
    kernel_s: float = 5e-6


def estimate_work(graph: Graph, ceilings: Ceilings | None = None) -> Mapping[str, float]:
    """The seconds of a training step that each node takes, by the node's name.

    Args:
        graph: A graph that verifies; groups that it holds launch one kernel together.
        ceilings: Of the device; the defaults are those of no device in particular, good for
            comparing nodes.

    Returns:
        Every node of each model's training program with the largest batch; sources and views
        take no time.
    """
    return step_seconds(training_step(graph), ceilings)


def step_seconds(step: Graph, ceilings: Ceilings | None = None) -> Mapping[str, float]:
    """`estimate_work` of a graph that is a `training_step` already."""
    limits = ceilings or Ceilings()
    return {name: work.seconds(limits) for name, work in _count_step(step).items()}


def count_models(graph: Graph) -> Mapping[ModelId, Work]:
    """The operations, bytes and kernels of each model's training step.

    What several models share counts for each of them; the kernels of a group count in parts.
    """
    step = training_step(graph)
    counted = _count_step(step)
    totals = {output.model: Work() for output in graph.outputs}
    for node in step.nodes:
        for model in node.owners:
            totals[model] += counted[node.name]
    return totals


def count_nodes(graph: Graph) -> Mapping[str, Work]:
    """The operations, bytes and kernels of each node in a training step.

    The forward counts once. The backward does the work once more for each operand of a product
    that needs a gradient (so three times in all in the middle of a network, twice where the input
    is data, once in what is frozen), and once more for any other operator whose input needs one.

    Source: the roofline model, Williams, Waterman and Patterson, CACM 2009.
    """
    return _count_step(training_step(graph))


def _count_step(step: Graph) -> Mapping[str, Work]:
    types = {node.name: node.types for node in step.nodes}
    learning = needing_gradients(step)
    behind = _reaching(step, "loss")
    width = Counter(node.group for node in step.nodes if node.group is not None)
    found: dict[str, Work] = {}
    for node in step.nodes:
        lanes = 1 if node.group is None else width[node.group]
        found[node.name] = _count(node, types, learning if node.name in behind else set(), lanes)
    return found


def training_step(graph: Graph) -> Graph:
    """The part of a graph that each model's training step needs, at its largest batch."""
    largest: dict[ModelId, tuple[int, str]] = {}
    for output in graph.outputs:
        split, _, size = output.program.partition("/")
        if split == "train":
            here = (int(size or 0), output.program)
            largest[output.model] = max(here, largest.get(output.model, here))
    outputs = [o for o in graph.outputs if o.program == largest.get(o.model, (0, ""))[1]]
    return prune(Graph(graph.nodes, tuple(outputs)))


def needing_gradients(step: Graph) -> set[str]:
    """The nodes that depend on a trained parameter; those parameters too."""
    found: set[str] = set()
    for node in step.nodes:
        trained = node.op == "cgo.parameter" and node.keyword("trainable") is not False
        if trained or (
            node.op != "aten.detach.default" and any(ref.name in found for ref in inputs_of(node))
        ):
            found.add(node.name)
    return found


def _reaching(step: Graph, role: str) -> set[str]:
    """The nodes that outputs of a role need."""
    outputs: Iterable[Output] = (output for output in step.outputs if output.role == role)
    needed = {output.ref.name for output in outputs}
    for node in reversed(step.nodes):
        if node.name in needed:
            needed.update(ref.name for ref in inputs_of(node))
    return needed


Types = Mapping[str, tuple[TensorType | None, ...]]


def _count(node: Node, types: Types, learning: set[str], lanes: int) -> Work:
    if node.op in SOURCES or is_view(node.op):
        return Work()
    written = sum(map(bytes_of, node.types))
    refs = list(inputs_of(node))
    moved = written + sum(bytes_of(types[ref.name][ref.index]) for ref in refs)
    if node.op in HANDED:
        return Work(0.0, moved, 1.0 / lanes)
    product = _PRODUCTS.get(_short(node.op))
    flops = 0.0
    if product is not None:
        named = named_arguments(node.op, node.args, dict(node.kwargs))
        flops = product.flops({key: _shape(value, types) for key, value in named.items()}, node)
        refs = [ref for key in product.operands for ref in references(named[key])]
    backward = sum(ref.name in learning for ref in refs)
    times = 1 + min(backward, 2 if product else 1)
    return Work(flops * times, float(moved * times), times / lanes)


@cache
def is_view(op: str) -> bool:
    """Whether an operator's result is, where possible, its input's memory seen otherwise."""
    overload = aten(op)
    returns = overload._schema.returns if overload is not None else ()
    return bool(returns) and all(value.alias_info is not None for value in returns)


def _short(op: str) -> str:
    return op.split(".")[1] if op.startswith("aten.") else ""


Shape = tuple[int, ...]
Shapes = Mapping[str, Any]  # a tensor's shape in place of its reference; literals as they are


def _shape(value: Any, types: Types) -> Any:
    if type(value) is Ref:
        type_ = types[value.name][value.index]
        return type_.shape if type_ is not None else ()
    return tuple(_shape(item, types) for item in value) if type(value) is tuple else value


@dataclass(frozen=True)
class _Product:
    """An operator that multiplies matrices: its two factors, and the forward's operations."""

    operands: tuple[str, ...]  # names in the schema
    flops: Callable[[Shapes, Node], float]


def _written(node: Node) -> Shape:
    type_ = node.types[0]
    return type_.shape if type_ is not None else ()


def _inner(first: str, second: str) -> _Product:
    """Each element of the result is a sum over the first factor's last dimension."""
    return _Product((first, second), lambda s, node: 2 * math.prod(_written(node)) * s[first][-1])


def _convolution(transposed: bool | None = None) -> _Product:
    """Each weight is used once at each place of the result (transposed: of the input)."""

    def flops(shapes: Shapes, node: Node) -> float:
        weight = shapes["weight"]
        back = shapes["transposed"] if transposed is None else transposed
        places = shapes["input"] if back else _written(node)
        batch = places[0] if len(places) == len(weight) else 1
        return 2 * batch * math.prod(places[-(len(weight) - 2) :]) * math.prod(weight)

    return _Product(("input", "weight"), flops)


def _attention(shapes: Shapes, node: Node) -> float:
    """Scores, then their products with the values; what a causal mask saves is not counted."""
    query, key, value = (shapes[name] for name in ("query", "key", "value"))
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(shapes: Shapes, node: Node) -> float:
    """Of two tensors: one multiplication for each combination of indices."""
    equation, tensors = shapes["equation"].replace(" ", ""), shapes["tensors"]
    terms = equation.partition("->")[0].split(",")
    if len(tensors) != 2 or "." in equation:
        return 0.0  # the order of the products is not known from the call; its bytes count
    sizes = {letter: n for term, shape in zip(terms, tensors) for letter, n in zip(term, shape)}
    return 2 * math.prod(sizes.values())


_PRODUCTS: dict[str, _Product] = {
    "linear": _inner("input", "weight"),
    "mm": _inner("self", "mat2"),
    "bmm": _inner("self", "mat2"),
    "mv": _inner("self", "vec"),
    "dot": _inner("self", "tensor"),
    "matmul": _inner("self", "other"),
    "addmm": _inner("mat1", "mat2"),
    "addmv": _inner("mat", "vec"),
    "baddbmm": _inner("batch1", "batch2"),
    **{f"conv{n}d": _convolution(False) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(True) for n in (1, 2, 3)},
    "convolution": _convolution(),
    "_convolution": _convolution(),
    "scaled_dot_product_attention": _Product(("query", "key", "value"), _attention),
    "einsum": _Product(("tensors",), _einsum),
}
