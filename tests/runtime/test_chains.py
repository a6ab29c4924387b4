"""What stands behind a norm, group by group."""

from cgo.graph import Graph, Node, Output, Ref, TensorType
from cgo.runtime.chains import behind_norms

X, C = TensorType("float32", (4, 3, 8, 8)), TensorType("float32", (3,))


def node(name, op, *args, group=None, types=(X,)):
    model = name.partition(".")[0]
    return Node(name, op, args, (), types, frozenset({model}), group=group)


def two(*parts):
    """Two models' nodes, part by part: name, operator and arguments, `{m}` the model."""
    nodes = []
    for name, op, *args in parts:
        for m in ("a", "b"):
            given = [Ref(f"{m}.{a}") if isinstance(a, str) else a for a in args]
            types = (X, C, C) if op == "cgo.batch_norm" else (X,)
            group = None if op == "cgo.buffer" else name
            nodes.append(node(f"{m}.{name}", op, *given, group=group, types=types))
    return nodes


HEAD = (("x", "cgo.buffer"), ("norm", "cgo.batch_norm", "x", None, None, "x", "x", 0.1, 1e-5))
ADD = ("add", "aten.add.Tensor", "norm", "x")
RELU = ("relu", "aten.relu.default", "add")


def behind(*parts, outputs=()):
    graph = Graph(tuple(two(*HEAD, *parts)), tuple(outputs))
    return [nodes[0].group for nodes in behind_norms(graph)["norm"]]


def test_an_addition_and_an_activation():
    assert behind(ADD, RELU) == ["add", "relu"]
    assert behind(("relu", "aten.relu.default", "norm")) == ["relu"]
    assert behind(ADD) == ["add"]
    assert behind() == []


def test_nothing_behind_an_activation():
    relu = ("relu", "aten.relu.default", "norm")
    assert behind(relu, ("add", "aten.add.Tensor", "relu", "x")) == ["relu"]
    assert behind(ADD, ("more", "aten.add.Tensor", "add", "x")) == ["add"]


def test_nothing_that_others_read():
    other = ("other", "aten.sin.default", "norm")
    assert behind(ADD, RELU, other) == []
    assert behind(ADD, ("other", "aten.sin.default", "add"), RELU) == ["add"]
    seen = Output("a", "train/4", "loss", "", Ref("a.norm"))
    assert behind(ADD, RELU, outputs=[seen]) == []
    assert behind(("sin", "aten.sin.default", "norm")) == []


def test_members_are_the_same_in_the_same_order():
    nodes = two(*HEAD, ADD)
    turned = Graph((*nodes[:4], *nodes[:3:-1]), ())
    assert behind_norms(turned)["norm"] == []
    apart = Graph((*nodes[:5], Node(**{**vars_of(nodes[5]), "group": None})), ())
    assert behind_norms(apart)["norm"] == []


def vars_of(given):
    return {name: getattr(given, name) for name in given.__slots__}
