"""Measuring what groups cost."""

import math

import pytest
import torch
from support.merged import Case

from cgo.planner import Planner
from cgo.runtime.choice import LOOPED, Way
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import KINDS, Timer, repacking, signature_of
from cgo.runtime.emitter import operator_of, runs
from cgo.runtime.forms import forms_of
from cgo.runtime.measuring import by_itself

CPU = torch.device("cpu")


def groups(*factories, tmp_path):
    cases = [Case(f"{factory}{n}", factory, seed=n) for factory in factories for n in range(2)]
    graph = Planner().plan([case.model() for case in cases], tmp_path).graph_data.graph
    timer = Timer(CPU, graph)
    found = [m for m in runs(graph.nodes) if len(m) > 1 and "/train/" in m[0].name]
    return found, timer.types, timer


def test_every_group_can_be_timed_as_a_loop_and_in_its_forms(tmp_path):
    found, _, timer = groups("cnn", "cells", "mlp", tmp_path=tmp_path)
    fused = set()
    for members in found:
        assert 0 < timer.seconds(members[:1], Way(LOOPED, "lanes")) < 1
        for form in filter(by_itself, forms_of(operator_of(members[0]))):
            seconds = timer.seconds(members, Way(form.name, "stacked"))
            assert seconds > 0
            if math.isfinite(seconds):
                fused.add(form.name)
    assert {"grouped convolution", "elementwise", "batch norm over channels"} <= fused


def test_a_form_that_does_not_apply_costs_infinity(tmp_path):
    found, _, timer = groups("mlp", tmp_path=tmp_path)
    linear = next(m for m in found if operator_of(m[0]) == "aten.linear")
    assert timer.seconds(linear, Way("folded linear", "stacked")) == math.inf


def test_signatures_tell_sizes_from_families(tmp_path):
    found, types, _ = groups("mlp", tmp_path=tmp_path)
    linear = [m[0] for m in found if operator_of(m[0]) == "aten.linear"]
    first, second = (signature_of(node, types, [False] * 3) for node in linear[:2])
    assert first.family == second.family
    assert first.sizes != second.sizes
    assert signature_of(linear[0], types, [True, False, False]).family != first.family


def test_repacking_costs_grow_with_lanes_and_bytes(tmp_path):
    moving = repacking(CostTable(tmp_path / "costs.sqlite", CPU), CPU)
    for kind in KINDS:
        assert 0 <= moving(kind, 4, 1000) <= moving(kind, 8, 1000) <= moving(kind, 8, 10**6)
    assert moving("convert", 8, 10**6) > 0


@pytest.mark.parametrize("factory", ["norm_called_twice", "frozen_norm"])
def test_what_carries_no_gradient_is_measured_without_one(factory, tmp_path):
    """Running statistics that one norm hands to the next, and all before the first layer."""
    found, _, timer = groups(factory, tmp_path=tmp_path)
    norms = [members for members in found if "batch_norm" in members[0].op]
    assert norms
    for members in norms:
        for way in (Way(LOOPED, "lanes"), Way("batch norm over channels", "channels")):
            assert math.isfinite(timer.seconds(members, way))


def test_a_way_that_raises_costs_infinity_and_nothing_else(tmp_path, monkeypatch):
    found, _, timer = groups("mlp", tmp_path=tmp_path)

    def broken(*given):
        raise ValueError("as planned")

    monkeypatch.setattr(timer, "_value", broken)
    assert timer.seconds(found[0], Way(LOOPED, "lanes")) == math.inf
