from __future__ import annotations

from dataclasses import replace
from textwrap import dedent

import pytest

from cgo.errors import GraphError
from cgo.graph import (
    Argument,
    Graph,
    Node,
    Output,
    Ref,
    Symbol,
    TensorType,
    dump,
    format_argument,
    format_type,
    homes,
    inputs_of,
    map_references,
    needed_by,
    programs,
    prune,
    rebuild,
    restrict,
    verify,
    with_homes,
    with_inputs,
)

F32 = TensorType("float32", (2, 3))


def node(name: str, op: str, *args: Argument, owners: str = "a", types=(F32,), **kwargs) -> Node:
    return Node(name, op, args, tuple(sorted(kwargs.items())), types, frozenset(owners.split()))


def loss(model: str, ref: str, program: str = "train/2") -> Output:
    return Output(model, program, "loss", "", Ref(ref))


def example() -> Graph:
    """Two models on one input; model a has an evaluation program too."""
    return Graph(
        (
            node("x", "cgo.input", leaf="input", owners="a b"),
            node("v", "cgo.input", leaf="input", split="validation"),
            node("w", "cgo.parameter", content="", model="a", path="w", trainable=True),
            node("both", "aten.relu.default", Ref("x"), owners="a b"),
            node("a1", "aten.mul.Tensor", Ref("both"), Ref("w")),
            node("b1", "aten.split.Tensor", Ref("both"), 1, owners="b", types=(F32, None)),
            node("v1", "aten.mul.Tensor", Ref("v"), Ref("w")),
        ),
        (
            loss("a", "a1"),
            Output("b", "train/2", "loss", "", Ref("b1", 1)),
            loss("a", "v1", "validation/2"),
        ),
    )


# --- text -------------------------------------------------------------------------------------


def test_dump():
    assert dump(example()) == dedent("""\
        %x = cgo.input(leaf='input') : f32[2, 3] {a, b}
        %v = cgo.input(leaf='input', split='validation') : f32[2, 3] {a}
        %w = cgo.parameter(content='', model='a', path='w', trainable=True) : f32[2, 3] {a}
        %both = aten.relu.default(%x) : f32[2, 3] {a, b}
        %a1 = aten.mul.Tensor(%both, %w) : f32[2, 3] {a}
        %b1 = aten.split.Tensor(%both, 1) : f32[2, 3], none {b}
        %v1 = aten.mul.Tensor(%v, %w) : f32[2, 3] {a}
        a train/2 loss <- %a1
        b train/2 loss <- %b1#1
        a validation/2 loss <- %v1""")


def test_dump_shows_autocast_and_keys():
    graph = Graph(
        (replace(node("x", "aten.ones.default", (2,)), autocast="bfloat16"),),
        (Output("a", "train/2", "update", "bn.mean", Ref("x")),),
    )
    assert dump(graph) == dedent("""\
        %x = aten.ones.default([2]) : f32[2, 3] autocast=bfloat16 {a}
        a train/2 update bn.mean <- %x""")


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (None, "None"),
        (True, "True"),
        (1, "1"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (float("inf"), "inf"),
        ("mean", "'mean'"),
        (Symbol("dtype", "float32"), "dtype:float32"),
        (Ref("x"), "%x"),
        (Ref("x", 2), "%x#2"),
        ((1, (Ref("x"), None)), "[1, [%x, None]]"),
        ((), "[]"),
    ],
)
def test_format_argument(argument, text):
    assert format_argument(argument) == text


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (TensorType("float32", (64, 8)), "f32[64, 8]"),
        (TensorType("bfloat16", ()), "bf16[]"),
        (TensorType("int64", (1,)), "i64[1]"),
        (TensorType("uint8", (1,)), "u8[1]"),
        (TensorType("bool", (2,)), "bool[2]"),
        (TensorType("complex64", (2,)), "c64[2]"),
        (TensorType("float64", (64, 8), (1, 64)), "f64[64, 8]@[1, 64]"),
        (None, "none"),
    ],
)
def test_format_type(type_, text):
    assert format_type(type_) == text


# --- references -------------------------------------------------------------------------------


def test_inputs_are_in_argument_order():
    made = node("n", "op", Ref("a"), (Ref("b"), (1, Ref("c", 1))), z=Ref("d"), k=(Ref("e"),))
    assert list(inputs_of(made)) == [Ref("a"), Ref("b"), Ref("c", 1), Ref("e"), Ref("d")]


def test_map_references_keeps_identity_where_nothing_changes():
    argument = (1, (Ref("a"), 2.0), "text", ())
    assert map_references(argument, lambda ref: ref) is argument
    mapped = map_references(argument, lambda ref: Ref("z"))
    assert mapped == (1, (Ref("z"), 2.0), "text", ())
    assert mapped[3] is argument[3]
    assert map_references(Ref("a"), lambda ref: None) is None


def test_with_inputs_keeps_identity_where_nothing_changes():
    made = node("n", "op", (Ref("a"), 1), k=Ref("b"))
    assert with_inputs(made, lambda ref: ref) is made
    renamed = with_inputs(made, lambda ref: Ref(ref.name * 2, ref.index))
    assert renamed == node("n", "op", (Ref("aa"), 1), k=Ref("bb"))


def test_keyword():
    made = node("n", "op", k=1, none=None)
    assert (made.keyword("k"), made.keyword("none"), made.keyword("other")) == (1, None, None)


# --- owners -----------------------------------------------------------------------------------


def test_needed_by():
    assert needed_by(example()) == {
        "x": frozenset("ab"),
        "v": frozenset("a"),
        "w": frozenset("a"),
        "both": frozenset("ab"),
        "a1": frozenset("a"),
        "b1": frozenset("b"),
        "v1": frozenset("a"),
    }


def test_prune_of_a_graph_in_order_is_the_graph():
    graph = example()
    assert prune(graph) is graph


def test_prune_drops_what_no_output_needs_and_corrects_owners():
    graph = example()
    dead = node("dead", "aten.relu.default", Ref("x"))
    wrong = replace(graph.nodes[0], owners=frozenset("c"))
    assert prune(replace(graph, nodes=(wrong, *graph.nodes[1:], dead))) == graph
    assert prune(replace(graph, outputs=())) == Graph((), ())


def test_restrict_to_a_model():
    out = restrict(example(), models=["b"])
    verify(out)
    assert dump(out) == dedent("""\
        %x = cgo.input(leaf='input') : f32[2, 3] {b}
        %both = aten.relu.default(%x) : f32[2, 3] {b}
        %b1 = aten.split.Tensor(%both, 1) : f32[2, 3], none {b}
        b train/2 loss <- %b1#1""")


def test_restrict_to_a_program():
    out = restrict(example(), program="validation/2")
    verify(out)
    assert [made.name for made in out.nodes] == ["v", "w", "v1"]
    assert restrict(example(), models=["b"], program="validation/2") == Graph((), ())
    assert programs(example()) == ("train/2", "validation/2")


def test_rebuild_renames_outputs_and_prunes():
    graph = example()
    kept = [made for made in graph.nodes if made.name != "a1"]
    out = rebuild(graph, kept, {"a1": "both"})
    verify(out)
    assert out.outputs[0] == loss("a", "both")
    assert [made.name for made in out.nodes] == ["x", "v", "w", "both", "b1", "v1"]


def shared_parameter() -> Graph:
    twins = (("b", "v"), ("c", "deep.w"))
    w = node("w", "cgo.parameter", content="f", model="a", path="w", twins=twins, owners="a b c")
    return Graph((w,), (loss("a", "w"), loss("b", "w"), loss("c", "w")))


def test_homes_of_a_shared_parameter():
    shared = shared_parameter().nodes[0]
    assert homes(shared) == (("a", "w"), ("b", "v"), ("c", "deep.w"))
    assert homes(example().nodes[2]) == (("a", "w"),)
    assert homes(example().nodes[0]) == ()
    alone = with_homes(shared, [("c", "deep.w")])
    assert alone.kwargs == (("content", "f"), ("model", "c"), ("path", "deep.w"))


def test_a_shared_parameter_moves_to_a_model_that_is_left():
    graph = shared_parameter()
    verify(graph)
    for models, expected in (
        ("a", (("a", "w"),)),
        ("b", (("b", "v"),)),
        ("cb", (("b", "v"), ("c", "deep.w"))),
    ):
        out = restrict(graph, models=models)
        verify(out)
        assert homes(out.nodes[0]) == expected


# --- verify -----------------------------------------------------------------------------------


def test_the_example_verifies():
    verify(example())


def edited(index: int, **changes) -> Graph:
    nodes = list(example().nodes)
    nodes[index] = replace(nodes[index], **changes)
    return replace(example(), nodes=tuple(nodes))


def with_output(output: Output) -> Graph:
    return replace(example(), outputs=(*example().outputs, output))


BAD = {
    "two nodes are called %x": edited(1, name="x"),
    "%both reads %y, which is not defined before it": edited(3, args=(Ref("y"),)),
    "%both reads %a1, which is not defined before it": edited(3, args=((Ref("a1"),),)),
    "%both reads %both, which is not defined before it": edited(3, kwargs=(("k", Ref("both")),)),
    "%both reads output 1 of %x, which has 1": edited(3, args=(Ref("x", 1),)),
    "%both reads output -1 of %x, which has 1": edited(3, args=(Ref("x", -1),)),
    "output loss of model 'c' reads %y, which is not defined before it": with_output(
        loss("c", "y")
    ),
    "output loss of model 'c' reads output 3 of %x, which has 1": with_output(
        Output("c", "train/2", "loss", "", Ref("x", 3))
    ),
    "output loss of model 'a' is given twice in program 'train/2'": with_output(loss("a", "x")),
    "%x: owned by ['a', 'b'], needed by ['a', 'b', 'c']": with_output(loss("c", "x")),
    "%w: owned by ['a', 'b'], needed by ['a']": edited(2, owners=frozenset("ab")),
    "%both: keyword arguments are not sorted": edited(3, kwargs=(("b", 1), ("a", 1))),
    "%both: keyword arguments are not sorted, or one is repeated": edited(
        3, kwargs=(("a", 1), ("a", 2))
    ),
    "%both: a node has at least one output": edited(3, types=()),
    "%both: [1] of type list cannot be an argument": edited(3, args=(Ref("x"), ([1],))),
    "%both: 1j of type complex cannot be an argument": edited(3, kwargs=(("k", 1j),)),
    "%v: a cgo.input takes no references": edited(1, args=(Ref("x"),)),
    "%w: stands for 'w' of model 'b', which does not own it": edited(
        2, kwargs=(("model", "b"), ("path", "w"))
    ),
    "%w: stands for 'v' of model 'b', which does not own it": edited(
        2, kwargs=(("model", "a"), ("path", "w"), ("twins", (("b", "v"),)))
    ),
    "%w: twin 'b' is no (model, path)": edited(
        2, kwargs=(("model", "a"), ("path", "w"), ("twins", ("b",)))
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_verify_refuses(message):
    with pytest.raises(GraphError) as caught:
        verify(BAD[message])
    assert message in str(caught.value)


def test_a_node_that_nobody_needs_is_refused():
    dead = node("dead", "aten.relu.default", Ref("x"))
    with pytest.raises(GraphError, match=r"%dead: owned by \['a'\], needed by \[\]"):
        verify(replace(example(), nodes=(*example().nodes, dead)))


def test_long_chains_need_no_deep_stack():
    nodes = [node("n0", "aten.ones.default")]
    nodes += [node(f"n{i}", "aten.relu.default", Ref(f"n{i - 1}")) for i in range(1, 20_000)]
    graph = Graph(tuple(nodes), (loss("a", "n19999"),))
    verify(graph)
    assert prune(graph) is graph
