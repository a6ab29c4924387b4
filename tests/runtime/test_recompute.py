"""Computing once more gives the same bits, writes once, and holds less."""

from dataclasses import replace

import pytest
import torch
from support.merged import Case, Merged, assert_same_bits
from torch import fx

import cgo
from cgo.graph import Graph, Node, Output, Ref, TensorType
from cgo.planner import Planner
from cgo.runtime.choice import rules_for
from cgo.runtime.fused_norms import trained
from cgo.runtime.lower import lower
from cgo.runtime.memory import estimate, measured_peak
from cgo.runtime.recompute import recomputing
from cgo.runtime.triton_kernels import usable

CPU = torch.device("cpu")
F32 = TensorType("float32", (32, 64))
PLAIN = cgo.Tuning(measure=False, tape=False)


def call(name, op, *args, types=(F32,), **kwargs):
    return Node(name, op, args, tuple(sorted(kwargs.items())), types, frozenset({"m"}))


def deep(length):
    nodes = [call("v0", "cgo.parameter", model="m", path="w", trainable=True)]
    nodes += [call(f"v{i}", "aten.tanh.default", Ref(f"v{i - 1}")) for i in range(1, length + 1)]
    nodes.append(
        call("loss", "aten.sum.default", Ref(f"v{length}"), types=(TensorType("float32", ()),))
    )
    return Graph(tuple(nodes), (Output("m", "train/4", "loss", "", Ref("loss")),))


def test_a_deep_net_holds_the_root_of_its_activations():
    found = []
    for recompute in (False, True):
        lowered = lower(deep(100), "train/4", CPU, recompute=recompute)
        weight = torch.linspace(-1, 1, 32 * 64).view(32, 64).requires_grad_()

        def step(lowered=lowered, weight=weight):
            lowered([weight])[0].backward()

        peak = measured_peak(step)
        found.append((peak, weight.grad))
    (plain, expected), (less, gradient) = found
    assert torch.equal(gradient, expected)
    size = 32 * 64 * 4
    assert plain >= 100 * size
    assert less <= 28 * size


def test_statistics_are_written_once():
    channels = TensorType("float32", (2,))
    x = TensorType("float32", (3, 2))
    graph = Graph(
        (
            call("x", "cgo.parameter", model="m", path="x", trainable=True, types=(x,)),
            call("mean", "cgo.buffer", model="m", path="mean", types=(channels,)),
            call("var", "cgo.buffer", model="m", path="var", types=(channels,)),
            call("n", "cgo.batch_norm", Ref("x"), None, None, Ref("mean"), Ref("var"), 0.5, 1e-5,
                 types=(x, channels, channels)),
            call("t", "aten.tanh.default", Ref("n"), types=(x,)),
            call("loss", "aten.sum.default", Ref("t"), types=(TensorType("float32", ()),)),
        ),
        (
            Output("m", "train/4", "loss", "", Ref("loss")),
            Output("m", "train/4", "update", "mean", Ref("n", 1)),
            Output("m", "train/4", "update", "var", Ref("n", 2)),
        ),
    )  # fmt: skip
    lowered = lower(graph, "train/4", CPU, recompute=True)
    assert len(lowered.written) == 2
    mean = torch.zeros(2)
    given = {"x": torch.ones(3, 2, requires_grad=True), "mean": mean, "var": torch.ones(2)}
    results = lowered([given[source.nodes[0].name] for source in lowered.sources])
    assert mean.tolist() == [0.5, 0.5]
    results[0].backward()
    assert mean.tolist() == [0.5, 0.5]


@pytest.mark.skipif(not usable(CPU, True), reason="no interpreter of Triton")
def test_a_norm_in_a_kernel_of_ours_writes_its_statistics_once_as_well():
    graph = fx.Graph()
    x, mean, var = (graph.placeholder(name) for name in ("x", "mean", "var"))
    norm = graph.call_function(trained, (x, None, None, mean, var, 0.5, 1e-5))
    graph.output((graph.call_function(torch.tanh, (norm,)),))
    given = torch.randn(3, 2).requires_grad_()
    mean, var = torch.zeros(2), torch.ones(2)
    (result,) = recomputing(graph)(given, mean, var)
    written = mean.clone()
    assert written.abs().min() > 0
    result.sum().backward()
    assert torch.equal(mean, written)


def test_training_gives_the_same_bits(tmp_path):
    cases = [Case(f"m{i}", "residual", {"width": 4, "blocks": 1 + i % 2}, seed=i) for i in range(3)]
    cases.append(Case("c", "cnn", {"width": 4, "dropout": 0.3}, seed=5))
    found = []
    for checkpoint in (False, True):
        folder = tmp_path / str(checkpoint)
        folder.mkdir()
        tuning = replace(PLAIN, checkpoint=checkpoint)
        found.append(Merged(cases, folder, tuning=tuning))
    before, after = found
    assert_same_bits(before, after, cases)


def test_a_deep_model_is_estimated_to_take_less(tmp_path):
    case = Case("m", "residual", {"width": 4, "blocks": 6})
    data = Planner().plan([case.model()], tmp_path).graph_data
    trainings = {entry.id: entry.training for entry in data.models}
    choice = rules_for(CPU)(data.graph, ("m",))
    plain = estimate(data.graph, trainings, choice=choice)
    less = estimate(data.graph, trainings, choice=replace(choice, recompute=True))
    assert less.step < 0.7 * plain.step
    assert less.state == plain.state


def test_programs_of_one_call_and_of_none():
    for length in (0, 1, 2):
        lowered = lower(deep(length), "train/4", CPU, recompute=True)
        weight = torch.full((32, 64), 0.5, requires_grad=True)
        lowered([weight])[0].backward()
        assert weight.grad is not None
