from __future__ import annotations

from textwrap import dedent

import pytest

from cgo.errors import GraphError
from cgo.graph import Graph, dump, verify
from cgo.passes.merge import merge


def linear(build) -> Graph:
    x, w = build.input(), build.parameter("fc.weight", 8, 8)
    build.out(build.add("fc", "aten.linear.default", x, w))
    return build.graph()


def test_graphs_stand_side_by_side_and_share_nothing(sketch):
    merged = merge([linear(sketch("b")), linear(sketch("a"))])
    verify(merged)
    assert dump(merged) == dedent("""\
        %b.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {b}
        %b.fc.weight = cgo.parameter(content='', model='b', path='fc.weight', trainable=True) : f32[8, 8] {b}
        %b.fc = aten.linear.default(%b.input, %b.fc.weight) : f32[4, 8] {b}
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a}
        %a.fc.weight = cgo.parameter(content='', model='a', path='fc.weight', trainable=True) : f32[8, 8] {a}
        %a.fc = aten.linear.default(%a.input, %a.fc.weight) : f32[4, 8] {a}
        b train/4 loss <- %b.fc
        a train/4 loss <- %a.fc""")  # noqa: E501


def test_one_graph_is_itself(sketch):
    graph = linear(sketch("a"))
    assert merge([graph]) is graph


def test_no_graphs_make_an_empty_one():
    assert merge([]) == Graph((), ())


def test_a_name_in_two_graphs_names_both_models(sketch):
    outer, inner = sketch("run"), sketch("run.1")
    outer.out(outer.parameter("1.weight", 8))
    inner.out(inner.parameter("weight", 8))
    with pytest.raises(
        GraphError, match=r"models 'run' and 'run\.1': both have a node called %run\.1\.weight"
    ):
        merge([outer.graph(), inner.graph()])


def test_the_same_graph_twice_is_refused(sketch):
    graph = linear(sketch("a"))
    with pytest.raises(GraphError, match="models 'a' and 'a'"):
        merge([graph, linear(sketch("a"))])
    with pytest.raises(GraphError, match="models 'a' and 'a'"):
        merge([graph, graph])
