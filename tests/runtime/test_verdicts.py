"""What is remembered of compiled parts and steps."""

import pytest
import torch

from cgo.runtime.cost_table import CostTable
from cgo.runtime.verdicts import Swap, Verdict, Verdicts, decision_of

CPU = torch.device("cpu")
GOOD = Verdict(2.0, 1.0, 7.5)


def test_verdicts_outlive_the_process(tmp_path):
    table = CostTable(tmp_path / "costs.sqlite", CPU)
    Verdicts(table).add("good", GOOD)
    Verdicts(table).add("bad", Verdict(0.0, 0.0, 1.0, "refused"))
    again = Verdicts(CostTable(tmp_path / "costs.sqlite", CPU))
    assert again.find("good") == GOOD
    assert again.find("good").faster
    assert not again.find("bad").faster
    assert again.find("other") is None


def test_measured_anew_a_process_knows_its_own_only(tmp_path):
    table = CostTable(None, CPU)
    Verdicts(table).add("a", GOOD)
    anew = Verdicts(table, anew=True)
    assert anew.find("a") is None
    anew.add("a", Verdict(1.0, 2.0, 0.0))
    assert not anew.find("a").faster
    assert not Verdicts(table).find("a").faster


def test_a_slower_part_is_not_worth_loading():
    assert not Verdict(1.0, 1.0, 0.0).faster


@pytest.mark.parametrize("row", [3, {}, {"before_s": "x"}, {**vars(GOOD), "after_s": float("nan")}])
def test_rows_of_another_form_are_measured_again(row, caplog):
    table = CostTable(None, CPU)
    table.remember("compiled a", row)
    assert Verdicts(table).find("a") is None
    assert "another form" in caplog.text


def test_the_price_of_a_call_is_what_was_paid(tmp_path):
    table = CostTable(tmp_path / "costs.sqlite", CPU)
    before = Verdicts(table).call_s
    Verdicts(table).paid(8.0, 10)
    Verdicts(table).paid(2.0, 10)
    assert Verdicts(CostTable(tmp_path / "costs.sqlite", CPU)).call_s == 0.5 != before
    table.remember("compiling, seconds and calls", ["x"], anew=True)
    assert Verdicts(table).call_s == before


@pytest.mark.parametrize("swap", [Swap(0), Swap(None), Swap(12, ()), Swap(3, ("a", "b"))])
def test_decisions_are_json_values(swap):
    assert decision_of(swap.as_json()) == swap


def test_what_is_no_decision_is_none():
    assert decision_of(True) == Swap(0)
    assert decision_of(False) is False
    bad = [None, 1, "x", [], {"at": 1}, {"at": "1", "parts": None}, {"at": -1, "parts": None},
           {"at": True, "parts": None}, {"at": 1, "parts": [2]},
           {"at": 1, "parts": "ab"}]  # fmt: skip
    assert [decision_of(value) for value in bad] == [None] * len(bad)
