"""Recipes of random small graphs, and an interpreter of graphs."""

from __future__ import annotations

from collections.abc import Mapping

import hypothesis.strategies as st
import torch
from torch import Tensor

from cgo.graph import Graph, Node, Output, Ref, TensorType, homes, prune
from cgo.operators import aten

VECTOR = TensorType("float64", (3,))
CONTENTS = {
    name: torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("p", "q", "r"))
}
LITERALS = (1, 1.0, True, 2, 0.5, 0.0, -0.0)
UNARY = ("aten.tanh.default", "aten.neg.default", "aten.detach.default", "aten.signbit.default")
BINARY = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor")
SCALAR = ("aten.add.Scalar", "aten.div.Scalar", "aten.full_like.default")
FULL = "aten.full.default"  # its result shows the literal's type and sign

SOURCE = st.one_of(
    st.just(("input",)),
    st.tuples(st.just("frozen"), st.sampled_from(sorted(CONTENTS))),
    st.just(("trained",)),
    st.tuples(st.just("buffer"), st.sampled_from(sorted(CONTENTS))),
    st.just(("random",)),
)
PLACE = st.integers(0, 30)  # of an earlier node, modulo their number
STEP = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(UNARY), PLACE),
    st.tuples(st.just("call"), st.sampled_from(BINARY), PLACE, PLACE),
    st.tuples(st.just("literal"), st.sampled_from(SCALAR), PLACE, st.sampled_from(LITERALS)),
    st.tuples(st.just("full"), st.sampled_from(LITERALS)),
    st.tuples(st.just("update"), PLACE, PLACE),
)
RECIPE = st.tuples(st.lists(SOURCE, min_size=1, max_size=5), st.lists(STEP, max_size=10))
#: Models often share a recipe, or begin alike: otherwise hardly anything could be shared.
RECIPES = st.lists(RECIPE, min_size=1, max_size=3).flatmap(
    lambda pool: st.lists(
        st.tuples(st.sampled_from(pool), st.lists(STEP, max_size=2), st.sampled_from(("d", "e"))),
        min_size=2,
        max_size=4,
    )
)


def build(model: str, recipe, extra, data: str) -> Graph:
    """One model's graph; every value is an output."""
    sources, steps = recipe
    nodes: list[Node] = []
    outputs: list[Output] = []

    def add(name: str, op: str, *args, **kwargs) -> Ref:
        keywords = tuple(sorted(kwargs.items()))
        type_ = TensorType("bool", (3,)) if op == "aten.signbit.default" else VECTOR
        owners = frozenset({model})
        nodes.append(Node(f"{model}.{name}", op, args, keywords, (type_,), owners))
        return Ref(nodes[-1].name)

    values: list[Ref] = []
    buffers: list[tuple[str, Ref]] = []
    for index, (kind, *rest) in enumerate(sources):
        path = f"{kind}{index}"
        if kind == "input":
            values.append(add(path, "cgo.input", data=data, leaf="input", size=3, split="train"))
        elif kind == "random":
            values.append(add(path, "cgo.random", model=model, order=index))
        elif kind == "buffer":
            values.append(add(path, "cgo.buffer", content=rest[0], model=model, path=path))
            buffers.append((path, values[-1]))
        else:
            content = rest[0] if rest else ""
            kwargs = {"content": content, "model": model, "path": path, "trainable": not content}
            values.append(add(path, "cgo.parameter", **kwargs))
    floats = list(values)
    updates: dict[str, Ref] = {}
    for index, (kind, *rest) in enumerate((*steps, *extra)):
        if kind == "update":
            if buffers:
                path, _ = buffers[rest[0] % len(buffers)]
                updates[path] = floats[rest[1] % len(floats)]
        elif kind == "full":
            values.append(add(f"n{index}", FULL, (3,), rest[0]))
        else:
            op, *rest = rest
            count = 1 if kind == "literal" else len(rest)
            args = [floats[place % len(floats)] for place in rest[:count]]
            values.append(add(f"n{index}", op, *args, *rest[count:]))
            if op != "aten.signbit.default":
                floats.append(values[-1])
    for index, ref in enumerate(values):
        outputs.append(Output(model, "train/3", "prediction", str(index), ref))
    for path, ref in updates.items():
        outputs.append(Output(model, "train/3", "update", path, ref))
    return prune(Graph(tuple(nodes), tuple(outputs)))


def trained(model: str, path: str) -> Tensor:
    """Trainable parameters and random numbers differ between models."""
    generator = torch.Generator().manual_seed(sum(map(ord, f"{model}.{path}")))
    return torch.randn(3, dtype=torch.float64, generator=generator)


def interpret(graph: Graph, steps: int) -> list[dict[tuple[str, str, str], Tensor]]:
    """Run a few training steps of a graph; each step's outputs by model, role and key."""
    data = dict.fromkeys(node.keyword("data") for node in graph.nodes if node.op == "cgo.input")
    buffers = {
        place: CONTENTS[str(node.keyword("content"))]
        for node in graph.nodes
        if node.op == "cgo.buffer"
        for place in homes(node)
    }
    history = []
    for step in range(steps):
        batches = {name: trained(f"batch {name}", str(step)) for name in data}
        env: dict[str, Tensor] = {}
        for node in graph.nodes:
            env[node.name] = compute(node, env, batches, buffers, step)
        results = {(o.model, o.role, o.key): env[o.ref.name] for o in graph.outputs}
        buffers |= {
            (model, key): value for (model, role, key), value in results.items() if role == "update"
        }
        history.append(results)
    return history


def compute(
    node: Node,
    env: Mapping[str, Tensor],
    batches: Mapping[object, Tensor],
    buffers: Mapping[tuple[str, str], Tensor],
    step: int,
) -> Tensor:
    model, path = str(node.keyword("model")), str(node.keyword("path"))
    match node.op:
        case "cgo.input":
            return batches[node.keyword("data")]
        case "cgo.parameter" if node.keyword("trainable") is False:
            return CONTENTS[str(node.keyword("content"))]
        case "cgo.parameter":
            return trained(model, path)
        case "cgo.buffer":
            return buffers[model, path]
        case "cgo.random":
            return trained(model, f"random {step} {node.keyword('order')}")
    args = [env[arg.name] if isinstance(arg, Ref) else arg for arg in node.args]
    return aten(node.op)(*args)


def bits(value: Tensor) -> bytes:
    return str(value.dtype).encode() + value.contiguous().numpy().tobytes()


def assert_equal(left, right) -> None:
    for before, after in zip(left, right, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert bits(value) == bits(after[key]), (key, value, after[key])
