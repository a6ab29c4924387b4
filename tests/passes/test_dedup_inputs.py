from __future__ import annotations

from textwrap import dedent

import pytest

from cgo.graph import TensorType, dump, verify
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.merge import merge


def test_one_input_for_all_models(sketch):
    graphs = []
    for model in ("a", "b", "c"):
        build = sketch(model, data="other" if model == "c" else "digits")
        x, y = build.input(), build.input("target")
        build.out(build.add("loss", "aten.mse_loss.default", x, y))
        graphs.append(build.graph())
    out = dedup_inputs(merge(graphs))
    verify(out)
    assert dump(out) == dedent("""\
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        %a.target = cgo.input(data='digits', leaf='target', size=4, split='train') : f32[4, 8] {a, b}
        %a.loss = aten.mse_loss.default(%a.input, %a.target) : f32[4, 8] {a}
        %b.loss = aten.mse_loss.default(%a.input, %a.target) : f32[4, 8] {b}
        %c.input = cgo.input(data='other', leaf='input', size=4, split='train') : f32[4, 8] {c}
        %c.target = cgo.input(data='other', leaf='target', size=4, split='train') : f32[4, 8] {c}
        %c.loss = aten.mse_loss.default(%c.input, %c.target) : f32[4, 8] {c}
        a train/4 loss <- %a.loss
        b train/4 loss <- %b.loss
        c train/4 loss <- %c.loss""")  # noqa: E501
    assert dedup_inputs(out) is out


def test_an_output_that_is_an_input_follows(sketch):
    graphs = []
    for model in "ab":
        build = sketch(model)
        build.out(build.input())
        graphs.append(build.graph())
    assert dump(dedup_inputs(merge(graphs))) == dedent("""\
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        a train/4 loss <- %a.input
        b train/4 loss <- %a.input""")


@pytest.mark.parametrize("difference", ["data", "leaf", "size", "split", "dtype", "stride"])
def test_must_not_merge(sketch, difference):
    plain = TensorType("float32", (4, 8))
    a, b = sketch("a"), sketch("b", data="other" if difference == "data" else "digits")
    a.out(a.input())
    kwargs = {"data": b.data, "leaf": "input", "size": 4, "split": "train"}
    type_ = {
        "dtype": TensorType("float64", (4, 8)),
        "stride": TensorType("float32", (4, 8), (1, 4)),
    }.get(difference, plain)
    kwargs |= {
        "leaf": {"leaf": "input.0"},
        "size": {"size": 5},
        "split": {"split": "validation"},
    }.get(difference, {})
    b.out(b.add("input", "cgo.input", types=(type_,), **kwargs))
    graph = merge([a.graph(), b.graph()])
    assert dedup_inputs(graph) is graph
