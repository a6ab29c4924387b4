"""Ways of executing a group that let a NaN of one member reach another are found, and not gone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.merged import Case, Merged

import cgo
from cgo.planner import Planner
from cgo.runtime.accelerator import Host
from cgo.runtime.choice import LOOPED, Way
from cgo.runtime.costs import Timer
from cgo.runtime.emitter import operator_of, runs
from cgo.runtime.forms import linear
from cgo.runtime.isolation import keeps_apart, mixes, separating_sets
from cgo.runtime.measuring import ways_of

CPU = torch.device("cpu")


@given(st.integers(1, 300))
def test_of_any_two_members_some_set_has_the_first_alone(size):
    sets = separating_sets(size)
    assert len(sets) <= 12
    holding = [{i for i, members in enumerate(sets) if m in members} for m in range(size)]
    pairs = ((a, b) for a in range(size) for b in range(size) if a != b)
    assert all(holding[a] - holding[b] for a, b in pairs)


def test_nothing_is_made_nan_where_there_is_one_member():
    assert separating_sets(1) == []


def groups(families, folder, count=3):
    """The groups of a merged graph, with a timer of it."""
    cases = [Case(f"{f}{n}", f, {}, seed=n) for f in families for n in range(count)]
    graph = Planner().plan([case.model() for case in cases], folder).graph_data.graph
    return Timer(CPU, graph), [m for m in runs(graph.nodes) if m[0].group and len(m) > 1]


def test_every_form_keeps_members_apart_on_a_cpu(tmp_path):
    timer, found = groups(("mlp", "cnn", "residual", "cells", "encoder", "lstm"), tmp_path)
    tried = {}
    for members in found:
        if mixes(members[0]):
            for form, layout in ways_of(members[0]):
                if form != LOOPED:
                    apart = keeps_apart(timer, members, Way(form, layout))
                    tried.setdefault((form, layout), []).append(apart)
    assert not [way for way, results in tried.items() if False in results]
    done = {form for (form, _), results in tried.items() if True in results}
    assert {"batched linear", "wide linear", "batch norm over channels"} <= done
    assert any("convolution" in form for form in done)


def dense(x, weight, bias):
    """All members' layers as one block-diagonal product: zeros stand where others' values are."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    wide = rows.movedim(0, 1).flatten(1) @ torch.block_diag(*weight).T
    value = wide.unflatten(1, (len(weight), -1)).movedim(1, 0)
    value = value if bias is None else value + bias.unsqueeze(1)
    return value.reshape(*x.shape[:-1], weight.shape[1])


class Backwards(torch.autograd.Function):
    """A product that is right, with a backward that mixes members."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        mixed = (gradient.sum(0, keepdim=True) * 0 + gradient) @ weight
        return mixed, gradient.transpose(1, 2) @ x, gradient.sum(1)


def backwards(x, weight, bias):
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    return Backwards.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[1])


def only_the_next(x, weight, bias):
    """A NaN of each member reaches the one behind it, and no other."""
    value = torch.baddbmm(bias.unsqueeze(1), x.flatten(1, -2), weight.transpose(1, 2))
    value = value + 0 * value.roll(1, 0).detach() * (torch.arange(len(value)) > 0).view(-1, 1, 1)
    return value.view(*x.shape[:-1], weight.shape[1])


@pytest.mark.parametrize("kernel", [dense, backwards, only_the_next])
def test_a_kernel_that_lets_nan_through_is_found(kernel, tmp_path, monkeypatch):
    timer, found = groups(["mlp"], tmp_path, count=5)
    linears = [m for m in found if operator_of(m[0]) == "aten.linear"]
    way = Way("batched linear", "stacked")
    assert all(keeps_apart(timer, members, way) for members in linears)
    monkeypatch.setattr(linear, "turned_linear_of", kernel)
    assert not all(keeps_apart(timer, members, way) for members in linears)


def diverging(folder, tuning):
    """Two good models beside one whose numbers soon are none."""
    given = {"epochs": 2, "optimizer": "SGD"}
    cases = [
        Case(f"m{n}", "mlp", seed=n, training={**given, "optimizer_kwargs": {"lr": lr}})
        for n, lr in enumerate((0.05, 1e30, 0.05))
    ]
    return Merged(cases, folder, tuning=tuning)


@pytest.mark.parametrize("measure", [False, True])
def test_a_trial_goes_no_way_that_lets_nan_through(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(linear, "turned_linear_of", dense)
    tuning = cgo.Tuning(measure=measure, share=1.0, layout=None if measure else "stacked")
    spoilt = diverging(tmp_path / "spoilt", tuning)
    assert measure or not spoilt.ended("m0")["success"]  # where nobody looks, neighbours fall

    monkeypatch.setattr(Host, "separates", False)
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "anew"))
    kept = diverging(tmp_path / "kept", tuning)
    assert [kept.ended(f"m{n}")["success"] for n in range(3)] == [True, False, True]
    told = kept.told("leaks")
    leaking = {"operator": "aten.linear", "form": "batched linear", "layout": "stacked"}
    assert measure or leaking.items() <= told[0].items()


def test_what_was_tried_is_known_to_the_next_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("CGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(linear, "turned_linear_of", dense)
    monkeypatch.setattr(Host, "separates", False)
    tuning = cgo.Tuning(share=1.0, layout="stacked")
    first, second = (diverging(tmp_path / name, tuning) for name in ("first", "second"))
    assert first.told("leaks")
    assert not second.told("leaks")
    assert second.ended("m2")["success"]
