"""Two documents in one: nothing of either is changed, and both are merged anew on demand."""

import json

import pytest

import cgo
from cgo.commands import JOINED
from cgo.errors import GraphDataError
from cgo.graph import verify
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.merge import merge
from cgo.planner import Planner
from cgo.union import fusing_as_json, fusing_of, regrouped, union, write_union

ALL = BatchOperators()


def planned(folder, *given, fusing=ALL):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=1)
    models = [
        cgo.Model(f"support.small:{factory}", {"hidden": hidden}, data=data, training=training,
                  seed=seed, model_id=f"m{seed}")
        for factory, hidden, seed in given
    ]  # fmt: skip
    plan = Planner(True, fusing).plan(models, folder, fusing_as_json(fusing))
    assert not plan.failures
    return plan.graph_data


def groups(graph):
    return {node.group for node in graph.nodes if node.group is not None}


def two(tmp_path, fusing=ALL):
    first = planned(tmp_path / "a", ("mlp", 5, 0), ("mlp", 5, 1), ("stemmed", 5, 2), fusing=fusing)
    second = planned(tmp_path / "b", ("mlp", 5, 3), ("mlp", 5, 4), ("stemmed", 4, 5), fusing=fusing)
    return first, second


def test_models_stand_side_by_side(tmp_path):
    first, second = two(tmp_path)
    whole = union(first, second)
    verify(whole.graph)
    assert whole.graph.nodes[: len(first.graph.nodes)] == first.graph.nodes
    assert len(groups(whole.graph)) == len(groups(first.graph)) + len(groups(second.graph))
    assert [entry.id for entry in whole.models] == [f"m{n}" for n in range(6)]
    assert len(whole.data) == 1
    assert whole.experiment[JOINED] is True
    third = planned(tmp_path / "c", ("mlp", 5, 6), ("mlp", 5, 7))
    more = union(whole, third)
    verify(more.graph)
    assert len(groups(more.graph)) == len(groups(whole.graph)) + len(groups(third.graph))


def test_a_model_cannot_join_twice(tmp_path):
    first, _ = two(tmp_path)
    with pytest.raises(GraphDataError, match="m0, m1, m2 are there already"):
        union(first, first)


@pytest.mark.parametrize("fusing", [BatchOperators(), BatchOperators(max_width=2), None])
def test_regrouping_gives_what_planning_together_gives(fusing, tmp_path):
    first, second = two(tmp_path, fusing)
    given = [("mlp", 5, 0), ("mlp", 5, 1), ("stemmed", 5, 2), ("mlp", 5, 3), ("mlp", 5, 4),
             ("stemmed", 4, 5)]  # fmt: skip
    together = planned(tmp_path / "whole", *given, fusing=fusing)
    for graphs in ([first.graph, second.graph], [second.graph, first.graph],
                   [union(first, second).graph]):  # fmt: skip
        found = regrouped(graphs, fusing)
        assert found.nodes == together.graph.nodes
        assert set(found.outputs) == set(together.graph.outputs)


def test_graphs_are_left_as_they_are(tmp_path):
    first, second = two(tmp_path)
    before = merge([first.graph]), merge([second.graph])
    regrouped([first.graph, second.graph], BatchOperators())
    assert before == (first.graph, second.graph)


def test_a_written_union_is_read_again(tmp_path):
    first, second = two(tmp_path)
    whole = write_union(union(first, second), second, tmp_path / "a", {})
    found = cgo.GraphData.read(tmp_path / "a" / "graph.json")
    assert found == whole
    found.check_files()
    assert not list((tmp_path / "a").glob("*.partial"))


@pytest.mark.parametrize(
    "options",
    [None, BatchOperators(), BatchOperators(3, frozenset({"aten.linear"}), frozenset({"x", "y"}))],
)
def test_what_may_be_fused_stands_in_the_settings(options, tmp_path):
    first, _ = two(tmp_path)
    settings = json.loads(json.dumps(fusing_as_json(options)))
    assert fusing_of(cgo.GraphData(first.models, first.data, first.graph, experiment=settings)) == (
        options
    )


def test_without_settings_the_groups_say_it(tmp_path):
    fused, _ = two(tmp_path)
    plain = planned(tmp_path / "plain", ("mlp", 5, 0), ("mlp", 5, 1), fusing=None)
    for data, expected in ((fused, BatchOperators()), (plain, None)):
        bare = cgo.GraphData(data.models, data.data, data.graph)
        assert fusing_of(bare) == expected


@pytest.mark.parametrize(
    "found",
    [3, {}, {"max_width": 0, "only": None, "without": []},
     {"max_width": None, "only": [3], "without": []}, {"max_width": 1, "only": None}],
)  # fmt: skip
def test_settings_of_another_form_are_refused(found, tmp_path):
    first, _ = two(tmp_path)
    data = cgo.GraphData(
        first.models, first.data, first.graph, experiment={"batch_operators": found}
    )
    with pytest.raises(GraphDataError, match="has another form"):
        fusing_of(data)
