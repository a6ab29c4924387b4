"""Capture: what becomes of a module, and what is refused."""

import copy
import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from support import small
from torch import nn

import cgo
from cgo.capture import Capturer, Examples
from cgo.capture.validate import validate
from cgo.errors import CaptureError, DataError, ModelError
from cgo.garbage import uncollected
from cgo.graph import dump, restrict, verify

DATA = cgo.DataSpec("support.small:points", batch_size=16)


def spec(**kwargs):
    return cgo.TrainingSpec(**kwargs)


@pytest.fixture(scope="module")
def capturer():
    return Capturer(), Examples.of(DATA)


def capture(capturer, module, kwargs=None, seed=0, data=None, **training):
    tool, examples = capturer
    model = cgo.Model(
        module, kwargs, data=data or DATA, training=spec(**training), seed=seed, model_id="m"
    )
    return tool.capture(model, examples)


def rewrite(capturer, kind, **training):
    return capture(capturer, "support.small:rewrites", {"kind": kind}, **training)


def text(captured, program="train/16"):
    part = restrict(captured.graph, program=program)
    return dump(part).replace(f"m/{program}/", "")


def test_examples_hold_every_shape_the_loader_will_give(capturer):
    _, examples = capturer
    assert list(examples.batches) == ["train/16", "train/8", "validation/12"]
    assert examples.batches["train/8"]["input"].shape == (8, 6)


def test_golden_graph_of_a_linear_layer(capturer):
    captured = capture(capturer, "torch.nn:Linear", {"in_features": 6, "out_features": 3})
    verify(captured.graph)
    assert text(captured) == dedent(f"""\
        %m/weight = cgo.parameter(content='', model='m', path='weight', trainable=True) : f32[3, 6] {{m}}
        %m/bias = cgo.parameter(content='', model='m', path='bias', trainable=True) : f32[3] {{m}}
        %input = cgo.input(data='{DATA.digest}', leaf='input', size=16, split='train') : f32[16, 6] {{m}}
        %target = cgo.input(data='{DATA.digest}', leaf='target', size=16, split='train') : i64[16] {{m}}
        %linear = aten.linear.default(%input, %m/weight, %m/bias) : f32[16, 3] {{m}}
        %cross_entropy_loss = aten.cross_entropy_loss.default(%linear, %target) : f32[] {{m}}
        m train/16 loss <- %cross_entropy_loss""")  # noqa: E501


def test_a_no_grad_region_reads_detached_values(capturer):
    lines = text(rewrite(capturer, "no_grad")).splitlines()
    trained = "aten.linear.default(%input, %m/body.weight, %m/body.bias) : f32[16, 3] {m}"
    assert "%detach = aten.detach.default(%m/body.weight) : f32[3, 6] {m}" in lines
    assert "%linear = aten.linear.default(%input, %detach, %detach_1) : f32[16, 3] {m}" in lines
    assert f"%linear_1 = {trained}" in lines


def test_writing_the_input_becomes_functional(capturer):
    lines = text(rewrite(capturer, "write_input")).splitlines()
    assert "%mul_ = aten.mul.Tensor(%input, 2) : f32[16, 6] {m}" in lines


def test_writing_a_view_puts_the_part_back_and_reads_the_whole(capturer):
    body = text(rewrite(capturer, "write_view")).splitlines()[4:8]
    assert (
        "\n".join(body)
        == dedent("""\
        %slice_1 = aten.slice.Tensor(%input, 1, 0, 2) : f32[16, 2]@[6, 1] {m}
        %add_ = aten.add.Tensor(%slice_1, 1) : f32[16, 2] {m}
        %slice_scatter = aten.slice_scatter.default(%input, %add_, 1, 0, 2, 1) : f32[16, 6] {m}
        %linear = aten.linear.default(%slice_scatter, %m/body.weight, %m/body.bias) : f32[16, 3] {m}""")  # noqa: E501
    )


def test_a_weight_that_is_written_is_an_update_that_keeps_its_gradient(capturer):
    captured = rewrite(capturer, "write_weight")
    lines = text(captured).splitlines()
    assert "%sub = aten.sub.Tensor(%m/body.weight, %detach_1) : f32[3, 6] {m}" in lines
    assert "m train/16 update body.weight <- %add" in lines
    assert "m validation/12 update body.weight <- " in text(captured, "validation/12")


def test_a_counter_buffer_is_an_explicit_update(capturer):
    captured = rewrite(capturer, "count")
    lines = text(captured).splitlines()
    assert "m train/16 update count <- %add_" in lines
    assert "m validation/12 update count <- %add_" in text(captured, "validation/12").splitlines()


def test_training_batch_norm_updates_its_statistics_explicitly(capturer):
    lines = text(capture(capturer, "support.small:mlp")).splitlines()
    assert "m train/16 update 1.running_mean <- %batch_norm#1" in lines
    assert "m train/16 update 1.running_var <- %batch_norm#2" in lines
    assert "m train/16 update 1.num_batches_tracked <- %add_" in lines


def test_dropout_is_a_source_and_a_product(capturer):
    captured = rewrite(capturer, "dropout")
    lines = text(captured).splitlines()
    drawn = "cgo.random(distribution='dropout', model='m', order=0, p=0.5) : f32[16, 3] {m}"
    assert f"%random = {drawn}" in lines
    assert "%dropout = aten.mul.Tensor(%linear, %random) : f32[16, 3] {m}" in lines
    assert "cgo.random" not in text(captured, "validation/12")


def test_dropout_of_everything_draws_nothing(capturer):
    captured = text(capture(capturer, "support.small:mlp", {"dropout": 1.0}))
    assert "%dropout = aten.mul.Scalar(%relu_, 0.0) : f32[16, 8] {m}" in captured.splitlines()
    assert "cgo.random" not in captured


def test_float64_casts_inputs_in_the_graph(capturer):
    lines = text(capture(capturer, "support.small:mlp", precision="float64")).splitlines()
    assert "%to = aten.to.dtype(%input, dtype:float64) : f64[16, 6] {m}" in lines


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_nodes_that_run_under_autocast_are_marked(capturer, precision):
    captured = capture(capturer, "support.small:mlp", precision=precision)
    linear = next(n for n in captured.graph.nodes if n.op == "aten.linear.default")
    assert linear.autocast == precision
    assert linear.types[0].dtype == precision
    assert all(n.autocast is None for n in captured.graph.nodes if n.op == "cgo.input")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("write_strided", "a write through aten.as_strided.default, a view that cannot be undone"),
        ("multinomial", "draws random numbers in a way of its own, at small.py:"),
    ],
)
def test_what_cannot_be_rewritten_is_opaque_with_its_reason(capturer, kind, reason):
    captured = rewrite(capturer, kind)
    assert captured.graph is None
    assert reason in captured.entry.opaque


def test_an_instance_that_cannot_be_captured_is_refused(capturer):
    with pytest.raises(ModelError, match=r"model 'm'.*give a factory"):
        capture(capturer, small.Rewrites("multinomial"))


def test_an_instance_carries_its_weights(capturer):
    net = small.mlp()
    captured = capture(capturer, net)
    assert captured.entry.factory is None
    assert torch.equal(captured.state["0.weight"], net[0].weight)
    assert set(captured.state) == set(net.state_dict())


def test_instances_are_equal_when_graph_and_weights_are(capturer):
    net = small.mlp()
    other = copy.deepcopy(net)
    assert capture(capturer, net).digest == capture(capturer, other).digest
    with torch.no_grad():
        other[0].bias += 1
    assert capture(capturer, net).digest != capture(capturer, other).digest


def test_equal_structures_are_exported_once(monkeypatch):
    exports = []
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: exports.append(1) or real(*a, **k))
    tool = Capturer(["export"]), Examples.of(DATA)
    for seed in range(3):
        assert capture(tool, "support.small:mlp", seed=seed).graph is not None
    assert len(exports) == 1  # evaluation and the last batch are made from it


@pytest.mark.parametrize(("factory", "exported"), [("usual", 1), ("moody", 2)])
def test_evaluation_is_made_from_training_only_where_that_is_true(factory, exported, monkeypatch):
    exports = []
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: exports.append(1) or real(*a, **k))
    found = capture((Capturer(["export"]), Examples.of(DATA)), f"support.small:{factory}")
    assert found.graph is not None
    assert len(exports) == exported
    evaluation = dump(restrict(found.graph, program="validation/12"))
    assert "cgo.random" not in evaluation
    assert "aten.batch_norm.default" in evaluation
    assert "num_batches_tracked" not in evaluation
    assert ("aten.mul" in evaluation) == (factory == "moody")


def test_structure_drawn_from_the_seed_is_seen(capturer):
    widths = {
        capture(capturer, "support.small:seeded_structure", seed=seed).entry.state[0].shape
        for seed in range(6)
    }
    assert len(widths) > 1


def test_a_number_drawn_by_the_factory_does_not_leak_through_the_cache(capturer):
    first = capture(capturer, "support.small:hidden_scale", seed=0)
    second = capture(capturer, "support.small:hidden_scale", seed=1)
    assert text(first) != text(second)


def test_state_lists_aliases_buffers_and_frozen_parameters(capturer):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    net[1].weight = net[0].weight
    net[3].bias.requires_grad_(False)
    net.register_buffer("scratch", torch.zeros(2), persistent=False)
    entries = {e.path: e for e in capture(capturer, net).entry.state}
    assert entries["1.weight"].alias_of == "0.weight"
    assert not entries["3.bias"].trainable
    assert not entries["scratch"].persistent
    assert entries["2.running_mean"].kind == "buffer"


def test_what_fails_eagerly_fails_as_a_model_error(capturer):
    with pytest.raises(ModelError, match=r"model 'm'.*input \[16, 6\].*mat1 and mat2"):
        capture(capturer, "support.small:mlp", {"features": 7})
    with pytest.raises(ModelError, match="must return a scalar"):
        capture(capturer, "support.small:mlp", loss="support.losses:per_sample")


def test_an_optimizer_that_refuses_its_parameters_fails_before_the_trial(capturer):
    with pytest.raises(ModelError, match=r"Muon.*raised"):
        capture(capturer, "support.small:mlp", optimizer="Muon", optimizer_kwargs={"lr": 0.1})


def test_bad_data_is_a_data_error():
    with pytest.raises(DataError, match="batch_size 64 is larger than the training data"):
        Examples.of(cgo.DataSpec("support.small:points", batch_size=64))
    with pytest.raises(DataError, match="raised TypeError"):
        Examples.of(cgo.DataSpec("support.small:points", {"samples": "many"}))


def test_validation_sees_a_wrong_graph():
    tool, examples = Capturer(), Examples.of(DATA)
    net, name = small.mlp(), "train/16"
    model = cgo.Model(net, data=DATA, training=spec(), model_id="m")
    tool.capture(model, examples)
    (found,) = tool._templates.values()
    assert not isinstance(found, str)
    program = found.programs[name]
    validate(program, name, net, spec(), examples.batches[name])
    position = next(i for i, n in enumerate(program.nodes) if n.op == "aten.relu.default")
    nodes = list(program.nodes)
    nodes[position] = replace(nodes[position], op="aten.sigmoid.default")
    broken = replace(program, nodes=nodes)
    with pytest.raises(CaptureError, match="captured and eager differ in train/16"):
        validate(broken, name, net, spec(), examples.batches[name])


def test_capture_leaves_the_module_and_the_random_streams_alone(capturer):
    net = small.mlp(dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    capture(capturer, net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


class Unprintable(nn.Sequential):
    def __repr__(self):
        raise AttributeError("no arguments to print")


def test_a_module_that_cannot_be_printed_is_captured(capturer):
    first, second = (capture(capturer, Unprintable(nn.Flatten(), nn.Linear(6, 3))) for _ in "ab")
    assert first.entry.opaque is None
    assert first.graph is not None
    assert text(first) == text(second)


def test_activations_are_let_go_without_a_search_for_garbage(capturer):
    """A recording's nodes refer to each other, and what each gave hung on them: GiBs of it."""
    data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
    model = cgo.Model("cgo.zoo:mlp", {"widths": [1021]}, data=data, training=spec())
    examples = Examples.of(data)
    gc.collect()
    with uncollected():
        captured = Capturer().capture(model, examples)
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    assert captured.graph is not None
    assert not [t.shape for t in tensors if t.dim() == 2 and t.shape[1] == 1021]


def test_nothing_of_a_capture_is_written_to_the_terminal():
    """Forwards that torch cannot trace, or whose graph fits one batch size alone."""
    code = """
import tempfile, pathlib, cgo
from cgo.planner import Planner
data, spec = cgo.DataSpec("support.reports:data", {"name": "reservoir"}), cgo.TrainingSpec
def made(name, loss="cross_entropy", **kwargs):
    data = cgo.DataSpec("support.reports:data", {"name": name, "samples": 44}, batch_size=8)
    return cgo.Model(f"support.reports:{name}", kwargs, data=data, training=spec(loss=loss))
models = [made("reservoir", "mse_loss"), made("in_place_scan"), made("failed_export_buffer")]
points = cgo.DataSpec("support.small:points", batch_size=16)
models += [cgo.Model("support.small:rewrites", {"kind": kind}, data=points, training=spec())
           for kind in ("multinomial", "write_strided", "enable_grad")]
report = Planner().plan(models, pathlib.Path(tempfile.mkdtemp())).report
print(len(report.opaque))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "3"
    assert done.stderr == ""


def test_a_loss_without_a_gradient_is_refused_as_the_plain_loop_raises(capturer):
    with pytest.raises(ModelError, match=r"model 'm': its loss carries no gradient.*argmax"):
        capture(capturer, "support.small:mlp", loss="support.losses:wrong_share")
    frozen = small.mlp().requires_grad_(False)
    with pytest.raises(ModelError, match="parameters that are all frozen"):
        capture(capturer, frozen)


def test_a_lightning_module_with_a_training_of_its_own_is_refused(capturer):
    lightning = pytest.importorskip("pytorch_lightning")

    class Own(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 3)

        def forward(self, x):
            return self.body(x)

    class Trained(Own):
        def training_step(self, batch, index):
            raise AssertionError("nobody calls this")

    assert capture(capturer, Own()).graph is not None
    with pytest.raises(ModelError, match=r"'m': Trained is a LightningModule whose training_step"):
        capture(capturer, Trained())
    assert capture(capturer, nn.Sequential(Trained())).graph is not None


def test_lazy_instances_are_called_first_by_who_submits_them(capturer):
    net = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ModelError, match=r"lazy parameters \(0.weight, 0.bias\); call it once"):
        capture(capturer, net)
    net(torch.zeros(1, 6))
    assert capture(capturer, net).graph is not None


def test_a_lazy_factory_that_fails_at_its_first_call_says_so(capturer):
    with pytest.raises(ModelError, match=r"'m': a batch \(input \[16, 6\].*raised RuntimeError"):
        capture(capturer, "torch.nn:LazyConv2d", {"out_channels": 2, "kernel_size": 3})


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_what_the_seed_drew_for_evaluation_alone_is_each_models_own(capturer, kind):
    tempered = [
        capture(capturer, "support.small:tempered", {"kind": kind}, seed=seed) for seed in (1, 1, 2)
    ]
    first, again, other = (text(captured, "validation/12") for captured in tempered)
    assert first == again
    assert first != other
    assert len({text(captured) for captured in tempered}) == 1  # they train alike


def test_a_module_of_which_there_is_no_copy_is_an_opaque_lane(capturer):
    captured = capture(capturer, "support.small:uncopied")
    assert captured.graph is None
    assert "there is but one of me" in captured.entry.opaque
