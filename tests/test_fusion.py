"""How a merged graph will be executed, as `cgo explain` says it."""

import pytest
import torch
from support.merged import Case

from cgo.fusion import fusion_report
from cgo.passes.batch_operators import BatchOperators
from cgo.planner import Planner
from cgo.runtime.choice import Rules
from cgo.runtime.cost_table import CostTable
from cgo.runtime.tuning import Tuner
from cgo.tuning import Tuning


def report(cases, tmp_path, options=BatchOperators(), tuner=None):  # noqa: B008
    plan = Planner(batch_operators=options).plan([case.model() for case in cases], tmp_path)
    return plan.report, fusion_report(plan.graph_data.graph, options, tuner or fused())


def fused():
    """Fuses whatever can be, so that a table of costs does not decide what is seen here."""
    return Tuner(CostTable(None, CPU), CPU, Rules(), Tuning(width=64))


CPU = torch.device("cpu")


def test_every_node_of_a_step_is_accounted_for(tmp_path):
    cases = [Case("a", "mlp", {"width": 16}), Case("b", "mlp", {"width": 16}, seed=1),
             Case("c", "cnn", {"width": 4})]  # fmt: skip
    merged, found = report(cases, tmp_path)
    parts = [*found.fused, *found.loops, *found.alone]
    assert sum(part.nodes for part in parts) == found.nodes
    linear = [row for row in found.fused if row.op == "aten.linear"]
    assert {row.form for row in linear} <= {"wide linear", "batched linear"}
    assert found.groups == sum(len(row.sizes) for row in found.fused)
    assert merged.groups > found.groups  # validation, too
    assert merged.grouped >= 2 * merged.groups


def test_repacked_groups_are_named(tmp_path):
    """The convolutional model's last layer joins the others'; its lane comes from elsewhere."""
    cases = [Case("a", "mlp", {"width": 16}), Case("b", "mlp", {"width": 16}, seed=1)]
    _, found = report(cases, tmp_path)
    assert found.gathers == sum(decision.gathers for decision in found.repacked) == 0
    cases.append(Case("c", "cnn", {"width": 4}))
    _, found = report(cases, tmp_path / "more")
    assert found.gathers >= 1
    assert any("cross_entropy" in decision.operator for decision in found.repacked)
    assert all(decision.example.startswith("a/train/32/") for decision in found.repacked)


@pytest.mark.parametrize("off", [frozenset({"aten.linear"}), frozenset()])
def test_options_are_a_reason(tmp_path, off):
    cases = [Case("a", "mlp", {"width": 16}), Case("b", "mlp", {"width": 16}, seed=1)]
    _, found = report(cases, tmp_path, BatchOperators(without=off))
    left_out = [family for family in found.alone if family.reason == "left out by the options"]
    assert bool(left_out) == bool(off)


def test_a_loop_has_its_reason(tmp_path):
    """Multinomial draws and counting cannot be batched; their nodes are named."""
    cases = [Case(name, "trap", {"kind": "constant"}, seed=number)
             for number, name in enumerate("ab")]  # fmt: skip
    _, found = report(cases, tmp_path)
    for family in found.loops:
        assert family.reason
        assert family.nodes >= 2
    assert sum(part.nodes for part in [*found.fused, *found.loops, *found.alone]) == found.nodes


def test_groups_are_predicted_and_measured(tmp_path):
    given = [Case(f"c{n}", "cnn", {"width": 8}, seed=n) for n in range(4)]
    tuner = Tuner(CostTable(None, CPU), CPU, Rules(), Tuning(share=1.0), 10**6)
    _, found = report(given, tmp_path, tuner=tuner)
    assert {"aten.conv2d", "aten.linear", "aten.cross_entropy_loss"} <= {
        row.op for row in found.timings
    }
    for row in found.timings:
        assert row.predicted_s > 0
        assert row.measured_s > 0
        assert row.error == pytest.approx(row.predicted_s / row.measured_s - 1)
    assert [row.measured_s for row in found.timings] == sorted(
        (row.measured_s for row in found.timings), reverse=True
    )
