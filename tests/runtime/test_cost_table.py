"""The table of measured costs."""

import math
import sqlite3

import pytest
import torch

from cgo.errors import CgoError
from cgo.runtime.cost_table import CostTable, Signature

CPU = torch.device("cpu")


def signature(elements, family="f"):
    return Signature(family, str(elements), elements)


def test_costs_outlive_the_process(tmp_path):
    path = tmp_path / "deep" / "costs.sqlite"
    CostTable(path, CPU).put(signature(8), "form/stacked", 4, 0.5)
    again = CostTable(path, CPU)
    assert again.get(signature(8), "form/stacked", 4) == 0.5
    assert again.get(signature(8), "form/stacked", 2) is None
    assert again.get(signature(8), "form/channels", 4) is None


def test_what_cannot_be_done_is_kept_as_well(tmp_path):
    path = tmp_path / "costs.sqlite"
    CostTable(path, CPU).put(signature(8), "form/stacked", 4, math.inf)
    assert CostTable(path, CPU).get(signature(8), "form/stacked", 4) == math.inf


def test_costs_of_another_device_are_not_used(tmp_path):
    path = tmp_path / "costs.sqlite"
    CostTable(path, CPU).put(signature(8), "form/stacked", 4, 0.5)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE costs SET device = 'another machine'")
    assert CostTable(path, CPU).get(signature(8), "form/stacked", 4) is None


def test_threads_are_part_of_the_key(tmp_path):
    before = torch.get_num_threads()
    table = CostTable(None, CPU)
    try:
        torch.set_num_threads(before + 1)
        assert CostTable(None, CPU).key != table.key
    finally:
        torch.set_num_threads(before)


def test_a_damaged_file_says_where_it_is_and_what_to_do(tmp_path):
    path = tmp_path / "costs.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CgoError, match=r"costs.sqlite, cannot be used: .*; remove it"):
        CostTable(path, CPU)


def test_between_sizes_costs_are_interpolated():
    table = CostTable(None, CPU)
    for elements, seconds in ((100, 1.0), (10_000, 4.0)):
        table.put(signature(elements, "own"), "w", 2, seconds)
    assert table.near(signature(1000, "own"), "w", 2) == pytest.approx(2.0)
    assert table.near(signature(100, "own"), "w", 2) == 1.0
    assert table.near(signature(20_000, "own"), "w", 2) == pytest.approx(8.0)
    assert table.near(signature(10, "own"), "w", 2) == 1.0  # a call costs something
    assert table.near(signature(10, "other"), "w", 2) is None


def test_shipped_costs_of_another_device_are_better_than_nothing():
    shipped = CostTable(None, CPU, shipped=False)
    shipped._ship("another machine", [("f", "s", 8, "w", 2, 0.5)])
    asked = Signature("f", "s", 8)
    assert shipped.get(asked, "w", 2) is None  # worth measuring
    assert shipped.near(asked, "w", 2) == 0.5
    shipped._ship(shipped.key, [("f", "s", 8, "w", 2, 0.25)])
    assert shipped.get(asked, "w", 2) == 0.25


def test_a_table_ships_for_the_cpu():
    table = CostTable(None, CPU)
    assert len(table._rows) + len(table._foreign) > 500
