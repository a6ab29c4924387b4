from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent

import pytest
import torch

from cgo.graph import Graph, Symbol, TensorType, dump, verify
from cgo.operators import aten
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.sharing import CONDITIONAL, PURE


def merged(*sketches) -> Graph:
    return dedup_inputs(merge([build.graph() for build in sketches]))


def pair(sketch, build: Callable, first, second) -> Graph:
    """Models a and b, each with the value that `build` makes from its own setting as loss."""
    sketches = []
    for model, setting in (("a", first), ("b", second)):
        made = sketch(model)
        made.out(build(made, setting))
        sketches.append(made)
    return merged(*sketches)


def test_frozen_stem_is_shared_and_heads_are_not(sketch):
    sketches = []
    for model, path in (("a", "stem"), ("b", "backbone.0")):
        build = sketch(model)
        x = build.input()
        w = build.parameter(f"{path}.weight", 8, 8, content="f00")
        stem = build.add("stem", "aten.linear.default", x, w, None)
        stem = build.add("relu", "aten.relu.default", stem)
        head = build.parameter("head.weight", 8, 8)
        build.out(build.add("head", "aten.linear.default", stem, head))
        sketches.append(build)
    out = dedup_stems(merged(*sketches))
    verify(out)
    assert dump(out) == dedent("""\
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        %a.stem.weight = cgo.parameter(content='f00', model='a', path='stem.weight', trainable=False, twins=[['b', 'backbone.0.weight']]) : f32[8, 8] {a, b}
        %a.stem = aten.linear.default(%a.input, %a.stem.weight, None) : f32[4, 8] {a, b}
        %a.relu = aten.relu.default(%a.stem) : f32[4, 8] {a, b}
        %a.head.weight = cgo.parameter(content='', model='a', path='head.weight', trainable=True) : f32[8, 8] {a}
        %a.head = aten.linear.default(%a.relu, %a.head.weight) : f32[4, 8] {a}
        %b.head.weight = cgo.parameter(content='', model='b', path='head.weight', trainable=True) : f32[8, 8] {b}
        %b.head = aten.linear.default(%a.relu, %b.head.weight) : f32[4, 8] {b}
        a train/4 loss <- %a.head
        b train/4 loss <- %b.head""")  # noqa: E501
    assert dedup_stems(out) is out


def test_programs_share_what_needs_no_batch(sketch):
    build = sketch("a")
    for program in ("train/4", "validation/4"):
        w = build.add(
            f"{program}.w", "aten.ones.default", (8, 8), types=(TensorType("float32", (8, 8)),)
        )
        x = build.input(split=program.split("/")[0])
        build.out(build.add(f"{program}.fc", "aten.linear.default", x, w), program=program)
    assert dump(dedup_stems(build.graph())) == dedent("""\
        %a.train/4.w = aten.ones.default([8, 8]) : f32[8, 8] {a}
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a}
        %a.train/4.fc = aten.linear.default(%a.input, %a.train/4.w) : f32[4, 8] {a}
        %a.validation.input = cgo.input(data='digits', leaf='input', size=4, split='validation') : f32[4, 8] {a}
        %a.validation/4.fc = aten.linear.default(%a.validation.input, %a.train/4.w) : f32[4, 8] {a}
        a train/4 loss <- %a.train/4.fc
        a validation/4 loss <- %a.validation/4.fc""")  # noqa: E501


def test_outputs_of_a_shared_node_keep_their_index(sketch):
    def build(made, _):
        halves = made.add(
            "split",
            "aten.split.Tensor",
            made.input(),
            2,
            types=(TensorType("float32", (2, 8)),) * 2,
        )
        return type(halves)(halves.name, 1)

    assert dump(dedup_stems(pair(sketch, build, 0, 0))).splitlines()[-2:] == [
        "a train/4 loss <- %a.split#1",
        "b train/4 loss <- %a.split#1",
    ]


def call(op: str, **kwargs) -> Callable:
    """A builder of `op(input, *setting)`."""
    return lambda made, setting: made.add("node", op, made.input(), *setting, **kwargs)


NAN = float("nan")


@pytest.mark.parametrize(
    "literal",
    [
        1,
        1.0,
        True,
        0.0,
        -0.0,
        NAN,
        float("inf"),
        None,
        "sum",
        (),
        (1, (2.0, False)),
        Symbol("dtype", "float64"),
    ],
    ids=repr,
)
def test_equal_literals_merge(sketch, literal):
    out = dedup_stems(pair(sketch, call("aten.add.Scalar"), (literal,), (literal,)))
    assert [node.name for node in out.nodes] == ["a.input", "a.node"]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, 1.0),
        (1, True),
        (1.0, True),
        (0, False),
        (0.0, -0.0),
        (0.0, 0),
        ((1, 2), (1, 2.0)),
        ((0.0, (0.0,)), (0.0, (-0.0,))),
        (((1,),), ((True,),)),
        ((1, 2), ((1, 2),)),
        ((), None),
        ("1", 1),
        (Symbol("dtype", "float32"), Symbol("dtype", "float64")),
        (Symbol("dtype", "strided"), Symbol("layout", "strided")),
    ],
)
@pytest.mark.parametrize("place", ["argument", "keyword"])
def test_literals_that_differ_in_type_or_bits_must_not_merge(sketch, left, right, place):
    def build(made, literal):
        if place == "keyword":
            return made.add("node", "aten.add.Scalar", made.input(), alpha=literal)
        return made.add("node", "aten.add.Scalar", made.input(), literal)

    graph = pair(sketch, build, left, right)
    assert dedup_stems(graph) is graph


def test_trainable_parameters_must_not_merge_nor_what_depends_on_them(sketch):
    def build(made, _):
        w = made.parameter("fc.weight", 8, 8)
        doubled = made.add("double", "aten.mul.Scalar", w, 2.0)
        again = made.add("again", "aten.mul.Scalar", w, 2.0)
        both = made.add("both", "aten.add.Tensor", doubled, again)
        return made.add("fc", "aten.linear.default", made.input(), both)

    graph = pair(sketch, build, 0, 0)
    assert dedup_stems(graph) is graph
    assert dump(graph) == dedent("""\
        %a.fc.weight = cgo.parameter(content='', model='a', path='fc.weight', trainable=True) : f32[8, 8] {a}
        %a.double = aten.mul.Scalar(%a.fc.weight, 2.0) : f32[4, 8] {a}
        %a.again = aten.mul.Scalar(%a.fc.weight, 2.0) : f32[4, 8] {a}
        %a.both = aten.add.Tensor(%a.double, %a.again) : f32[4, 8] {a}
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        %a.fc = aten.linear.default(%a.input, %a.both) : f32[4, 8] {a}
        %b.fc.weight = cgo.parameter(content='', model='b', path='fc.weight', trainable=True) : f32[8, 8] {b}
        %b.double = aten.mul.Scalar(%b.fc.weight, 2.0) : f32[4, 8] {b}
        %b.again = aten.mul.Scalar(%b.fc.weight, 2.0) : f32[4, 8] {b}
        %b.both = aten.add.Tensor(%b.double, %b.again) : f32[4, 8] {b}
        %b.fc = aten.linear.default(%a.input, %b.both) : f32[4, 8] {b}
        a train/4 loss <- %a.fc
        b train/4 loss <- %b.fc""")  # noqa: E501


def test_a_trainable_parameter_with_a_content_must_not_merge(sketch):
    def build(made, _):
        kwargs = {"content": "f00", "model": made.model, "path": "w", "trainable": True}
        return made.add("w", "cgo.parameter", **kwargs)

    graph = pair(sketch, build, 0, 0)
    assert dedup_stems(graph) is graph


def test_random_numbers_must_not_merge(sketch):
    def build(made, _):
        return made.add("drop", "aten.mul.Tensor", made.input(), made.random())

    graph = pair(sketch, build, 0, 0)
    assert dedup_stems(graph) is graph


@pytest.mark.parametrize(
    "op",
    [
        "aten.rand_like.default",
        "aten.bernoulli.default",
        "aten.empty_like.default",
        "aten.multinomial.default",
        "aten.unknown_operator.default",
        "aten.scatter_add.default",
    ],
)
def test_operators_off_the_list_must_not_merge(sketch, op):
    graph = pair(sketch, call(op), (), ())
    assert dedup_stems(graph) is graph


@pytest.mark.parametrize(
    ("op", "pure", "impure"),
    [
        ("aten.dropout.default", (0.5, False), (0.5, True)),
        ("aten.alpha_dropout.default", (0.5, False), (0.5, True)),
        ("aten.rrelu.default", (0.1, 0.3, False), (0.1, 0.3, True)),
        ("aten.scaled_dot_product_attention.default", (1, 2, None, 0.0), (1, 2, None, 0.1)),
        ("aten.instance_norm.default", (None, None, None, None, True, 0.1, 1e-5, False),
         (None, None, 1, 1, True, 0.1, 1e-5, False)),
        ("aten.batch_norm.default", (None, None, 1, 1, False, 0.1, 1e-5, False),
         (None, None, 1, 1, True, 0.1, 1e-5, False)),
        ("aten.gru.input", (1, (), True, 2, 0.5, False, False, False),
         (1, (), True, 2, 0.5, True, False, False)),
    ],
)  # fmt: skip
def test_operators_that_are_pure_under_a_condition(sketch, op, pure, impure):
    assert len(dedup_stems(pair(sketch, call(op), pure, pure)).nodes) == 2
    graph = pair(sketch, call(op), impure, impure)
    assert dedup_stems(graph) is graph


def test_other_data_must_not_merge(sketch):
    sketches = []
    for model in "ab":
        build = sketch(model, data=f"data of {model}")
        build.out(build.add("relu", "aten.relu.default", build.input()))
        sketches.append(build)
    graph = merged(*sketches)
    assert dedup_stems(graph) is graph


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"content": "f00"}, {"content": "f01"}),
        ({"content": "f00", "dtype": "float32"}, {"content": "f00", "dtype": "float64"}),
    ],
)
def test_frozen_values_that_differ_must_not_merge(sketch, left, right):
    def build(made, setting):
        kwargs = {"content": setting["content"], "model": made.model, "path": "w"}
        type_ = TensorType(setting.get("dtype", "float32"), (8, 8))
        w = made.add("w", "cgo.parameter", types=(type_,), trainable=False, **kwargs)
        return made.add("fc", "aten.linear.default", made.input(), w)

    assert len(dedup_stems(pair(sketch, build, left, left)).nodes) == 3
    graph = pair(sketch, build, left, right)
    assert dedup_stems(graph) is graph


def test_constants_merge_by_content(sketch):
    def build(made, content):
        return made.constant("lifted", 8, content=content)

    graph = pair(sketch, build, "c0", "c1")
    assert dedup_stems(graph) is graph
    assert len(dedup_stems(pair(sketch, build, "c0", "c0")).nodes) == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"autocast": None}, {"autocast": "bfloat16"}),
        ({"types": (TensorType("float32", (4, 8)),)}, {"types": (TensorType("float64", (4, 8)),)}),
        ({"types": (TensorType("float32", (4, 8)),)},
         {"types": (TensorType("float32", (4, 8), (1, 4)),)}),
    ],
)  # fmt: skip
def test_other_autocast_or_type_must_not_merge(sketch, left, right):
    def build(made, setting):
        return made.add("relu", "aten.relu.default", made.input(), **setting)

    assert len(dedup_stems(pair(sketch, build, left, left)).nodes) == 2
    graph = pair(sketch, build, left, right)
    assert dedup_stems(graph) is graph


def test_order_of_inputs_matters(sketch):
    def build(made, swap):
        x, y = made.input(), made.input("target")
        return made.add("sub", "aten.sub.Tensor", *((y, x) if swap else (x, y)))

    graph = pair(sketch, build, False, True)
    assert dedup_stems(graph) is graph


# --- buffers ----------------------------------------------------------------------------------


def batch_norm(made, x, path: str = "bn", content: str = "zero", momentum: float = 0.1):
    """A frozen batch norm in training mode; returns its output."""
    statistics = (TensorType("float32", (8,)),) * 2
    mean = made.buffer(f"{path}.mean", 8, content=content)
    var = made.buffer(f"{path}.var", 8, content="one")
    y = made.add(path, "cgo.batch_norm", x, None, None, mean, var, momentum, 1e-5,
                 types=(TensorType("float32", (4, 8)), *statistics))  # fmt: skip
    made.out(type(y)(y.name, 1), "update", f"{path}.mean")
    made.out(type(y)(y.name, 2), "update", f"{path}.var")
    return y


def test_buffers_that_evolve_equally_are_one_and_every_model_keeps_its_updates(sketch):
    out = dedup_stems(pair(sketch, lambda made, _: batch_norm(made, made.input()), 0, 0))
    verify(out)
    assert dump(out) == dedent("""\
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        %a.bn.mean = cgo.buffer(content='zero', model='a', path='bn.mean', twins=[['b', 'bn.mean']]) : f32[8] {a, b}
        %a.bn.var = cgo.buffer(content='one', model='a', path='bn.var', twins=[['b', 'bn.var']]) : f32[8] {a, b}
        %a.bn = cgo.batch_norm(%a.input, None, None, %a.bn.mean, %a.bn.var, 0.1, 1e-05) : f32[4, 8], f32[8], f32[8] {a, b}
        a train/4 update bn.mean <- %a.bn#1
        a train/4 update bn.var <- %a.bn#2
        a train/4 loss <- %a.bn
        b train/4 update bn.mean <- %a.bn#1
        b train/4 update bn.var <- %a.bn#2
        b train/4 loss <- %a.bn""")  # noqa: E501
    assert dedup_stems(out) is out


@pytest.mark.parametrize("setting", [{"content": "other"}, {"momentum": 0.2}])
def test_batch_norms_with_other_statistics_must_not_merge(sketch, setting):
    def build(made, kwargs):
        return batch_norm(made, batch_norm(made, made.input(), **kwargs), "second")

    graph = pair(sketch, build, {}, setting)
    assert dump(dedup_stems(graph)).count("cgo.batch_norm") == 4


def test_a_difference_far_away_splits_a_chain_of_buffers(sketch):
    """Each buffer is updated from the one before it; only the first ones differ."""

    def build(made, step):
        before = made.buffer("b0", 8, content="zero")
        made.out(made.add("n0", "aten.add.Scalar", before, step), "update", "b0")
        for index in range(1, 6):
            buffer = made.buffer(f"b{index}", 8, content="zero")
            made.out(
                made.add(f"n{index}", "aten.add.Tensor", buffer, before), "update", f"b{index}"
            )
            before = buffer
        return made.add("loss", "aten.add.Tensor", made.input(), before)

    equal = dedup_stems(pair(sketch, build, 1, 1))
    assert {len(node.owners) for node in equal.nodes} == {2}
    graph = pair(sketch, build, 1, 2)
    assert dedup_stems(graph) is graph


def test_a_buffer_that_only_one_model_updates_must_not_merge(sketch):
    def build(made, updates):
        count = made.buffer("count", content="zero", dtype="int64")
        if updates:
            made.out(made.add("more", "aten.add.Scalar", count, 1), "update", "count")
        return made.add("loss", "aten.add.Tensor", made.input(), count)

    graph = pair(sketch, build, True, False)
    assert dedup_stems(graph) is graph


def test_a_buffer_updated_in_other_programs_must_not_merge(sketch):
    def build(made, program):
        count = made.buffer("count", content="zero", dtype="int64")
        more = made.add("more", "aten.add.Scalar", count, 1)
        made.out(more, "update", "count", program=program)
        return made.add("loss", "aten.add.Tensor", made.input(), count)

    graph = pair(sketch, build, "train/4", "train/3")
    assert dump(dedup_stems(graph)).count("cgo.buffer") == 2


def test_counters_of_models_with_other_data_must_not_merge(sketch):
    """The updates are equal, but the models take different numbers of steps."""
    sketches = []
    for model, data in (("a", "digits"), ("b", "digits"), ("c", "other")):
        build = sketch(model, data)
        count = build.buffer("count", content="zero", dtype="int64")
        build.out(build.add("more", "aten.add.Scalar", count, 1), "update", "count")
        build.out(build.add("relu", "aten.relu.default", build.input()))
        sketches.append(build)
    assert dump(dedup_stems(merged(*sketches))) == dedent("""\
        %a.count = cgo.buffer(content='zero', model='a', path='count', twins=[['b', 'count']]) : i64[] {a, b}
        %a.more = aten.add.Scalar(%a.count, 1) : f32[4, 8] {a, b}
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a, b}
        %a.relu = aten.relu.default(%a.input) : f32[4, 8] {a, b}
        %c.count = cgo.buffer(content='zero', model='c', path='count') : i64[] {c}
        %c.more = aten.add.Scalar(%c.count, 1) : f32[4, 8] {c}
        %c.input = cgo.input(data='other', leaf='input', size=4, split='train') : f32[4, 8] {c}
        %c.relu = aten.relu.default(%c.input) : f32[4, 8] {c}
        a train/4 update count <- %a.more
        a train/4 loss <- %a.relu
        b train/4 update count <- %a.more
        b train/4 loss <- %a.relu
        c train/4 update count <- %c.more
        c train/4 loss <- %c.relu""")  # noqa: E501


def test_buffers_nobody_updates_merge_whatever_the_data(sketch):
    sketches = []
    for model in "ab":
        build = sketch(model, data=f"data of {model}")
        x, scale = build.input(), build.buffer("scale", 8, content="s")
        build.out(build.add("norm", "aten.div.Tensor", x, scale))
        sketches.append(build)
    names = [node.name for node in dedup_stems(merged(*sketches)).nodes]
    assert names == ["a.input", "a.scale", "a.norm", "b.input", "b.norm"]


def test_a_buffer_updated_from_a_trainable_parameter_must_not_merge(sketch):
    def build(made, _):
        w = made.parameter("w", 8)
        return batch_norm(made, made.add("scaled", "aten.mul.Tensor", made.input(), w))

    graph = pair(sketch, build, 0, 0)
    assert dedup_stems(graph) is graph


# --- the list ---------------------------------------------------------------------------------


def overloads(name: str) -> list:
    packet = getattr(torch.ops.aten, name)
    return [aten(f"aten.{name}.{overload}") for overload in packet.overloads()]


@pytest.mark.parametrize("name", sorted(PURE | CONDITIONAL.keys()))
def test_listed_operators_exist(name):
    assert any(one is not None and not one._schema.is_mutable for one in overloads(name))


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_operators_draw_no_random_numbers(name):
    for overload in overloads(name):
        if overload is not None:
            assert torch.Tag.nondeterministic_seeded not in overload.tags
