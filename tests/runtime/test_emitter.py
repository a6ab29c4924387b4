"""What forms build with: columns, layouts, and the copies that bring values together."""

from collections import Counter

import pytest
import torch
from torch import fx

from cgo.graph import Node, Ref, Symbol, TensorType
from cgo.runtime.emitter import Column, Emitter, Packed, make_group, runs
from cgo.runtime.layouts import to_stacked, unstack
from cgo.tuning import CHANNELS, STACKED

CPU = torch.device("cpu")
IMAGES = TensorType("float32", (2, 3, 4, 4))
REFS = (Ref("a"), Ref("b"))
COLUMN = Column(REFS, IMAGES)


@pytest.fixture
def emitter():
    """Two members' values, a and b, each as a tensor of its own."""
    made = Emitter(CPU, dict.fromkeys(REFS, IMAGES), Counter())
    for ref in REFS:
        made.set(ref, made.graph.placeholder(ref.name))
    return made


def run(emitter, result, *values):
    emitter.graph.output(result)
    emitter.graph.lint()
    return fx.GraphModule(torch.nn.Module(), emitter.graph)(*values)


def images():
    return torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)


def calls(emitter):
    return [node.target for node in emitter.graph.nodes if node.op == "call_function"]


def test_values_are_gathered_once_a_layout(emitter):
    results = [emitter.stacked(COLUMN), emitter.stacked(COLUMN), emitter.channels(COLUMN)]
    assert emitter.gathers == 2
    a, b = images()
    stacked, again, channels = run(emitter, results, a, b)
    assert stacked is again
    assert torch.equal(stacked, torch.stack((a, b)))
    assert torch.equal(channels, torch.cat((a, b), 1))


def test_a_packed_value_is_taken_as_it_is_or_converted_by_views(emitter):
    packed = Packed(emitter.channels(COLUMN), CHANNELS)
    of_both = (Ref("c"), Ref("d"))
    emitter.set_packed(of_both, packed)
    gathers = emitter.gathers
    column = Column(of_both, IMAGES)
    assert emitter.channels(column) is packed.node
    assert emitter.layout_of(column) == CHANNELS
    a, b = images()
    stacked = run(emitter, emitter.stacked(column), a, b)
    assert emitter.gathers == gathers
    assert torch.equal(stacked, torch.stack((a, b)))


@pytest.mark.parametrize("layout", [STACKED, CHANNELS])
def test_lanes_are_taken_out_all_at_once(layout):
    """The backward of indexing one lane fills a whole tensor with zeros."""
    emitter = Emitter(CPU, dict.fromkeys(REFS, IMAGES), Counter())
    emitter.set_packed(REFS, Packed(emitter.graph.placeholder("x"), layout))
    results = [emitter.value(REFS[1]), emitter.value(REFS[0]), emitter.value(REFS[1])]
    assert calls(emitter).count(unstack) == 1
    assert calls(emitter).count(to_stacked) == (layout == CHANNELS)
    a, b = images()
    whole = torch.stack((a, b)) if layout == STACKED else torch.cat((a, b), 1)
    second, first, _ = run(emitter, results, whole)
    assert torch.equal(second, b)
    assert torch.equal(first, a)


def test_members_in_another_order_are_repacked(emitter):
    emitter.set_packed(REFS, Packed(emitter.stacked(COLUMN), STACKED))
    swapped = Column(REFS[::-1], IMAGES)
    assert emitter.layout_of(swapped) is None
    a, b = images()
    assert torch.equal(run(emitter, emitter.stacked(swapped), a, b), torch.stack((b, a)))


def test_a_shared_value_is_expanded_without_a_copy(emitter):
    shared = Column((REFS[0], REFS[0]), IMAGES)
    results = [emitter.stacked(shared), emitter.leading(shared, 5), emitter.channels(shared)]
    assert emitter.gathers == 0
    assert not emitter.wants_channels(shared)
    a, b = images()
    stacked, leading, channels = run(emitter, results, a, b)
    assert stacked.shape == (2, 2, 3, 4, 4)
    assert stacked.data_ptr() == a.data_ptr()
    assert leading.shape == (1, 1, 2, 3, 4, 4)
    assert torch.equal(channels, torch.cat((a, a), 1))


def test_a_groups_arguments_have_names_and_defaults():
    def member(name):
        args = (Ref(f"{name}.x"), Ref(f"{name}.w"), None, (2, 2))
        return Node(name, "aten.conv2d.default", args, (), (IMAGES,), frozenset({name}), group="g")

    nodes = [member("a"), member("b")]
    types = {Ref(f"{m}.{what}"): IMAGES for m in "ab" for what in "xw"}
    group = make_group(nodes, types)
    assert group.arguments["stride"] == (2, 2)
    assert group.arguments["padding"] == (0, 0)
    assert group.arguments["groups"] == 1
    assert group.arguments["bias"] is None
    assert group.columns == [group.arguments["input"], group.arguments["weight"]]
    assert group.columns[0].refs == (Ref("a.x"), Ref("b.x"))
    assert (group.size, group.operator, group.shape) == (2, "aten.conv2d", IMAGES.shape)


def test_columns_stand_in_lists_too():
    nodes = [
        Node(m, "aten.cat.default", ((Ref(f"{m}.x"), Ref(f"{m}.y")), 1), (), (IMAGES,),
             frozenset({m}), group="g")
        for m in "ab"
    ]  # fmt: skip
    types = {Ref(f"{m}.{what}"): IMAGES for m in "ab" for what in "xy"}
    group = make_group(nodes, types)
    assert [column.refs for column in group.columns] == [
        (Ref("a.x"), Ref("b.x")),
        (Ref("a.y"), Ref("b.y")),
    ]
    assert group.arguments["dim"] == 1


def test_literals_become_what_torch_takes(emitter):
    group = make_group(
        [Node("a", "aten.to.dtype", (Ref("a"), Symbol("dtype", "float64")), (), (IMAGES,),
              frozenset({"a"}))],
        emitter.types,
    )  # fmt: skip
    assert emitter.literals(group, "memory_format") == {
        "dtype": torch.float64, "non_blocking": False, "copy": False,
    }  # fmt: skip


def test_neighbours_of_one_group_run_together():
    def nodes(text):
        return [
            Node(f"n{i}", "aten.relu.default", (), (), (IMAGES,), frozenset({"m"}),
                 group=None if letter == "." else letter)
            for i, letter in enumerate(text)
        ]  # fmt: skip

    assert [len(run) for run in runs(nodes("aab..bb"))] == [2, 1, 1, 1, 2]
