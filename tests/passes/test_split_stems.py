"""Stems cut out of a graph, in golden text; what must not be cut out; values over programs."""

from textwrap import dedent

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from cgo.graph import Graph, Ref, TensorType, dump, prune, restrict, verify
from cgo.operators import aten
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.split_stems import SplitStems

ANY = SplitStems(least_flops=1, flops_a_byte=0)
PROGRAMS = (("train", 4), ("train", 3), ("validation", 5))


def f32(*shape: int, stride=None) -> tuple[TensorType]:
    return (TensorType("float32", shape, stride),)


def model(sketch, id_, stem, programs=PROGRAMS, head=True):
    """A stem that `stem(build, x, size, tag)` adds to each program, under a trainable head."""
    build = sketch(id_)
    head_weight = build.parameter("head", 8, 8)
    for split, size in programs:
        tag = f"n/{split}/{size}"
        inputs = {"leaf": "input", "split": split, "size": size, "data": "digits"}
        x = build.add(f"{tag}/x", "cgo.input", types=f32(size, 8), **inputs)
        y = stem(build, x, size, tag)
        if head:
            y = build.add(f"{tag}/y", "aten.linear.default", y, head_weight, types=f32(size, 8))
        build.out(y, program=f"{split}/{size}")
    # Parameters are shared by the programs of a model.
    nodes = {node.name: node for node in build.nodes}
    build.nodes = [n for n in nodes.values() if n.op in ("cgo.parameter", "cgo.buffer")]
    build.nodes += [n for n in nodes.values() if n.op not in ("cgo.parameter", "cgo.buffer")]
    return build


def merged(*builds) -> Graph:
    nodes = tuple(node for build in builds for node in build.nodes)
    outputs = tuple(output for build in builds for output in build.outputs)
    return dedup_stems(dedup_inputs(prune(Graph(nodes, outputs))))


def frozen(build, x, size, tag, content="f00"):
    w = build.parameter("stem", 8, 8, content=content)
    h = build.add(f"{tag}/h", "aten.linear.default", x, w, types=f32(size, 8))
    return build.add(f"{tag}/r", "aten.relu.default", h, types=f32(size, 8))


def leaves(split):
    return sorted((value.leaf, value.split) for value in split.values)


def test_a_stem_that_two_models_share_is_cut_out_of_all_programs(sketch):
    graph = merged(model(sketch, "a", frozen), model(sketch, "b", frozen))
    split = ANY(graph)
    verify(split.stem)
    verify(split.rest)
    assert dump(split.stem) == dedent("""\
        %a.stem = cgo.parameter(content='f00', model='a', path='stem', trainable=False) : f32[8, 8] {a}
        %a.n/train/4/x = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {a}
        %a.n/train/4/h = aten.linear.default(%a.n/train/4/x, %a.stem) : f32[4, 8] {a}
        %a.n/train/4/r = aten.relu.default(%a.n/train/4/h) : f32[4, 8] {a}
        %a.n/train/3/x = cgo.input(data='digits', leaf='input', size=3, split='train') : f32[3, 8] {a}
        %a.n/train/3/h = aten.linear.default(%a.n/train/3/x, %a.stem) : f32[3, 8] {a}
        %a.n/train/3/r = aten.relu.default(%a.n/train/3/h) : f32[3, 8] {a}
        %a.n/validation/5/x = cgo.input(data='digits', leaf='input', size=5, split='validation') : f32[5, 8] {a}
        %a.n/validation/5/h = aten.linear.default(%a.n/validation/5/x, %a.stem) : f32[5, 8] {a}
        %a.n/validation/5/r = aten.relu.default(%a.n/validation/5/h) : f32[5, 8] {a}
        a train/4 stem stem.0 <- %a.n/train/4/r
        a train/3 stem stem.0 <- %a.n/train/3/r
        a validation/5 stem stem.0 <- %a.n/validation/5/r""")  # noqa: E501
    assert dump(split.rest) == dedent("""\
        %a.n/train/4/r/stem.0 = cgo.input(data='digits', leaf='stem.0', size=4, split='train') : f32[4, 8] {a, b}
        %a.n/train/3/r/stem.0 = cgo.input(data='digits', leaf='stem.0', size=3, split='train') : f32[3, 8] {a, b}
        %a.n/validation/5/r/stem.0 = cgo.input(data='digits', leaf='stem.0', size=5, split='validation') : f32[5, 8] {a, b}
        %a.head = cgo.parameter(content='', model='a', path='head', trainable=True) : f32[8, 8] {a}
        %a.n/train/4/y = aten.linear.default(%a.n/train/4/r/stem.0, %a.head) : f32[4, 8] {a}
        %a.n/train/3/y = aten.linear.default(%a.n/train/3/r/stem.0, %a.head) : f32[3, 8] {a}
        %a.n/validation/5/y = aten.linear.default(%a.n/validation/5/r/stem.0, %a.head) : f32[5, 8] {a}
        %b.head = cgo.parameter(content='', model='b', path='head', trainable=True) : f32[8, 8] {b}
        %b.n/train/4/y = aten.linear.default(%a.n/train/4/r/stem.0, %b.head) : f32[4, 8] {b}
        %b.n/train/3/y = aten.linear.default(%a.n/train/3/r/stem.0, %b.head) : f32[3, 8] {b}
        %b.n/validation/5/y = aten.linear.default(%a.n/validation/5/r/stem.0, %b.head) : f32[5, 8] {b}
        a train/4 loss <- %a.n/train/4/y
        a train/3 loss <- %a.n/train/3/y
        a validation/5 loss <- %a.n/validation/5/y
        b train/4 loss <- %b.n/train/4/y
        b train/3 loss <- %b.n/train/3/y
        b validation/5 loss <- %b.n/validation/5/y""")  # noqa: E501
    assert leaves(split) == [("stem.0", "train"), ("stem.0", "validation")]
    assert {value.models for value in split.values} == {frozenset("ab")}
    assert {value.sample_bytes for value in split.values} == {32}
    again = ANY(split.rest)
    assert again.rest is split.rest
    assert again.values == ()


def test_stems_that_differ_get_leaves_of_their_own(sketch):
    def other(build, x, size, tag):
        return frozen(build, x, size, tag, content="f01")

    split = ANY(merged(model(sketch, "a", frozen), model(sketch, "b", other)))
    assert leaves(split) == [
        ("stem.0", "train"), ("stem.0", "validation"), ("stem.1", "train"), ("stem.1", "validation")
    ]  # fmt: skip
    assert {(value.leaf, value.models) for value in split.values} == {
        ("stem.0", frozenset("a")), ("stem.1", frozenset("b"))
    }  # fmt: skip


def test_models_that_nothing_has_merged_share_a_leaf(sketch):
    builds = [model(sketch, id_, frozen) for id_ in "ab"]
    nodes = tuple(node for build in builds for node in build.nodes)
    outputs = tuple(output for build in builds for output in build.outputs)
    split = ANY(prune(Graph(nodes, outputs)))
    assert leaves(split) == [("stem.0", "train"), ("stem.0", "validation")]
    assert len([node for node in split.stem.nodes if "linear" in node.op]) == 3


def test_the_number_of_samples_in_a_shape_is_left_out(sketch):
    def stem(build, x, size, tag):
        y = frozen(build, x, size, tag)
        y = build.add(f"{tag}/v", "aten.view.default", y, (size, 2, 4), types=f32(size, 2, 4))
        return build.add(f"{tag}/m", "aten.sum.dim_IntList", y, (1,), types=f32(size, 4))

    assert leaves(ANY(merged(model(sketch, "a", stem)))) == [
        ("stem.0", "train"), ("stem.0", "validation")
    ]  # fmt: skip


def test_a_class_token_that_is_expanded_over_the_batch_belongs_to_the_stem(sketch):
    def stem(build, x, size, tag):
        y = frozen(build, x, size, tag)
        token = build.parameter("token", 1, 2, content="t")
        wide = build.add(f"{tag}/e", "aten.expand.default", token, (size, -1), types=f32(size, 2))
        return build.add(f"{tag}/c", "aten.cat.default", (wide, y), 1, types=f32(size, 10))

    split = ANY(merged(model(sketch, "a", stem)))
    assert {value.type.shape for value in split.values} == {(10,)}


def unmatched(op, *args, shape=None, content=None, **kwargs):
    """A stem whose last operator mixes samples, or is not the same for all batch sizes."""

    def stem(build, x, size, tag):
        y = frozen(build, x, size, tag)
        given = [size if arg == "N" else arg for arg in args]
        if content is not None:
            given.insert(0, build.constant(f"{tag}/const", *content, content="c"))
        out = tuple(size if part == "N" else part for part in shape or ("N", 8))
        return build.add(f"{tag}/last", op, y, *given, types=f32(*out), **kwargs)

    return stem


@pytest.mark.parametrize(
    "stem",
    [
        unmatched("aten.softmax.int", 0),
        unmatched("aten.view.default", (2, -1), shape=(2, "N", 4)),
        unmatched("aten.sum.dim_IntList", (0,), shape=(8,)),
        unmatched("aten.roll.default", (1,), (0,)),
        unmatched("aten.add.Tensor", content=(4, 8)),
        unmatched("aten.bernoulli.default"),
        unmatched("aten.dropout.default", 0.5, True),
        unmatched("aten.batch_norm.default", None, None, None, True, 0.1, 1e-5, False,
                  content=(8,)),
    ],
    ids=["softmax", "view", "sum", "roll", "constant", "random", "dropout", "norm"],
)  # fmt: skip
def test_what_mixes_samples_stays_outside(sketch, stem):
    split = ANY(merged(model(sketch, "a", stem)))
    verify(split.rest)
    last = [node for node in split.rest.nodes if node.name.endswith("/last")]
    assert len(last) == 3
    assert all("/stem.0" in dump(Graph((node,), ())) for node in last)  # it reads a stored value


def test_a_value_that_one_batch_size_does_not_compute_is_not_stored(sketch):
    """A view into two chunks keeps dimension 0 where the batch happens to be two samples."""

    def chunks(build, x, size, tag):
        y = build.add(f"{tag}/c", "aten.view.default", x, (2, -1), types=f32(2, 4 * size))
        w = build.parameter("stem", 8, 8, content="f00")
        return build.add(f"{tag}/l", "aten.linear.default", y, w, types=f32(2, 8))

    graph = merged(model(sketch, "a", chunks, [("train", 2), ("train", 4)]))
    assert ANY(graph).rest is graph
    assert ANY(merged(model(sketch, "a", chunks, [("train", 2)]))).values != ()


def test_a_literal_that_follows_the_batch_size_tells_values_apart(sketch):
    """Validation has one size, so its values are the same in every epoch all the same."""
    split = ANY(merged(model(sketch, "a", unmatched("aten.add.Scalar", "N"))))
    assert leaves(split) == [("stem.0", "train"), ("stem.1", "validation")]
    assert [n.name for n in split.rest.nodes if n.name.endswith("/last")] == [
        "a.n/train/4/last", "a.n/train/3/last"
    ]  # fmt: skip


def test_training_and_validation_may_store_different_values(sketch):
    def stem(build, x, size, tag):
        y = frozen(build, x, size, tag)
        return build.add(f"{tag}/d", "aten.dropout.default", y, 0.5, "train" in tag,
                         types=f32(size, 8))  # fmt: skip

    assert leaves(ANY(merged(model(sketch, "a", stem)))) == [
        ("stem.0", "train"), ("stem.1", "validation")
    ]  # fmt: skip


def test_no_targets_no_trainable_parameters_and_no_buffers_that_learn(sketch):
    def target(build, x, size, tag):
        kwargs = {"leaf": "target", "split": tag.split("/")[1], "size": size, "data": "digits"}
        return frozen(
            build, build.add(f"{tag}/t", "cgo.input", types=f32(size, 8), **kwargs), size, tag
        )

    def trainable(build, x, size, tag):
        w = build.parameter("stem", 8, 8)
        return build.add(f"{tag}/h", "aten.linear.default", x, w, types=f32(size, 8))

    def learning(build, x, size, tag):
        w = build.buffer("stem", 8, 8, content="f00")
        if "train" in tag:
            more = build.add(f"{tag}/m", "aten.add.Scalar", w, 1, types=f32(8, 8))
            build.out(more, "update", "stem", program=f"train/{size}")
        return build.add(f"{tag}/h", "aten.linear.default", x, w, types=f32(size, 8))

    for stem in (target, trainable, learning):
        graph = merged(model(sketch, "a", stem))
        assert ANY(graph).rest is graph


def test_a_constant_buffer_is_frozen(sketch):
    def stem(build, x, size, tag):
        w = build.buffer("stem", 8, 8, content="f00")
        return build.add(f"{tag}/h", "aten.linear.default", x, w, types=f32(size, 8))

    assert ANY(merged(model(sketch, "a", stem))).values != ()


def test_values_whose_memory_is_looked_into_are_not_stored(sketch):
    graph = merged(model(sketch, "a", unmatched("aten.as_strided.default", (4, 8), (8, 1))))
    assert {node.name.split("/")[-2] for node in ANY(graph).rest.nodes if "stem." in node.name} == {
        "h"
    }


def test_a_prediction_that_nothing_trains_is_read_from_the_store(sketch):
    split = ANY(merged(model(sketch, "a", frozen, head=False)))
    assert dump(split.rest).splitlines()[-1] == (
        "a validation/5 loss <- %a.n/validation/5/r/stem.0"
    )


def test_a_stored_value_is_handed_over_contiguous(sketch):
    def stem(build, x, size, tag):
        y = frozen(build, x, size, tag)
        return build.add(f"{tag}/c", "aten.clone.default", y, types=f32(size, 8, stride=(1, size)))

    split = ANY(merged(model(sketch, "a", stem)))
    assert split.rest.nodes[0].types == f32(4, 8)


def test_little_work_for_many_bytes_is_not_worth_it(sketch):
    graph = merged(model(sketch, "a", frozen))  # 128 operations for 32 bytes a sample
    assert SplitStems()(graph).rest is graph
    assert SplitStems(129, 0)(graph).rest is graph
    assert SplitStems(128, 4)(graph).values != ()
    assert SplitStems(0, 5)(graph).rest is graph


# --- random graphs ----------------------------------------------------------------------------

PLACE = st.integers(0, 30)  # of an earlier value, modulo their number
STEP = st.one_of(
    st.tuples(st.sampled_from(["frozen", "frozen", "trained", "more"]), PLACE, st.integers(0, 1)),
    st.tuples(st.just("aten.relu.default"), PLACE),
    st.tuples(st.just("aten.add.Tensor"), PLACE, PLACE),
    st.tuples(st.just("aten.softmax.int"), PLACE, st.just((0,)) | st.just((1,))),
    st.tuples(st.just("aten.roll.default"), PLACE, st.just(((1,), (0,)))),
    st.tuples(st.just("aten.view.default"), PLACE, st.just((("N", 8),)) | st.just(((-1, 8),))),
    st.tuples(st.just("aten.layer_norm.default"), PLACE, st.just(((8,),))),
    st.tuples(st.just("aten.mul.Scalar"), PLACE, st.just((2.0,)) | st.just(("N",))),
)
EPOCHS = (torch.arange(7), torch.tensor([4, 2, 6, 0, 1, 5, 3]))


def drawn(sketch, id_, steps):
    """A model whose programs all take these steps."""

    def stem(build, x, size, tag):
        values = [x]
        for index, (op, place, *rest) in enumerate(steps):
            name, y = f"{tag}/{index}", values[place % len(values)]
            if op in ("frozen", "trained", "more"):
                content = f"f{rest[0]}" if op == "frozen" else ""
                w = build.parameter(f"{op}{rest[0]}", 8, 8, content=content)
                op, args = "aten.linear.default", (w,)
            elif op == "aten.add.Tensor":
                args = (values[rest[0] % len(values)],)
            else:
                args = tuple(
                    (size, *arg[1:]) if type(arg) is tuple and arg[0] == "N" else arg
                    for arg in (rest[0] if rest else ())
                )
                args = tuple(size if type(arg) is str else arg for arg in args)
            values.append(build.add(name, op, y, *args, types=f32(size, 8)))
        return values[-1]

    return model(sketch, id_, stem, [("train", 4), ("train", 3)])


def run(graph, program, leaves):
    """A program's outputs by model and key."""
    part, env = restrict(graph, program=program), {}
    for node in part.nodes:
        if node.op == "cgo.input":
            env[node.name] = leaves[node.keyword("leaf")]
        elif node.op == "cgo.parameter":
            whose = node.keyword("content") or node.keyword("model")
            generator = torch.Generator().manual_seed(sum(map(ord, f"{whose}{node.name[2:]}")))
            if node.keyword("content"):
                generator.manual_seed(sum(map(ord, whose)))
            env[node.name] = torch.randn(8, 8, dtype=torch.float64, generator=generator) / 3
        else:
            args = [env[arg.name] if type(arg) is Ref else arg for arg in node.args]
            env[node.name] = aten(node.op)(*args)
    return {(output.model, output.key): env[output.ref.name] for output in part.outputs}


@settings(
    max_examples=150,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it gives a class
)
@given(recipes=st.lists(st.lists(STEP, min_size=1, max_size=7), min_size=1, max_size=2))
def test_values_of_one_epoch_serve_another_in_other_batches(sketch, recipes):
    graph = merged(*(drawn(sketch, "ab"[i], steps) for i, steps in enumerate(recipes)))
    split = ANY(graph)
    verify(split.stem)
    verify(split.rest)
    data = torch.rand(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = {value.leaf: torch.full((7, 8), torch.nan).double() for value in split.values}
    if stored:
        for batch in EPOCHS[0].split((4, 3)):
            found = run(split.stem, f"train/{len(batch)}", {"input": data[batch]})
            for (_, leaf), value in found.items():
                stored[leaf][batch] = value
    for batch in EPOCHS[1].split((4, 3)):
        program, kept = f"train/{len(batch)}", {leaf: v[batch] for leaf, v in stored.items()}
        expected = run(graph, program, {"input": data[batch]})
        found = run(split.rest, program, {"input": data[batch], **kept})
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)
