"""Less is alive at once, and nothing else is different."""

from dataclasses import replace
from textwrap import dedent

from hypothesis import given, settings
from support.merged import ALL, Case, Merged, assert_same_bits
from support.recipes import RECIPES, assert_equal, build, interpret

from cgo.graph import Graph, TensorType, dump, prune, verify
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.merge import merge
from cgo.passes.order_nodes import live_peak, order_nodes
from cgo.passes.pipeline import run_pipeline

WIDE, ONE = TensorType("float32", (100,)), TensorType("float32", ())


def branches(sketch, model, program="validation/4", trained=False, op="aten.neg.default"):
    """All branches first, then all their sums, as a search in breadth gives them."""
    made = sketch(model)
    x = made.parameter("w", 100, content="" if trained else "c")
    wide = [made.add(f"wide_{i}", op, x, types=(WIDE,)) for i in range(3)]
    sums = [made.add(f"sum_{i}", "aten.sum.default", w, types=(ONE,)) for i, w in enumerate(wide)]
    stacked = made.add(
        "out", "aten.stack.default", tuple(sums), types=(TensorType("float32", (3,)),)
    )
    made.out(stacked, "prediction", program=program)
    return made.graph()


def test_each_branch_is_finished_before_the_next_begins(sketch):
    graph = branches(sketch, "m")
    ordered = order_nodes(graph)
    assert dump(ordered) == dedent("""\
        %m.w = cgo.parameter(content='c', model='m', path='w', trainable=False) : f32[100] {m}
        %m.wide_0 = aten.neg.default(%m.w) : f32[100] {m}
        %m.sum_0 = aten.sum.default(%m.wide_0) : f32[] {m}
        %m.wide_1 = aten.neg.default(%m.w) : f32[100] {m}
        %m.sum_1 = aten.sum.default(%m.wide_1) : f32[] {m}
        %m.wide_2 = aten.neg.default(%m.w) : f32[100] {m}
        %m.sum_2 = aten.sum.default(%m.wide_2) : f32[] {m}
        %m.out = aten.stack.default([%m.sum_0, %m.sum_1, %m.sum_2]) : f32[3] {m}
        m validation/4 prediction <- %m.out""")
    assert (live_peak(graph, "validation/4"), live_peak(ordered, "validation/4")) == (1204, 412)
    assert order_nodes(ordered) is ordered


def test_groups_stay_together(sketch):
    graph = merge([branches(sketch, "a"), branches(sketch, "b")])
    names = [f"{model}.{kind}_{i}" for kind in ("wide", "sum") for i in range(3) for model in "ab"]
    nodes = {node.name: node for node in graph.nodes}
    grouped = [replace(nodes.pop(name), group=name.partition(".")[2]) for name in names]
    outs = [nodes.pop("a.out"), nodes.pop("b.out")]
    graph = Graph((*nodes.values(), *grouped, *outs), graph.outputs)
    verify(graph)
    ordered = run_pipeline(graph, [order_nodes])
    found = [node.group for node in ordered.nodes if node.group]
    assert found == [f"{kind}_{i}" for i in range(3) for kind in ("wide", "sum") for _ in "ab"]
    # Two models' lanes of a group are one value.
    assert live_peak(graph, "validation/4") == 2 * 1204
    assert live_peak(ordered, "validation/4") == 2 * 412


def test_what_autograd_keeps_gives_no_reason_to_reorder(sketch):
    kept = branches(sketch, "m", "train/4", trained=True, op="aten.tanh.default")
    assert order_nodes(kept) is kept
    assert live_peak(kept, "train/4") == 3 * 400 + 3 * 4 + 12
    # Negation keeps nothing, and without anything that learns nothing is kept.
    for graph in (
        branches(sketch, "m", "train/4", trained=True),
        branches(sketch, "m", "train/4", op="aten.tanh.default"),
    ):
        ordered = order_nodes(graph)
        assert live_peak(ordered, "train/4") == 412 < live_peak(graph, "train/4")


def test_an_unknown_operator_keeps_arguments_and_results(sketch):
    made = sketch("m")
    x = made.add("x", "aten.neg.default", made.parameter("w", 100), types=(WIDE,))
    y = made.add("y", "aten.erfinv.default", x, types=(WIDE,))
    made.out(made.add("loss", "aten.sum.default", y, types=(ONE,)))
    assert live_peak(made.graph(), "train/4") == 804


def test_views_live_in_what_they_are_of(sketch):
    made = sketch("m")
    x = made.add("x", "aten.neg.default", made.parameter("w", 100, content="c"), types=(WIDE,))
    square = TensorType("float32", (10, 10))
    view = made.add("view", "aten.view.default", x, (10, 10), types=(square,))
    first = made.add("first", "aten.sum.default", x, types=(ONE,))
    made.out(
        made.add("second", "aten.sum.default", view, types=(ONE,)),
        "prediction",
        "2",
        "validation/4",
    )
    made.out(first, "prediction", "1", "validation/4")
    graph = made.graph()
    assert live_peak(graph, "validation/4") == 408


def test_readers_whose_gradients_are_summed_stay_in_order(sketch):
    """Three readers of one value that learns: the last one named first, and least to allocate."""
    made = sketch("m")
    x = made.add("x", "aten.neg.default", made.parameter("w", 100), types=(WIDE,))
    wide = [made.add(name, "aten.neg.default", x, types=(WIDE,)) for name in ("c", "b")]
    one = made.add("a", "aten.sum.default", x, types=(ONE,))
    sums = [made.add(f"s{i}", "aten.sum.default", w, types=(ONE,)) for i, w in enumerate(wide)]
    made.out(made.add("out", "aten.stack.default", (*sums, one)))
    ordered = order_nodes(made.graph())
    names = [node.name for node in ordered.nodes]
    assert ordered is not made.graph()
    assert names.index("m.c") < names.index("m.b") < names.index("m.a")


def evaluated(graph):
    """The graph as an evaluation program of which each model wants the last value only."""
    last = {output.model: output for output in graph.outputs if output.role == "prediction"}
    outputs = [replace(output, program="validation/3") for output in last.values()]
    return prune(Graph(graph.nodes, tuple(outputs)))


@settings(max_examples=150, deadline=None, print_blob=True)
@given(RECIPES)
def test_random_graphs_compute_the_same_in_no_more_memory(recipes):
    graphs = [build(f"m{index}", *recipe) for index, recipe in enumerate(recipes)]
    for graph in (
        merge(graphs),
        evaluated(merge(graphs)),
        BatchOperators()(evaluated(merge(graphs))),
    ):
        ordered = run_pipeline(graph, [order_nodes])
        assert sorted(map(hash, ordered.nodes)) == sorted(map(hash, graph.nodes))
        assert ordered.outputs == graph.outputs
        assert order_nodes(ordered) is ordered
        for program in {output.program for output in graph.outputs}:
            assert live_peak(ordered, program) <= live_peak(graph, program)
        assert_equal(interpret(graph, steps=2), interpret(ordered, steps=2))


def test_training_gives_the_same_bits(tmp_path):
    cases = [Case(f"m{i}", "branches", {"width": 4 + i % 2}, seed=i) for i in range(3)]
    found = []
    for name, change in (("before", lambda graph: graph), ("after", order_nodes)):
        folder = tmp_path / name
        folder.mkdir()
        seen = []

        def passes(graph, change=change, seen=seen):
            seen.append(ALL(graph))
            return change(seen[0])

        merged = Merged(cases, folder, batch_operators=passes)
        found.append(merged)
    graph = merged.plan.graph_data.graph
    assert live_peak(graph, "train/32") < live_peak(seen[0], "train/32")
    before, after = found
    assert_same_bits(before, after, cases)
