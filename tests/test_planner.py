"""How many models a trial can hold, and captures that one planner hands to another."""

import pytest
from support.merged import Case

from cgo.bench.families import FAMILIES
from cgo.graph import dump
from cgo.planner import Planner

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
