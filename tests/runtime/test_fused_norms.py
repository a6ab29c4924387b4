"""The operators of fused norms, as the machinery around a step sees them."""

import math
from collections import Counter

import pytest
import torch
from support.fakes import assert_fakes_are_alike
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo.graph import is_training
from cgo.passes.assign_layouts import Option
from cgo.planner import Planner
from cgo.runtime import costs
from cgo.runtime.bodies import record_body
from cgo.runtime.choice import Rules, Way
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import Timer
from cgo.runtime.device_profile import prior
from cgo.runtime.emitter import operator_of, runs
from cgo.runtime.forms import forms_of
from cgo.runtime.fused_norms import evaluated, normalised, trained, trained_copying
from cgo.runtime.measuring import Budget, Measuring
from cgo.runtime.streams import written_by
from cgo.runtime.tape import compile_tape, interpreted, record
from cgo.runtime.triton_kernels import usable
from cgo.runtime.tuning import Tuner
from cgo.tuning import CHANNELS

CPU = torch.device("cpu")
LAST = torch.channels_last
norm = pytest.importorskip("cgo.runtime.triton_kernels.norm", exc_type=ImportError)

interpreting = pytest.mark.skipif(
    not usable(CPU, True), reason="Triton interprets no kernels here: it is missing, or for a GPU"
)


def given(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, added = (drawn(3, 4, 2, 5).contiguous(memory_format=LAST) for _ in range(2))
    return [x, drawn(4), drawn(4), drawn(4), drawn(4).abs() + 0.5, added]


def step(x, weight, bias, mean, var, added):
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias, added)]
    result = trained(*leaves[:3], mean, var, 0.2, 1e-5, leaves[3], "relu")
    return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]


@interpreting
@pytest.mark.parametrize("replayed", [compile_tape, interpreted], ids=["TorchScript", "Python"])
def test_a_step_is_recorded_and_replayed_with_its_bits(replayed):
    wanted = given()
    results, tape = record(step, given())
    mutable = [call for call in tape.calls if call.op._schema.is_mutable]
    assert [len(list(written_by(call))) for call in mutable] == [2]
    expected = step(*wanted)
    inputs = given()
    found = replayed(tape)(*inputs)
    for ours, theirs in zip((*found, *inputs), (*expected, *wanted), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results, expected):
        assert torch.equal(ours, theirs)


@interpreting
def test_a_captured_step_writes_its_statistics_once_a_replay():
    values, wanted = given(), given()
    expected = step(*wanted)
    results, replay = record_body(lambda: step(*values))
    assert torch.equal(values[3], given()[3])  # what was written is undone
    replay()
    for ours, theirs in zip((*results, *values), (*expected, *wanted), strict=True):
        assert torch.equal(ours, theirs)


@interpreting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_get_what_true_ones_get(dtype):
    assert_fakes_are_alike(step, lambda: given(dtype))


@interpreting
def test_the_operators_pass_torchs_own_check():
    x, weight, bias, mean, var, added = given()
    values = (x, weight, bias, mean, var, True, 0.2, 1e-5, added, "relu")
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.cgo.batch_norm_activation.default
    torch.library.opcheck(forward, values, test_utils=checks)
    out, mean, rstd = forward(*values)
    torch.library.opcheck(
        torch.ops.cgo.batch_norm_activation_backward.default,
        (torch.ones_like(x), x, out, weight, bias, mean, rstd, True, "relu", True),
        test_utils=checks,
    )


@interpreting
def test_copying_leaves_the_statistics():
    x, weight, bias, mean, var, added = given()
    before = mean.clone(), var.clone()
    found = trained_copying(x, weight, bias, mean, var, 0.2, 1e-5, added, activation="relu")
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert torch.equal(found, trained(x, weight, bias, mean, var, 0.2, 1e-5, added, "relu"))
    assert not torch.equal(mean, before[0])


@interpreting
def test_evaluation_writes_no_statistics():
    x, weight, bias, mean, var, added = given()
    before = mean.clone(), var.clone()
    found = evaluated(x, weight, bias, mean, var, 0.2, 1e-5, added)
    wanted = torch.batch_norm(x, weight, bias, mean, var, False, 0.2, 1e-5, False) + added
    torch.testing.assert_close(found, wanted)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@interpreting
def test_only_wanted_gradients_are_given():
    x, weight, bias, _, _, added = given()
    weight.requires_grad_()
    normalised(x, weight, bias, None, None, True, 0.1, 1e-5, added, "relu").sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert added.grad is None


FORCED = cgo.Tuning(kernels=True, measure=False, layout="channels", tape=True)


def residual():
    training = {"precision": "float64", "epochs": 1}
    kwargs = {"width": 3, "blocks": 1}
    return [Case(f"m{i}", "residual", kwargs, seed=i, training=training) for i in range(2)]


def operators(monkeypatch):
    """Counts what the fused norms of a trial are called with."""
    seen = Counter()
    forward = norm.forward

    def counting(*given):
        seen[given[5], given[8] is not None, given[9]] += 1
        return forward(*given)

    monkeypatch.setattr(norm, "forward", counting)
    return seen


@interpreting
def test_training_by_the_kernels_is_training_alone(tmp_path, monkeypatch):
    seen = operators(monkeypatch)
    cases = residual()
    merged = Merged(cases, tmp_path, tuning=FORCED)
    assert set(seen) == {(True, True, "relu")}  # in training, with the block's input, and a ReLU
    for case in cases:
        assert_equal_float64(merged, case)


def planned(folder):
    """A graph of two residual networks, and a group of norms that are trained."""
    graph = Planner().plan([case.model() for case in residual()], folder).graph_data.graph
    found = [part for part in runs(graph.nodes) if part[0].op == "cgo.batch_norm"]
    return graph, next(part for part in found if is_training(part[0]) and len(part) > 1)


@interpreting
def test_a_kernel_is_timed_with_what_follows(tmp_path, monkeypatch):
    seen = operators(monkeypatch)
    graph, nodes = planned(tmp_path)
    timer = Timer(CPU, graph)
    monkeypatch.setattr(costs, "_ROUNDS", 1)
    monkeypatch.setattr(costs, "_MOST_SETS", 1)
    seconds = timer.seconds(nodes, Way("batch norm in one kernel", CHANNELS), timer.behind(nodes))
    assert math.isfinite(seconds)
    assert set(seen) == {(True, True, "relu")}


class Told(Timer):
    """A timer that is told what each operator's way costs, and of the kernel with what follows."""

    def seconds(self, nodes, way, behind=()):
        if way.form == "batch norm in one kernel":
            assert [operator_of(several[0]) for several in behind] == ["aten.add", "aten.relu"]
            return self.whole_s
        return {"loop": 9.0}.get(way.form, 1.0) * len(nodes)


@pytest.mark.parametrize(
    ("whole_s", "offered", "chosen"),
    [
        (5.9, True, "batch norm in one kernel"),
        (6.1, True, "batch norm over channels"),  # the three one after another take 6
        (5.9, False, "batch norm over channels"),
        (math.inf, True, "batch norm over channels"),
        (None, True, "batch norm over channels"),  # not measured
    ],
)
def test_the_kernel_is_chosen_where_it_is_faster_than_all_that_it_does(
    whole_s, offered, chosen, tmp_path
):
    graph, nodes = planned(tmp_path)
    timer = Told(CPU, graph)
    timer.whole_s = whole_s
    measuring = Measuring(
        CostTable(None, CPU, shipped=False),
        prior("NVIDIA H100", (9, 0), 132),
        Rules(),
        Budget(100.0),
        10**9 if whole_s else 0,
        lambda form: form.offered is None or offered,
    )
    options = measuring.of_group(nodes, timer)
    best = min(options, key=lambda option: option.seconds)
    assert best.form == chosen
    if chosen == "batch norm in one kernel":
        assert best.seconds == pytest.approx(whole_s - 4.0)


@interpreting
@pytest.mark.parametrize(
    ("device", "kernels", "offered"),
    [("cuda", None, True), ("cuda", False, False), ("cpu", None, False), ("cpu", True, False)],
)
def test_kernels_are_measured_on_a_gpu_alone(device, kernels, offered):
    device = torch.device(device)
    table = CostTable(None, CPU, shipped=False)
    tuning = cgo.Tuning(kernels=kernels)
    given = {"profile": prior("NVIDIA H100", (9, 0), 132)}
    tuner = Tuner(table, device, Rules(), tuning, **given)
    forms = forms_of("cgo.batch_norm")
    assert [tuner.measuring.offered(form) for form in forms] == [True, offered]


def test_a_record_with_kernels_that_are_forbidden_is_followed_but_for_them():
    tuner = Tuner(CostTable(None, CPU), CPU, Rules(), cgo.Tuning(kernels=False))
    kernel = Option("batch norm in one kernel", "channels", 2, 1.0)
    other = Option("elementwise", "channels", 2, 1.0)
    assert tuner._allowed({"a": kernel, "b": other}) == {"b": other}
