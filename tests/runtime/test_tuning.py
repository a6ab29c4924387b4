"""The choice by cost in whole trials: forced, measured, recorded and repeated."""

import json
import shutil

import pytest
import torch
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo.errors import TrialError
from cgo.graph import Graph
from cgo.runtime.choice import LOOP, Rules
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import repacking
from cgo.runtime.record import Record
from cgo.runtime.tuning import Tuner, make_tuner
from cgo.tuning import Tuning

CPU = torch.device("cpu")


def cases(**training):
    training = {"epochs": 3, "precision": "float64", **training}
    families = ("cnn", "cnn", "cells", "cells", "mlp", "mlp")
    return [
        Case(f"m{n}", family, {}, seed=n, training=training) for n, family in enumerate(families)
    ]


def tuned(merged):
    return [e.value for e in merged.events if e.kind == "trial" and e.value["what"] == "tuned"]


@pytest.fixture(scope="module")
def alone():
    return {case.id: case.alone() for case in cases()}


def test_a_measured_choice_trains_as_alone_and_says_what_it_cost(tmp_path, alone, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))
    # A share of all training is enough for everything, however short this one is.
    merged = Merged(cases(), tmp_path, tuning=cgo.Tuning(share=1.0))
    for case in cases():
        assert_equal_float64(merged, case, alone[case.id])
    (told,) = tuned(merged)
    assert told["groups"] > 10
    assert told["seconds"] > 0
    again = Merged(cases(), tmp_path / "again", tuning=cgo.Tuning(share=1.0))
    assert tuned(again)[0]["measured"] < told["measured"] or told["measured"] == 0


COMMON = {
    "class weights": ("mlp", {"loss": "support.losses:weighted"}),
    "norm called twice": ("norm_called_twice", {}),
    "frozen norm": ("frozen_norm", {}),
}


@pytest.mark.parametrize("name", COMMON)
def test_common_models_survive_being_measured(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))
    factory, more = COMMON[name]
    given = {"epochs": 2, "precision": "float64"}
    cases = [Case(f"m{n}", factory, seed=n, training=given, **more) for n in range(2)]
    merged = Merged(cases, tmp_path, tuning=cgo.Tuning(share=1.0))
    assert tuned(merged)[0]["measured"] > 0
    for case in cases:
        assert_equal_float64(merged, case)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_groups_are_measured_under_their_regions_autocast(precision, tmp_path, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))
    given = {"epochs": 1, "precision": precision}
    merged = Merged(cases(**given), tmp_path, tuning=cgo.Tuning(share=1.0))
    told = tuned(merged)[0]
    assert told["measured"] > 0
    assert any("loop" not in way for way in told["ways"])
    assert all(merged.ended(case.id)["success"] for case in cases())


def test_repeating_a_trial_with_its_record_gives_the_same_bits(tmp_path):
    given = cases(precision="float32")
    first = Merged(given, tmp_path / "first", tuning=cgo.Tuning(share=1.0))
    record = tmp_path / "first" / "lowering.json"
    repeated = Merged(given, tmp_path / "second", tuning=cgo.Tuning(record=str(record)))
    assert tuned(repeated)[0]["measured"] == 0
    for case in given:
        assert first.losses[case.id] == repeated.losses[case.id]
        left, right = first.state(case.id), repeated.state(case.id)
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert options(record) == options(tmp_path / "second" / "lowering.json")


def options(path):
    return json.loads(path.read_text())["choices"]


def test_a_trial_that_goes_on_in_its_folder_chooses_as_before(tmp_path):
    given = cases(precision="float32")
    forced = Merged(given, tmp_path / "a", tuning=cgo.Tuning(layout="lanes"))
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "lowering.json", tmp_path / "b" / "lowering.json")
    again = Merged(given, tmp_path / "b", tuning=cgo.Tuning(layout="lanes"))
    assert again.losses == forced.losses


def test_a_record_of_another_device_or_search_is_not_used(tmp_path):
    record = tmp_path / "lowering.json"
    record.write_text(json.dumps({"device": "another", "choices": {"key": {}}}))
    assert Record(tmp_path / "own.json", CPU, str(record))._choices == {}


@pytest.mark.parametrize("text", ["[1]", "{}", "not json"])
def test_what_is_no_record_is_refused(tmp_path, text):
    record = tmp_path / "given.json"
    record.write_text(text)
    with pytest.raises(TrialError, match=r"given.json is no record of lowering choices"):
        Record(tmp_path / "own.json", CPU, str(record))


def test_a_missing_record_is_refused(tmp_path):
    with pytest.raises(TrialError, match="is no record"):
        Record(tmp_path / "own.json", CPU, str(tmp_path / "nowhere.json"))


def plan(tmp_path):
    merged = Merged(cases(epochs=1), tmp_path)
    graph = merged.plan.graph_data.graph
    return graph, sorted({output.model for output in graph.outputs})


def test_without_a_budget_nothing_is_measured(tmp_path):
    graph, models = plan(tmp_path)
    tuner = make_tuner(Tuning(measure=False), CPU, 10**6)
    choice = tuner(graph, models)
    assert tuner.budget.measured == 0
    assert choice.programs


def test_forced_layouts_and_widths_are_followed(tmp_path):
    graph, models = plan(tmp_path)
    table = CostTable(None, CPU)
    loops = Tuner(table, CPU, Rules(), Tuning(layout="lanes"))(graph, models)
    names = {n.group for n in loops.graph.nodes if n.group and "/train/" in n.name}
    assert all(name.endswith(LOOP) for name in names)
    narrow = Tuner(table, CPU, Rules(), Tuning(width=2))(graph, models)
    sizes = {}
    for node in narrow.graph.nodes:
        if node.group in narrow.ways:
            sizes[node.group] = sizes.get(node.group, 0) + 1
    assert set(sizes.values()) == {2}
    channels = Tuner(table, CPU, Rules(), Tuning(layout="channels"))(graph, models)
    assert {"stacked", "channels"} == {way.layout for way in channels.ways.values()}


def test_a_table_that_cannot_be_opened_stops_no_training(tmp_path, monkeypatch, caplog):
    (tmp_path / "costs.sqlite").write_bytes(b"no database" * 1000)
    monkeypatch.setenv("CGO_CACHE", str(tmp_path))
    tuner = make_tuner(Tuning(), CPU, 10)
    assert "cannot be used" in caplog.text
    assert tuner.table is not None


def test_replayed_steps_give_the_bits_of_steps_run_plainly(tmp_path):
    given = cases(precision="float32", optimizer="Adam", grad_clip_norm=0.5)
    taped, plain = (
        Merged(given, tmp_path / str(tape), tuning=cgo.Tuning(measure=False, tape=tape))
        for tape in (True, False)
    )
    for case in given:
        assert taped.losses[case.id] == plain.losses[case.id]
        left, right = taped.state(case.id), plain.state(case.id)
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("tape", "steps", "taped"), [(None, 10, False), (None, 1000, True), (True, 10, True)]
)
def test_steps_are_taped_where_the_plan_repays_it_or_it_is_asked_for(tape, steps, taped):
    tuner = Tuner(CostTable(None, CPU), CPU, Rules(), Tuning(measure=False, tape=tape), steps)
    assert tuner(Graph((), ()), []).taped is taped


def test_steps_that_compute_once_more_are_not_taped():
    tuner = Tuner(CostTable(None, CPU), CPU, Rules(), Tuning(measure=False, checkpoint=True), 1000)
    chosen = tuner(Graph((), ()), [])
    assert chosen.recompute
    assert not chosen.taped


def test_without_measuring_two_choices_are_alike(tmp_path):
    """What copies cost is not measured either: timings would differ from run to run."""
    table = CostTable(None, CPU, shipped=False)
    first, second = (repacking(table, CPU, measure=False) for _ in range(2))
    assert first == second
    assert first("to lanes", 4, 0) > 0
    assert table.rows() == []
