"""From a program to a function."""

import pytest
import torch

from cgo.errors import GraphError
from cgo.graph import Graph, Node, Output, Ref, Symbol, TensorType
from cgo.runtime.lower import lower

CPU = torch.device("cpu")
F32 = TensorType("float32", (4,))
OWNERS = frozenset({"m"})


def node(name, op, *args, types=(F32,), autocast=None, **kwargs):
    return Node(name, op, args, tuple(sorted(kwargs.items())), types, OWNERS, autocast)


def source(name):
    return node(name, "cgo.input", leaf=name, split="train", size=4, data="d")


def graph(*nodes, results):
    outputs = tuple(Output("m", "train/4", "update", str(i), ref) for i, ref in enumerate(results))
    return Graph(tuple(nodes), outputs)


def run(built, *values):
    return lower(built, "train/4", CPU)(values)


def test_runs_operators_with_literals_symbols_and_lists():
    built = graph(
        source("x"),
        node("y", "aten.add.Tensor", Ref("x"), 2, alpha=3),
        node("z", "aten.to.dtype", Ref("y"), Symbol("dtype", "float64")),
        node("w", "aten.view.default", Ref("z"), (2, 2)),
        results=[Ref("w")],
    )
    (found,) = run(built, torch.ones(4))
    assert torch.equal(found, torch.full((2, 2), 7.0, dtype=torch.float64))


def test_the_trial_device_is_bound():
    built = graph(
        node("x", "aten.zeros.default", (3,), device=Symbol("device", "trial")), results=[Ref("x")]
    )
    assert run(built)[0].device == CPU


def test_several_outputs_and_lists_of_outputs():
    built = graph(
        source("x"),
        node("t", "aten.topk.default", Ref("x"), 2, types=(F32, F32)),
        node("s", "aten.split.Tensor", Ref("x"), 4, types=(F32,)),
        results=[Ref("t", 1), Ref("s")],
    )
    index, whole = run(built, torch.tensor([1.0, 4.0, 2.0, 3.0]))
    assert index.tolist() == [1, 3]
    assert whole.tolist() == [1.0, 4.0, 2.0, 3.0]


def batch_norm_graph(*extra, results):
    channels = TensorType("float32", (2,))
    return graph(
        source("x"),
        node("mean", "cgo.buffer", types=(channels,), model="m", path="mean"),
        node("var", "cgo.buffer", types=(channels,), model="m", path="var"),
        node("n", "cgo.batch_norm", Ref("x"), None, None, Ref("mean"), Ref("var"), 0.5, 1e-5,
             types=(F32, channels, channels)),
        *extra,
        results=[Ref("n", 1), *results],
    )  # fmt: skip


def test_batch_norm_writes_statistics_in_place_where_nothing_else_reads_them():
    mean = torch.zeros(2)
    new_mean, _ = run(batch_norm_graph(results=[Ref("n")]), torch.ones(3, 2), mean, torch.ones(2))
    assert new_mean is mean
    assert mean.tolist() == [0.5, 0.5]


def test_batch_norm_leaves_statistics_that_are_read_again():
    mean = torch.zeros(2)
    late = node("late", "aten.mul.Tensor", Ref("mean"), 1.0)
    built = batch_norm_graph(late, results=[Ref("late")])
    new_mean, old = run(built, torch.ones(3, 2), mean, torch.ones(2))
    assert new_mean.tolist() == [0.5, 0.5]
    assert old.tolist() == mean.tolist() == [0.0, 0.0]


def test_autocast_regions_run_apart():
    built = graph(
        source("x"),
        node("a", "aten.mm.default", Ref("x"), Ref("x"), autocast="bfloat16"),
        node("b", "aten.mm.default", Ref("x"), Ref("x")),
        results=[Ref("a"), Ref("b")],
    )
    low, full = run(built, torch.eye(4))
    assert low.dtype == torch.bfloat16
    assert full.dtype == torch.float32


def test_regions_that_feed_each_other_are_refused():
    built = graph(
        source("x"),
        node("a", "aten.relu.default", Ref("x"), autocast="bfloat16"),
        node("b", "aten.relu.default", Ref("a")),
        results=[Ref("b")],
    )
    with pytest.raises(GraphError, match=r"%b \(autocast None\) reads %a \(autocast bfloat16\)"):
        lower(built, "train/4", CPU)


def test_an_unknown_program_is_refused():
    with pytest.raises(GraphError, match="no program 'train/9'"):
        lower(graph(source("x"), results=[Ref("x")]), "train/9", CPU)
