from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from textwrap import dedent

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from support.calls import CALLS
from support.fused import Members, T
from support.recipes import RECIPE, RECIPES, assert_equal, build, interpret

from cgo.capture import Capturer, Examples
from cgo.graph import Graph, Node, Symbol, TensorType, dump, inputs_of, verify
from cgo.model import DataSpec, Model, TrainingSpec
from cgo.passes.batch_operators import BatchOperators, operators
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.zoo import random_cells

batch = BatchOperators()


def layer(build, x, name):
    """A linear layer 8 -> 8 without bias."""
    return build.add(name, "aten.linear.default", x, build.parameter(f"{name}.weight", 8, 8))


def early(build):
    """Two layers with an activation between them."""
    x = layer(build, build.input(), "one")
    build.out(layer(build, build.add("act", "aten.relu.default", x), "two"))
    return build.graph()


def late(build):
    """The same with another activation before it, so that the second layer is deeper."""
    x = build.add("tanh", "aten.tanh.default", layer(build, build.input(), "one"))
    build.out(layer(build, build.add("act", "aten.relu.default", x), "two"))
    return build.graph()


def groups(graph: Graph) -> list[list[str]]:
    """Names of the members of each group, in order."""
    runs = groupby((n for n in graph.nodes if n.group), key=lambda node: node.group)
    return [[node.name for node in members] for _, members in runs]


def assert_well_formed(before: Graph, after: Graph, width: int | None = None) -> None:
    """The same nodes but for their groups, in an order that can be executed."""
    verify(after)
    plain = {node.name: replace(node, group=None) for node in after.nodes}
    assert plain == {node.name: replace(node, group=None) for node in before.nodes}
    assert after.outputs == before.outputs
    found = groups(after)
    names = [node.group for node in after.nodes if node.group]
    assert len(found) == len(set(names)), "the members of a group stand apart"
    made: set[str] = set()
    nodes = {node.name: node for node in after.nodes}
    for members in found:
        assert 2 <= len(members) <= (width or len(nodes))
        made.update(members)
        for name in members:
            assert not {ref.name for ref in inputs_of(nodes[name])} & set(members)


def test_different_architectures_share_groups(sketch):
    merged = dedup_inputs(merge([early(sketch("a")), late(sketch("b"))]))
    after = batch(merged)
    assert dump(after) == dedent("""\
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        %a.one.weight = cgo.parameter(content='', model='a', path='one.weight', trainable=True) : f32[8, 8] {a}
        %a.two.weight = cgo.parameter(content='', model='a', path='two.weight', trainable=True) : f32[8, 8] {a}
        %b.one.weight = cgo.parameter(content='', model='b', path='one.weight', trainable=True) : f32[8, 8] {b}
        %b.two.weight = cgo.parameter(content='', model='b', path='two.weight', trainable=True) : f32[8, 8] {b}
        %a.one = aten.linear.default(%a.input, %a.one.weight) : f32[4, 8] group=g0 {a}
        %b.one = aten.linear.default(%a.input, %b.one.weight) : f32[4, 8] group=g0 {b}
        %b.tanh = aten.tanh.default(%b.one) : f32[4, 8] {b}
        %a.act = aten.relu.default(%a.one) : f32[4, 8] group=g2 {a}
        %b.act = aten.relu.default(%b.tanh) : f32[4, 8] group=g2 {b}
        %a.two = aten.linear.default(%a.act, %a.two.weight) : f32[4, 8] group=g3 {a}
        %b.two = aten.linear.default(%b.act, %b.two.weight) : f32[4, 8] group=g3 {b}
        a train/4 loss <- %a.two
        b train/4 loss <- %b.two""")  # noqa: E501
    assert_well_formed(merged, after)


def test_a_graph_without_equal_work_comes_back_as_it_is(sketch):
    alone = early(sketch("a"))
    one_after_the_other = batch(alone)
    assert one_after_the_other is alone


def test_the_result_is_a_fixed_point(sketch):
    after = batch(dedup_inputs(merge([early(sketch("a")), late(sketch("b"))])))
    assert batch(after) is after


def test_nodes_of_one_model_share_a_group(sketch):
    a = sketch("a")
    x = a.input()
    a.out(a.add("sum", "aten.add.Tensor", layer(a, x, "left"), layer(a, x, "right")))
    assert groups(batch(a.graph())) == [["a.left", "a.right"]]


def test_parallel_branches_keep_their_order_from_group_to_group(sketch):
    """So the second group finds the first one's lanes as they lie."""
    graphs = []
    for model in "ba":
        build = sketch(model)
        x = build.input()
        branches = [build.add(f"act{i}", "aten.relu.default", layer(build, x, f"fc{i}"))
                    for i in (2, 1, 3)]  # fmt: skip
        build.out(build.add("sum", "aten.stack.default", tuple(branches)))
        graphs.append(build.graph())
    first, second, _ = groups(batch(dedup_inputs(merge(graphs))))
    assert first == [f"{model}.fc{i}" for model in "ab" for i in (1, 2, 3)]
    assert second == [f"{model}.act{i}" for model in "ab" for i in (1, 2, 3)]


# --- what must not be grouped -------------------------------------------------------------------


def test_what_must_not_be_grouped(sketch):
    """Each pair differs in one thing that one operator cannot do for both."""
    pairs = {
        "data": {"data": "other"},
        "program": {"program": "train/3"},
        "autocast": {"autocast": "bfloat16"},
        "shape": {"size": 5},
        "trained": {"content": "ab12"},
    }
    for name, change in pairs.items():
        graphs = []
        for model, given_ in (("a", {}), ("b", change), ("c", {})):
            build = sketch(model, given_.get("data", "digits"))
            x = build.input(size=given_.get("size", 4))
            weight = build.parameter("weight", 8, 8, content=given_.get("content", ""))
            autocast = given_.get("autocast")
            types = (TensorType("float32", (given_.get("size", 4), 8)),)
            y = build.add("fc", "aten.linear.default", x, weight, autocast=autocast, types=types)
            build.out(y, program=given_.get("program", "train/4"))
            graphs.append(build.graph())
        assert groups(batch(merge(graphs))) == [["a.fc", "c.fc"]], name


def test_a_buffer_is_no_parameter(sketch):
    graphs = []
    for model in "abc":
        build = sketch(model)
        scale = (
            build.buffer("scale", 8, content="00")
            if model == "b"
            else build.parameter("scale", 8, content="00")
        )
        build.out(build.add("mul", "aten.mul.Tensor", build.input(), scale))
        graphs.append(build.graph())
    assert groups(batch(merge(graphs))) == [["a.mul", "c.mul"]]


def changes(value):
    """A tree of arguments with one literal changed at a time, and what the change was."""
    if isinstance(value, T):
        return
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            for other, what in changes(part):
                yield (*value[:index], other, *value[index + 1 :]), what
    elif isinstance(value, bool):
        yield not value, f"{value} -> {not value}"
        yield int(value), f"{value} -> {int(value)}"
    elif isinstance(value, int):
        yield value + 1, f"{value} -> {value + 1}"
        yield float(value), f"{value} -> {float(value)}"
    elif isinstance(value, float):
        yield math.nextafter(value, 2.0), f"{value} -> the next float"
        if value == 0.0:
            yield -0.0, "0.0 -> -0.0"
    elif isinstance(value, str):
        yield value + "x", f"{value!r} -> another text"
    elif isinstance(value, Symbol):
        yield replace(value, value="float16"), f"{value} -> float16"


def literals(call):
    """Arguments by position, then the values of those by name, in the order of names."""
    return call.args, tuple(call.kwargs[key] for key in sorted(call.kwargs))


def with_literals():
    """Every operator with literals, once."""
    found = {}
    for call in CALLS:
        if any(True for _ in changes(literals(call))):
            found.setdefault(call.op, call)
    return list(found.values())


@pytest.mark.parametrize("call", with_literals(), ids=lambda call: call.op)
def test_one_literal_changed_in_one_model_keeps_it_out(call):
    graph, _ = Members(call).graph(packed=True)
    everyone, others = [f"m{i}/train/4/op" for i in range(3)], ["m0/train/4/op", "m2/train/4/op"]
    assert everyone in groups(batch(graph))
    for (args, kwargs), what in changes(literals(call)):
        changed = [_with_literals(n, args, kwargs) if n.name == everyone[1] else n
                   for n in graph.nodes]  # fmt: skip
        found = groups(batch(Graph(tuple(changed), graph.outputs)))
        assert others in found, what
        assert not any(everyone[1] in members for members in found), what


def _with_literals(node: Node, args, kwargs) -> Node:
    """The node with new literals; its references stay."""
    return replace(
        node,
        args=tuple(_merge_literals(old, new) for old, new in zip(node.args, args)),
        kwargs=tuple(
            (key, _merge_literals(old, new)) for (key, old), new in zip(node.kwargs, kwargs)
        ),
    )


def _merge_literals(old, new):
    if isinstance(new, tuple):
        return tuple(_merge_literals(left, right) for left, right in zip(old, new))
    return old if isinstance(new, T) else new


# --- options ------------------------------------------------------------------------------------


def three_layers(sketch) -> Graph:
    return dedup_inputs(merge([early(sketch(model)) for model in "abc"]))


def test_a_greatest_width_splits_groups(sketch):
    graph = three_layers(sketch)
    assert [len(members) for members in groups(batch(graph))] == [3, 3, 3]
    after = BatchOperators(max_width=2)(graph)
    assert [len(members) for members in groups(after)] == [2, 2, 2]
    assert_well_formed(graph, after, width=2)


def test_only_the_operators_named_are_grouped(sketch):
    graph = three_layers(sketch)
    only = BatchOperators(only=frozenset({"aten.relu"}))(graph)
    assert groups(only) == [["a.act", "b.act", "c.act"]]
    without = BatchOperators(without=frozenset({"aten.relu"}))(graph)
    assert [members[0] for members in groups(without)] == ["a.one", "a.two"]
    assert groups(BatchOperators(only=frozenset())(batch(graph))) == []


# --- order, determinism, width ------------------------------------------------------------------


def cell_networks(count: int, cells: int, seed: int) -> Graph:
    """Random NAS-Bench-201 networks on digits, all different, captured and merged."""
    data = DataSpec("support.data:digits", batch_size=32)
    capturer, examples = Capturer(), Examples.of(data)
    captured = [
        capturer.capture(
            Model("cgo.zoo:nas_bench_201", {"edges": edges, "cells": cells, "width": 16},
                  data=data, training=TrainingSpec(), model_id=f"m{index:02}"),
            examples,
        )
        for index, edges in enumerate(random_cells(count, seed))
    ]  # fmt: skip
    return dedup_stems(dedup_inputs(merge([item.graph for item in captured])))


def of_training(graph: Graph, *operators_: str) -> tuple[int, int]:
    """Nodes and groups of the program over whole training batches."""
    nodes = [n for n in operators(graph) if "/train/32/" in n.name]
    nodes = [n for n in nodes if not operators_ or n.op.startswith(operators_)]
    return len(nodes), len({node.group or node.name for node in nodes})


def test_eight_different_networks_make_wide_groups():
    nodes, count = of_training(batch(cell_networks(8, 1, seed=0)))
    assert nodes / count >= 6.5


@pytest.mark.long
def test_eight_different_networks_make_wide_groups_over_ten_draws():
    found = [of_training(batch(cell_networks(8, 1, seed))) for seed in range(10)]
    assert sum(nodes / count for nodes, count in found) / len(found) >= 6.5


@pytest.mark.long
def test_thirty_two_deep_networks_make_wide_groups_of_convolutions():
    graph = batch(cell_networks(32, 5, seed=0))
    assert_well_formed(graph, graph)
    nodes, count = of_training(graph, "aten.conv")
    assert nodes / count >= 9


def test_any_order_of_submission_gives_the_same_groups(sketch):
    makers = [early, late, early, late, early]
    numbers = list(range(5))
    found = set()
    for seed in range(5):
        random.Random(seed).shuffle(numbers)
        graphs = [makers[number](sketch(f"m{number}")) for number in numbers]
        found.add(str(groups(batch(dedup_inputs(merge(graphs))))))
    assert len(found) == 1


def test_groups_do_not_depend_on_the_process():
    """Sets of strings are ordered by a hash that differs from process to process."""
    script = dedent("""\
        import sys
        sys.path[:0] = ["tests/passes"]
        from conftest import Sketch
        from cgo.graph import dump
        from cgo.passes.batch_operators import BatchOperators
        from cgo.passes.merge import merge
        graphs = []
        for model in "abcd":
            build = Sketch(model)
            for first, last in ("mz", "ny"):  # programs whose sorted texts interleave
                x = build.parameter(f"scale {first}", 8)
                y = build.add(f"double {first}", "aten.mul.Tensor", x, 2)
                build.out(y, program=first)
                build.out(y, program=last)
            graphs.append(build.graph())
        print(dump(BatchOperators()(merge(graphs))))""")
    printed = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12345"
    }
    assert len(printed) == 1
    assert "group=g" in printed.pop()


TWICE = (
    ([("input",), ("random",)],
     [("call", "aten.tanh.default", 0), ("call", "aten.add.Tensor", 2, 0),
      ("call", "aten.add.Tensor", 1, 0)]),
    [], "d",
)  # fmt: skip


@settings(max_examples=150, deadline=None, print_blob=True)
@example([TWICE, TWICE], 2)  # a second run once divided its four additions otherwise
@given(RECIPES, st.sampled_from((None, 2, 3)))
def test_grouping_changes_no_output(recipes, width):
    graphs = [build(f"m{index}", *recipe) for index, recipe in enumerate(recipes)]
    before = dedup_stems(dedup_inputs(merge(graphs)))
    after = BatchOperators(max_width=width)(before)
    assert_well_formed(before, after, width)
    assert_equal(interpret(before, steps=2), interpret(after, steps=2))
    assert BatchOperators(max_width=width)(after) is after


@settings(max_examples=50, deadline=None, print_blob=True)
@given(RECIPE, st.integers(2, 4))
def test_equal_architectures_share_every_group(recipe, models):
    """What one model does once, all models do in one group."""
    graphs = [build(f"m{index}", recipe, (), "d") for index in range(models)]
    after = batch(merge(graphs))
    for node in operators(after):
        assert node.group is not None
    assert all(len(members) % models == 0 for members in groups(after))
