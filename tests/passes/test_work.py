from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support import data, nets
from support.crowd import Candidate, crowd
from support.families import FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from cgo.capture import Capturer, Examples
from cgo.graph import Graph, Node, Output, Ref, TensorType
from cgo.model import DataSpec, Model, TrainingSpec
from cgo.operators import aten
from cgo.passes.work import (
    Ceilings,
    Work,
    count_models,
    count_nodes,
    estimate_work,
    training_step,
)

BATCH = 32


def captured(factory, kwargs):
    spec = DataSpec("support.data:digits", batch_size=BATCH)
    training = TrainingSpec(loss="cross_entropy", epochs=1)
    model = Model(f"support.nets:{factory}", kwargs, data=spec, training=training, model_id="m")
    return Capturer().capture(model, Examples.of(spec)).graph


def torch_flops(net):
    """What torch counts of one step of plain PyTorch."""
    x, y = next(zip(*[part.split(BATCH) for part in data.arrays()[0]]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cross_entropy(net(x), y).backward()
    return counter.get_total_flops()


#: The others say the same again.
QUICK = ("cnn", "encoder")


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES],
)
def test_operations_of_a_step_are_those_that_torch_counts(family):
    graph = captured(family, FAMILIES[family])
    counted = count_models(graph)["m"]
    torch.manual_seed(0)
    assert counted.flops == torch_flops(getattr(nets, family)(**FAMILIES[family]))


def alone(op, args, out, **kwargs):
    """A step of one operator: shapes become trained parameters, what else there is literals."""
    nodes, operands = [], []
    for index, arg in enumerate(args):
        if isinstance(arg, list):
            nodes.append(source(f"p{index}", tuple(arg), trainable=True))
            operands.append(Ref(f"p{index}"))
        else:
            operands.append(arg)
    keywords = tuple(sorted(kwargs.items()))
    result = (TensorType("float32", tuple(out)),)
    nodes.append(Node("m/train/4/op", op, tuple(operands), keywords, result, frozenset("m")))
    return Graph(tuple(nodes), (Output("m", "train/4", "loss", "", Ref("m/train/4/op")),))


def source(name, shape, **kwargs):
    facts = {"content": "", "model": "m", "path": name, **kwargs}
    types = (TensorType("float32", shape),)
    return Node(name, "cgo.parameter", (), tuple(sorted(facts.items())), types, frozenset("m"))


NO_BIAS, ONE = None, (1, 1)
PRODUCTS = {
    "linear": ("linear.default", [[5, 7, 6], [9, 6], [9]]),
    "linear of one row": ("linear.default", [[6], [9, 6]]),
    "mm": ("mm.default", [[5, 6], [6, 7]]),
    "bmm": ("bmm.default", [[3, 5, 6], [3, 6, 7]]),
    "matmul": ("matmul.default", [[2, 3, 5, 6], [2, 3, 6, 7]]),
    "matmul, one broadcast": ("matmul.default", [[2, 3, 5, 6], [6, 7]]),
    "addmm": ("addmm.default", [[7], [5, 6], [6, 7]]),
    "baddbmm": ("baddbmm.default", [[3, 1, 7], [3, 5, 6], [3, 6, 7]]),
    "conv1d": ("conv1d.default", [[2, 4, 11], [6, 4, 3], [6]]),
    "conv2d": ("conv2d.default", [[2, 4, 9, 8], [6, 4, 3, 5], NO_BIAS, (2, 1), (1, 2)]),
    "groups": ("conv2d.default", [[2, 4, 9, 8], [6, 2, 3, 3], NO_BIAS, ONE, (0, 0), ONE, 2]),
    "one image": ("conv2d.default", [[4, 9, 8], [6, 4, 3, 3]]),
    "same": ("conv2d.padding", [[2, 4, 9, 8], [6, 4, 3, 3], NO_BIAS, ONE, "same"]),
    "conv3d": ("conv3d.default", [[2, 4, 5, 6, 7], [6, 4, 3, 2, 1]]),
    "transposed": ("conv_transpose2d.input", [[2, 4, 9, 8], [4, 6, 3, 3], NO_BIAS, (2, 2)]),
    **{
        f"convolution, transposed {back}": (
            "convolution.default",
            [[2, 4, 9, 8], [4, 4, 3, 3], NO_BIAS, ONE, (0, 0), ONE, back, (0, 0), 1],
        )
        for back in (False, True)
    },
    "attention": (
        "scaled_dot_product_attention.default",
        [[2, 3, 5, 4], [2, 3, 7, 4], [2, 3, 7, 4]],
    ),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_operations_of_a_product_are_those_that_torch_counts(case):
    op, args = f"aten.{PRODUCTS[case][0]}", PRODUCTS[case][1]
    call = [torch.randn(arg, requires_grad=True) if type(arg) is list else arg for arg in args]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = aten(op)(*call)
        forward = counter.get_total_flops()
        result.sum().backward()
    counted = count_models(alone(op, args, result.shape))["m"].flops
    assert counted == 3 * forward
    if case != "groups":  # torch's count of the backward forgets them
        assert counted == counter.get_total_flops()


def test_products_with_a_vector():
    """torch counts none of these."""
    matrix, vector = [5, 6], [6]
    for op, args, out in (
        ("aten.matmul.default", [matrix, vector], (5,)),
        ("aten.mv.default", [matrix, vector], (5,)),
        ("aten.addmv.default", [[5], matrix, vector], (5,)),
    ):
        assert count_models(alone(op, args, out))["m"].flops == 3 * 2 * 5 * 6
    assert count_models(alone("aten.dot.default", [vector, vector], ()))["m"].flops == 3 * 2 * 6


def test_einsum_of_two_tensors():
    """torch may broadcast: each combination of indices is one multiplication."""
    graph = alone("aten.einsum.default", ["bij,bjk->bik", [2, 3, 4], [2, 4, 5]], (2, 3, 5))
    op = graph.nodes[-1]
    nodes = (*graph.nodes[:-1], replace(op, args=(op.args[0], tuple(op.args[1:]))))
    assert count_models(Graph(nodes, graph.outputs))["m"].flops == 3 * 2 * 2 * 3 * 4 * 5


def layers(learns=(False, True, True)):
    """Three layers 8 -> 8 over 4 samples, each frozen or not, with views between."""
    kwargs = (("data", "d"), ("leaf", "input"), ("size", 4), ("split", "train"))
    types = (TensorType("float32", (4, 8)),)
    nodes, x = [Node("x", "cgo.input", (), kwargs, types, frozenset("m"))], Ref("x")
    for index, trained in enumerate(learns):
        nodes.append(source(f"p{index}", (8, 8), trainable=trained))
        name = f"m/train/4/linear_{index}"
        args = (x, Ref(f"p{index}"))
        nodes.append(Node(name, "aten.linear.default", args, (), types, frozenset("m")))
        view = f"m/train/4/view_{index}"
        nodes.append(
            Node(view, "aten.view.default", (Ref(name), (4, 8)), (), types, frozenset("m"))
        )
        x = Ref(view)
    return Graph(tuple(nodes), (Output("m", "train/4", "loss", "", x),))


FORWARD = Work(2 * 4 * 8 * 8, 4 * (4 * 8 + 8 * 8 + 4 * 8), 1)


def times(work, factor):
    return Work(work.flops * factor, work.bytes * factor, work.kernels * factor)


@pytest.mark.parametrize(
    ("learns", "expected"),
    [
        ((False, False, False), (1, 1, 1)),
        ((False, True, True), (1, 2, 3)),
        ((True, False, False), (2, 2, 2)),  # a frozen layer behind one that learns
    ],
)
def test_the_backward_counts_for_what_needs_a_gradient(learns, expected):
    counted = count_nodes(layers(learns))
    found = [counted[f"m/train/4/linear_{index}"] for index in range(3)]
    assert found == [times(FORWARD, factor) for factor in expected]
    assert all(counted[f"m/train/4/view_{index}"] == Work() for index in range(3))


def test_what_the_loss_does_not_need_has_no_backward():
    graph = layers((True, True, True))
    update = Output("m", "train/4", "update", "b", Ref("m/train/4/view_2"))
    loss = replace(graph.outputs[0], ref=Ref("m/train/4/view_1"))
    counted = count_nodes(Graph(graph.nodes, (loss, update)))
    assert counted["m/train/4/linear_2"] == FORWARD
    assert counted["m/train/4/linear_1"] == times(FORWARD, 3)


def test_detach_ends_the_backward():
    graph = layers((True, True, True))
    nodes = tuple(
        replace(node, op="aten.detach.default", args=node.args[:1])
        if node.name == "m/train/4/view_0"
        else node
        for node in graph.nodes
    )
    counted = count_nodes(Graph(nodes, graph.outputs))
    assert counted["m/train/4/linear_1"] == times(FORWARD, 2)


def test_other_operators_move_bytes():
    graph = alone("aten.relu.default", [[4, 8]], (4, 8))
    assert count_models(graph)["m"] == Work(0, 2 * 2 * 4 * 32, 2)


def test_only_the_largest_batch_counts():
    large, small = (crowd([Candidate("m", (), (8,), batch)]) for batch in (64, 5))
    names = {node.name for node in large.nodes}
    both = Graph(
        (*large.nodes, *(node for node in small.nodes if node.name not in names)),
        (*large.outputs, *small.outputs),
    )
    assert training_step(both) == training_step(large)
    assert count_models(both) == count_models(large)


def test_members_of_a_group_share_its_kernels_and_models_their_stem():
    graph = crowd([Candidate(name, (("stem", 8),), (4,)) for name in "ab"])
    counted = count_nodes(graph)
    assert [counted[f"{name}.0/train/32/linear_0"].kernels for name in "ab"] == [1.0, 1.0]
    stem = counted["stem/train/32/linear_0"]
    assert count_models(graph)["a"] == stem + counted["a.0/train/32/linear_0"]


@given(st.floats(1, 1e15), st.floats(1, 1e13), st.floats(0, 1e-3))
def test_seconds_are_those_of_the_lower_roof_and_the_launches(flops_per_s, bytes_per_s, kernel_s):
    ceilings = Ceilings(flops_per_s, bytes_per_s, kernel_s)
    counted = count_nodes(layers())
    for name, seconds in estimate_work(layers(), ceilings).items():
        work = counted[name]
        assert seconds >= work.flops / flops_per_s
        assert seconds >= work.bytes / bytes_per_s
        assert seconds == pytest.approx(
            work.kernels * kernel_s + max(work.flops / flops_per_s, work.bytes / bytes_per_s)
        )
