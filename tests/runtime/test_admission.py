"""Models that cannot run are refused by themselves, and real ones never."""

from dataclasses import replace

import pytest
import torch
from support import hostile

from cgo.errors import GraphDataError
from cgo.graph import Node, Ref, TensorType, prune
from cgo.graph_data import GraphData
from cgo.runtime.admission import Calls, admit
from cgo.runtime.watching import Limits

ENOUGH = Limits.of_memory(2**34)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    return {
        name: GraphData.load(document, base=folder / name)
        for name, document in hostile.write_documents(folder).items()
    }


def constants_of(data):
    from cgo import weights

    return {} if data.constants is None else weights.load(data.base / data.constants.file)


def changed(data, named, model="a", **fields):
    """The document with the first training node of an operator changed, outside of its group."""
    node = next(
        n for n in data.graph.nodes if n.op == named and model in n.owners and "/train/" in n.name
    )
    nodes = tuple(
        replace(n, **fields, group=None) if n is node else replace(n, group=None)
        for n in data.graph.nodes
    )
    return replace(data, graph=replace(data.graph, nodes=nodes)), node


@pytest.mark.parametrize("name", ["points", "stems", "images", "tokens", "lazy", "files"])
def test_real_documents_are_admitted_as_they_are(name, families):
    data = families[name]
    found, refused = admit(data, constants_of(data), ENOUGH)
    assert found is data
    assert refused == {}


def test_what_is_refused_is_gone_and_its_neighbours_stay(families):
    data = families["points"]
    broken, node = changed(data, "aten.linear.default", args=(1, 2))
    found, refused = admit(replace(broken, aliases={"x": "a", "y": "b"}), {}, ENOUGH)
    assert list(refused) == ["a"]
    assert refused["a"].startswith(f"%{node.name}: aten.linear.default cannot be called so: ")
    assert [model.id for model in found.models] == ["b", "c"]
    assert found.aliases == {"y": "b"}
    assert {output.model for output in found.graph.outputs} == {"b", "c"}
    assert all(node.owners <= {"b", "c"} for node in found.graph.nodes)


def test_a_shared_node_refuses_all_its_owners(families):
    broken, _ = changed(families["stems"], "aten.linear.default", args=(1, 2))
    assert set(admit(broken, {}, ENOUGH)[1]) == {"a", "b"}


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ((TensorType("float32", (4, 5)),), "gives float32 [4, 4], the document has float32 [4, 5]"),
        ((TensorType("float64", (4, 4)),), "gives float32 [4, 4], the document has float64 [4, 4]"),
        ((None,), "gives float32 [4, 4], the document has no tensor"),
        ((TensorType("float32", (4, 4)),) * 2, "gives 1 values, the document has 2"),
    ],
)
def test_results_are_compared(types, message, families):
    broken, node = changed(families["points"], "aten.linear.default", types=types)
    said = admit(broken, {}, ENOUGH)[1]["a"]
    assert said == f"%{node.name}: aten.linear.default {message}"


def test_own_operators_are_called_too(families):
    node = next(n for n in families["points"].graph.nodes if n.op == "cgo.batch_norm")
    for args in (
        node.args[:5],
        (*node.args[:5], 1, 1e-5),
        (*node.args[:3], *node.args[1:3], 0.1, 1),
    ):
        broken, _ = changed(families["points"], "cgo.batch_norm", args=args)
        assert "cgo.batch_norm cannot be called so" in admit(broken, {}, ENOUGH)[1]["a"]


@pytest.mark.parametrize(
    "fields",
    [{"distribution": "none"}, {"p": "x"}, {"p": 2.0}, {"p": -1.0}, {"distribution": "randint"}],
)
def test_random_numbers_are_drawn_once(fields, families):
    node = next(n for n in families["points"].graph.nodes if n.op == "cgo.random")
    kwargs = tuple(sorted((dict(node.kwargs) | fields).items()))
    broken, node = changed(families["points"], "cgo.random", kwargs=kwargs)
    assert "random numbers cannot be drawn so" in admit(broken, {}, ENOUGH)[1]["a"]


@pytest.mark.parametrize(
    ("stride", "overlaps"), [((4, 1), False), ((1, 4), False), ((0, 1), True), ((1, 1), True)]
)
def test_random_numbers_have_places_of_their_own(stride, overlaps, families):
    type_ = TensorType("float32", (4, 4), stride)
    broken, _ = changed(families["points"], "cgo.random", types=(type_,))
    refused = admit(broken, {}, ENOUGH)[1]
    assert ("give elements one place in memory" in refused.get("a", "")) is overlaps


def test_constants_are_compared(families):
    data = families["tokens"]
    constants = constants_of(data)
    assert constants
    assert "the file of constants does not hold it" in admit(data, {}, ENOUGH)[1]["a"]
    other = {content: torch.zeros(3, 3) for content in constants}
    assert "float32 [3, 3], and not float32 [64]" in admit(data, other, ENOUGH)[1]["a"]


def test_losses_are_scalars(families):
    data = families["points"]
    outputs = tuple(
        replace(o, ref=Ref("a/train/4/linear")) if (o.model, o.role) == ("a", "loss") else o
        for o in data.graph.outputs
    )
    broken = replace(data, graph=prune(replace(data.graph, outputs=outputs)))
    said = admit(broken, {}, ENOUGH)[1]
    assert (
        "loss of train/4, %a/train/4/linear: float32 [4, 4] is no floating-point scalar"
        in said["a"]
    )
    nothing = tuple(o for o in data.graph.outputs if o.model != "a")
    broken = replace(data, graph=prune(replace(data.graph, outputs=nothing)))
    assert "neither a loss of it nor a reason" in admit(broken, {}, ENOUGH)[1]["a"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(tensor_bytes=10), "bytes; at most 10 are taken"),
        (Limits(flops=10), "operations; at most 10 are taken"),
        (Limits(graph_bytes=10), "bytes in all; at most 10 are taken"),
    ],
)
def test_limits(limits, message, families):
    refused = admit(families["points"], {}, limits)[1]
    assert set(refused) == {"a", "b", "c"}
    assert all(message in said for said in refused.values())


def test_groups_do_one_work(families):
    data = families["points"]
    node = next(n for n in data.graph.nodes if n.group is not None)
    nodes = tuple(
        replace(n, kwargs=(*n.kwargs, ("x", 1))) if n is node else n for n in data.graph.nodes
    )
    with pytest.raises(GraphDataError, match="are of one group"):
        admit(replace(data, graph=replace(data.graph, nodes=nodes)), {}, ENOUGH)


def test_torch_says_nothing_on_the_terminal(families, capfd):
    call = {"op": "aten.upsample_linear1d.default", "args": (Ref("a/0.weight"), (1, 2), True)}
    broken, _ = changed(families["points"], "aten.linear.default", **call)
    assert admit(broken, {}, ENOUGH)[1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (((2, 2), (3, 1)), None),
        (((2, 2), (3, 1), 11), None),
        (((2, 2), (3, 1), 12), "reaches over 17 of 16 elements"),
        (((100,), (1,)), "reaches over 100 of 16"),
        (((2,), (-1,)), "stride [-1]"),
        (((2,), (1, 1)), "size [2], stride [1, 1]"),
        (((2,), (1,), -1), "offset -1"),
        ((2, 1), "are no lists of numbers"),
    ],
)
def test_strides_stay_inside(args, message, families):
    call = {"op": "aten.as_strided.default", "args": (Ref("a/train/4/batch_norm"), *args)}
    shape = args[0] if isinstance(args[0], tuple) else (2,)
    types = (TensorType("float32", shape, args[1] if isinstance(args[1], tuple) else None),)
    broken, node = changed(families["points"], "aten.relu.default", types=types, **call)
    said = admit(broken, {}, ENOUGH)[1]["a"]  # what reads it is refused in any case
    first = said.startswith(f"%{node.name}: aten.as_strided.default: ")
    assert first is (message is not None)
    assert message is None or message in said


def test_operators_without_a_shape_function_are_run_only_where_that_is_safe():
    def reason(op, *args, types):
        node = Node("n", op, args, (), types, frozenset({"a"}))
        return Calls(ENOUGH).reason(node, [x] * args.count(Ref("x", 0)))

    x = TensorType("float32", (1, 1, 4, 4, 4))
    value = Ref("x", 0)
    quantize = "aten.fake_quantize_per_tensor_affine.default"
    assert reason(quantize, value, 0.1, 0, -128, 127, types=(x,)) is None
    ends = (TensorType("float32", (5,)), TensorType("float32", (6,)))
    assert reason("aten.histogram.bin_ct", value, 5, types=ends) is None
    padded = ("aten.conv_depthwise3d.default", value, value, (4,) * 3, None, (1,) * 3)
    assert "UnsupportedOperator" in reason(*padded, (2**12,) * 3, (1,) * 3, types=(x,))
