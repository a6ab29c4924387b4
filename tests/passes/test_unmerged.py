from __future__ import annotations

from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.unmerged import Family, unmerged


def after_sharing(*sketches):
    return dedup_stems(dedup_inputs(merge([build.graph() for build in sketches])))


def families(*sketches) -> dict[str, tuple[int, str, str]]:
    return {f.op: (f.nodes, f.reason, f.example) for f in unmerged(after_sharing(*sketches))}


def test_each_family_has_its_reason(sketch):
    sketches = []
    for model in "ab":
        build = sketch(model)
        x = build.input()
        frozen = build.parameter("frozen", 8, 8, content=f"of {model}")
        trained = build.parameter("trained", 8, 8)
        shared = build.add("shared", "aten.relu.default", x)
        stem = build.add("stem", "aten.linear.default", shared, frozen)
        stem = build.add("tanh", "aten.tanh.default", stem)
        strange = build.add("strange", "aten.scatter_add.default", shared, 0)
        after = build.add("after", "aten.exp.default", strange)
        noise = build.add("noise", "aten.mul.Tensor", shared, build.random())
        total = build.add("cat", "aten.cat.default", (stem, after, noise))
        build.out(build.add("head", "aten.matmul.default", total, trained))
        if model == "a":
            build.out(build.add("gelu", "aten.gelu.default", x), "prediction")
        sketches.append(build)
    assert families(*sketches) == {
        "aten.linear.default": (2, "frozen values differ between models", "a.stem"),
        "aten.tanh.default": (2, "frozen values differ between models", "a.tanh"),
        "aten.scatter_add.default": (
            2,
            "operator aten.scatter_add.default not on the allow-list",
            "a.strange",
        ),
        "aten.exp.default": (
            2,
            "depends on operator aten.scatter_add.default, not on the allow-list",
            "a.after",
        ),
        "cgo.random": (2, "draws random numbers of its own model", "a.random_0"),
        "aten.mul.Tensor": (2, "depends on random numbers of its own model", "a.noise"),
        "aten.cat.default": (2, "depends on random numbers of its own model", "a.cat"),
        "aten.matmul.default": (2, "depends on trainable parameters", "a.head"),
        "aten.gelu.default": (1, "no other model computes it", "a.gelu"),
    }


def test_other_data_is_a_reason(sketch):
    sketches = []
    for model in "ab":
        build = sketch(model, data=f"data of {model}")
        build.out(build.add("relu", "aten.relu.default", build.input()))
        sketches.append(build)
    assert families(*sketches) == {
        "aten.relu.default": (2, "reads other data than the same node of other models", "a.relu")
    }


def test_one_operator_may_have_several_reasons_the_largest_family_first(sketch):
    build = sketch("a")
    x = build.input()
    for index in range(3):
        x = build.add(f"relu_{index}", "aten.relu.default", x)
    scaled = build.add("mul", "aten.mul.Tensor", x, build.parameter("w", 8))
    build.out(build.add("relu", "aten.relu.default", scaled))
    assert unmerged(build.graph()) == (
        Family("aten.relu.default", 3, "no other model computes it", "a.relu_0"),
        Family("aten.mul.Tensor", 1, "depends on trainable parameters", "a.mul"),
        Family("aten.relu.default", 1, "depends on trainable parameters", "a.relu"),
    )


def test_what_is_shared_is_no_family(sketch):
    sketches = []
    for model in "ab":
        build = sketch(model)
        build.out(build.add("relu", "aten.relu.default", build.input()))
        sketches.append(build)
    assert unmerged(after_sharing(*sketches)) == ()
