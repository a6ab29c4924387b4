"""Captures that one planner hands to another (cgo/planner.py)."""

from cgo.bench.families import FAMILIES
from cgo.graph import dump
from cgo.planner import Planner


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
