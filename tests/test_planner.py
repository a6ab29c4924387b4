"""How many models a trial can hold, and captures that one planner hands to another."""

import pytest
from support.hostile import chebyshev
from support.merged import Case

import cgo
from cgo.bench.families import FAMILIES
from cgo.errors import ModelError
from cgo.graph import dump
from cgo.graph_data import GraphData
from cgo.planner import Planner
from cgo.runtime.optimizers import moments_of
from cgo.trial import execute

WIDE = {"width": 512}  # 64 * 512 + 512 + 512 * 10 + 10 parameters, or about 150 KB


@pytest.fixture
def models():
    return [Case(f"m{n}", "mlp", WIDE, seed=n, training={"epochs": 1}).model() for n in range(5)]


def test_models_fit_while_their_state_and_the_largest_activations_do(models):
    planner = Planner()
    assert planner.fitting(models, 1e12) == models
    parameters = 64 * 512 + 512 + 512 * 10 + 10
    state = 2 * 4 * parameters  # and as much of gradients; plain SGD keeps no moments
    few = planner.fitting(models, 4 * state)
    assert 2 <= len(few) <= 4
    assert len(planner.fitting(models, 5 * state)) == len(few) + 1


def test_a_model_that_seems_too_large_is_tried_all_the_same(models):
    assert Planner().fitting(models, 1.0) == models[:1]


def test_what_was_captured_to_find_out_is_not_captured_again(models, tmp_path):
    planner = Planner()
    planner.fitting(models, 1e12)
    plan = planner.plan(models, tmp_path)
    assert plan.report.captured == 5
    assert plan.failures == {}


def test_adopted_captures_give_the_plan_that_capturing_gives(tmp_path):
    models = FAMILIES["mlp"](2)
    first, second = Planner(), Planner()
    first.capture(models)
    second.adopt(first.captured())
    adopted = second.plan(models, tmp_path / "adopted")
    own = Planner().plan(models, tmp_path / "own")
    assert dump(adopted.graph_data.graph) == dump(own.graph_data.graph)
    assert adopted.graph_data.models == own.graph_data.models
    assert second.captured() == {}


def test_memory_of_an_optimizer_that_cannot_step_is_guessed():
    """Its model fails as it trains; its company is planned all the same."""
    odd = cgo.Model(
        "support.hostile:mlp",
        data=cgo.DataSpec("support.hostile:points", batch_size=4),
        training=cgo.TrainingSpec(optimizer="SparseAdam"),
    )
    assert moments_of(odd.training) == 2.0
    assert Planner().fitting([odd], 1e9) == [odd]


def test_what_a_trial_would_refuse_to_read_is_an_opaque_lane(tmp_path):
    """One such graph would cost its company the whole document."""
    data = cgo.DataSpec("support.hostile:points", batch_size=4)
    given = {"data": data, "training": cgo.TrainingSpec()}
    odd = cgo.Model("support.hostile:chebyshev", model_id="odd", **given)
    plan = Planner().plan([odd, cgo.Model("support.hostile:mlp", model_id="m", **given)], tmp_path)
    assert not plan.failures
    assert "operator 'aten.special_chebyshev_polynomial_t" in plan.report.opaque["odd"]
    assert {model.id for model in GraphData.read(tmp_path / "graph.json").models} == {"odd", "m"}
    assert set(execute(plan.graph_data, folder=tmp_path)) == {"odd", "m"}
    with pytest.raises(ModelError, match="'odd': its graph cannot be sent to a trial"):
        Planner()._capture(cgo.Model(chebyshev(), model_id="odd", **given))
