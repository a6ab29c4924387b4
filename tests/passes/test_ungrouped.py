from __future__ import annotations

import pytest

from cgo.graph import TensorType
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.ungrouped import ungrouped

IMAGES = TensorType("float32", (4, 3, 8, 8))


def convolution(sketch, model, stride=(1, 1), weight=(2, 3, 3, 3), **given):
    build = sketch(model, given.pop("data", "digits"))
    x = build.add("images", "aten.expand.default", build.input(), IMAGES.shape, types=(IMAGES,))
    w = build.parameter("weight", *weight, content=given.pop("content", ""))
    build.out(build.add("conv", "aten.conv2d.default", x, w, None, stride, **given))
    return build.graph()


def reasons(graphs, options=BatchOperators()):  # noqa: B008
    merged = dedup_stems(dedup_inputs(merge(graphs)))
    return {family.op: family.reason for family in ungrouped(options(merged), options)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, "stride [2, 2], others [1, 1]"),
        ({"groups": 1.0}, "groups 1.0, others 1"),
        ({"weight": (2, 3, 1, 1)}, "input 1 is trained f32[2, 3, 1, 1], others' trained "
                                   "f32[2, 3, 3, 3]"),
        ({"content": "ab"}, "input 1 is frozen f32[2, 3, 3, 3], others' trained f32[2, 3, 3, 3]"),
        ({"autocast": "bfloat16"}, "autocast bfloat16, others None"),
        ({"types": (IMAGES,)}, "its results differ in dtype or shape"),
        ({"data": "other"}, "trains on other data"),
    ],
)  # fmt: skip
def test_the_difference_to_the_nearest_kind_is_named(sketch, change, reason):
    given = {"types": (TensorType("float32", (4, 2, 6, 6)),)}
    graphs = [convolution(sketch, model, **given) for model in "ab"]
    graphs.append(convolution(sketch, "c", **{**given, **change}))
    assert reasons(graphs)["aten.conv2d.default"] == reason


def test_the_nearest_kind_is_the_one_with_the_fewest_differences(sketch):
    graphs = [
        convolution(sketch, "a", stride=(2, 2), weight=(9, 3, 3, 3)),
        convolution(sketch, "b"),
        convolution(sketch, "c"),
        convolution(sketch, "d", stride=(3, 3)),
    ]
    options = BatchOperators()
    found = ungrouped(options(dedup_inputs(merge(graphs))), options)
    (of_d,) = [family for family in found if family.example == "d.conv"]
    assert of_d.reason == "stride [3, 3], others [1, 1]"


def test_other_reasons(sketch):
    options = BatchOperators(without=frozenset({"aten.conv2d"}))
    graphs = [convolution(sketch, model) for model in "ab"]
    found = reasons(graphs, options)
    assert found["aten.conv2d.default"] == "left out by the options"
    assert found["aten.expand.default"] == "computed once for all its models"
    assert reasons(graphs[:1])["aten.conv2d.default"] == "no other node has this operator"


def test_what_waits_for_its_own_kind_is_told_apart_from_a_full_group(sketch):
    build = sketch("a")
    x = build.add("start", "aten.tanh.default", build.input())
    for name in ("one", "two", "three"):
        x = build.add(name, "aten.mul.Tensor", build.parameter(f"{name}.scale", 4, 8), x)
    build.out(build.add("last", "aten.mul.Tensor", build.parameter("last.scale", 4, 8), x))
    found = reasons([build.graph()])
    assert found["aten.mul.Tensor"] == "its inputs are not ready together with those of its kind"
    graphs = [convolution(sketch, model) for model in "abc"]
    found = reasons(graphs, BatchOperators(max_width=2))
    assert found["aten.conv2d.default"] == "groups of its kind are as wide as the options allow"
