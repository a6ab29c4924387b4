"""Choices that are found again: the same search computes the same bits."""

import random
import sqlite3
from dataclasses import replace

import pytest
import torch
from support.merged import Case, Merged

import cgo
from cgo.passes.assign_layouts import Option
from cgo.planner import Planner
from cgo.runtime.choice import Rules
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import Timer
from cgo.runtime.record import Memory, Record
from cgo.runtime.verdicts import Swap

CPU = torch.device("cpu")
MEASURING = cgo.Tuning(share=1.0)


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))


def cases(names="abcd"):
    families = ("cnn", "cnn", "cells", "cells")
    return [
        Case(name, family, {}, seed=n, training={"epochs": 2})
        for n, (name, family) in enumerate(zip(names, families))
    ]


def chance(monkeypatch, seed):
    """Costs as a machine under any load might give them: choices are another each time."""
    draw = random.Random(seed)
    monkeypatch.setattr(Timer, "seconds", lambda self, nodes, way: draw.uniform(1e-5, 1e-3))
    monkeypatch.setattr(CostTable, "get", lambda self, signature, way, width: None)


def ways(merged):
    return merged.told("tuned")[0]["ways"]


def run(folder, names="abcd", tuning=MEASURING):
    given = cases(names)
    merged = Merged(given, folder, tuning=tuning)
    return merged, [merged.losses[case.id] for case in given]


def test_the_same_search_chooses_as_before_however_long_things_take_now(tmp_path, monkeypatch):
    chance(monkeypatch, 1)
    first, losses = run(tmp_path / "first")
    assert first.told("tuned")[0]["measured"] > 0
    chance(monkeypatch, 2)
    again, others = run(tmp_path / "again")
    assert again.told("tuned")[0]["measured"] == 0
    assert ways(again) == ways(first)
    assert others == losses
    for case in cases():
        left, right = first.state(case.id), again.state(case.id)
        assert all(torch.equal(left[name], right[name]) for name in left)
    renamed, others = run(tmp_path / "renamed", "efgh")
    assert renamed.told("tuned")[0]["measured"] == 0
    assert others == losses


def test_measuring_anew_is_asked_for(tmp_path, monkeypatch):
    chance(monkeypatch, 1)
    first, _ = run(tmp_path / "first")
    chance(monkeypatch, 2)
    anew, losses = run(tmp_path / "anew", tuning=replace(MEASURING, anew=True))
    assert anew.told("tuned")[0]["measured"] > 0
    assert ways(anew) != ways(first)
    again, others = run(tmp_path / "again")  # what was chosen last
    assert ways(again) == ways(anew)
    assert others == losses


def test_another_length_or_setting_chooses_for_itself(tmp_path, monkeypatch):
    chance(monkeypatch, 1)
    run(tmp_path / "first")
    for number, tuning in enumerate((replace(MEASURING, tape=True), replace(MEASURING, share=0.9))):
        other, _ = run(tmp_path / str(number), tuning=tuning)
        assert other.told("tuned")[0]["measured"] > 0


def ruled(tmp_path, names):
    graph = Planner().plan([case.model() for case in cases(names)], tmp_path).graph_data.graph
    return Rules()(graph, sorted(names))


def test_what_models_are_called_does_not_matter_and_who_they_are_does(tmp_path):
    table = CostTable(None, CPU)
    options = {"g": Option("loop", "lanes", 1, 0.5)}
    one = ruled(tmp_path / "one", "abcd")
    Memory(table, one, 7).add(options, True)
    other = ruled(tmp_path / "other", "wxyz")
    assert Memory(table, other, 7).find() == (options, True)
    assert Memory(table, other, 8).find() is None
    assert Memory(table, other, 7, anew=True).find() is None
    assert Memory(table, ruled(tmp_path / "less", "ab"), 7).find() is None


def test_compiled_steps_are_remembered_by_place(tmp_path):
    table = CostTable(tmp_path / "costs.sqlite", CPU)
    one = Memory(table, ruled(tmp_path / "one", "abcd"), 7)
    settle = one.settling(None)
    settle("train/32/a,b", Swap(None))
    settle("train/32/a,b", Swap(3, ("k",)))  # a trial changes its own decision
    one.settling(None)("train/32/a,b", False)  # and no other's
    other = Memory(table, ruled(tmp_path / "other", "wxyz"), 7)
    assert other.compiled(None)("train/32/w,x") == Swap(3, ("k",))
    assert other.compiled(None)("train/32/w,y") is None
    record = Record(tmp_path / "lowering.json", CPU)
    record.settle("train/32/w,x", False)
    assert other.compiled(record)("train/32/w,x") is False  # the trial's own comes first
    record.settle("train/32/w,y", Swap(None))
    again = Record(tmp_path / "lowering.json", CPU)
    assert again.compiled == {"train/32/w,x": False, "train/32/w,y": Swap(None)}


def test_choices_outlive_the_process_and_hold_for_one_device(tmp_path):
    path = tmp_path / "costs.sqlite"
    CostTable(path, CPU).remember("key", {"a": 1})
    again = CostTable(path, CPU)
    assert again.recall("key") == {"a": 1}
    again.key = "another device"
    again._remembered.clear()
    assert again.recall("key") is None


def test_of_two_processes_that_choose_at_once_the_first_has_chosen_for_both(tmp_path):
    path = tmp_path / "costs.sqlite"
    graph = ruled(tmp_path / "one", "abcd")
    first, second = (Memory(CostTable(path, CPU), graph, 7) for _ in range(2))
    assert first.find() is second.find() is None
    mine, theirs = {"g0": Option("vmap", "stacked", 4, 1.0)}, {"g0": Option("x", "lanes", 1, 2.0)}
    assert first.add(mine, True) == (mine, True)
    assert second.add(theirs, False) == (mine, True)
    anew = Memory(CostTable(path, CPU), graph, 7, anew=True)
    assert anew.add(theirs, False) == (theirs, False)
    assert Memory(CostTable(path, CPU), graph, 7).find() == (theirs, False)


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", '{"options": {}}', '{"options": {"g0": ["vmap"]}, "last": null}',
     '{"options": {}, "last": 1}'],
)  # fmt: skip
def test_what_is_no_choice_is_made_again(text, tmp_path, caplog):
    path = tmp_path / "costs.sqlite"
    graph = ruled(tmp_path / "one", "abcd")
    options = {"g0": Option("vmap", "stacked", 4, 1.0)}
    Memory(CostTable(path, CPU), graph, 7).add(options, True)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE choices SET value = ?", (text,))
    found = Memory(CostTable(path, CPU), graph, 7)
    assert found.find() is None
    assert "choice" in caplog.text
    assert found.add(options, None) == (options, None)
    assert Memory(CostTable(path, CPU), graph, 7).find() == (options, None)
