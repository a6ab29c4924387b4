"""The estimated peak against the measured one, and what it is made of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.merged import Case

from cgo.bench.families import FAMILIES
from cgo.errors import GraphError
from cgo.graph import Graph, restrict
from cgo.planner import Planner
from cgo.runtime.choice import Rules
from cgo.runtime.data import Loader, open_data
from cgo.runtime.lanes import MergedLanes
from cgo.runtime.member import Member
from cgo.runtime.memory import Estimate, at_most, estimate, measured_peak
from cgo.runtime.tuning import make_tuner
from cgo.tuning import Tuning

CPU = torch.device("cpu")
PLAIN = Tuning(measure=False, tape=False)
#: The smallest of the families, with few models; `benchmarks/memory.py` looks at all of them.
SMALL = {"mlp": 4, "cnn8": 4, "cells-different-8": 2}

_PLANNED = {}


@pytest.fixture
def planned(tmp_path_factory):
    def plan(name):
        if name not in _PLANNED:
            folder = tmp_path_factory.mktemp(name)
            _PLANNED[name] = Planner().plan(FAMILIES[name](SMALL[name]), folder).graph_data
        return _PLANNED[name]

    return plan


def trainings(data):
    return {entry.id: entry.training for entry in data.models}


def train(data, batches):
    members = [Member(entry, data, CPU, Path(), lambda event: None) for entry in data.models]
    lanes = MergedLanes(data.graph, members, {}, CPU, make_tuner(PLAIN, CPU))
    ids = [member.id for member in members]
    for size, leaves in batches:
        for member in members:
            member.updater.zero_grad()
        outcomes = lanes.train(ids, leaves, size)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes.values())
        assert not lanes.update(ids)


@pytest.mark.parametrize("name", SMALL)
def test_the_peak_is_within_15_percent_of_the_measured_one(planned, name):
    data = planned(name)
    batches = list(Loader(open_data(next(iter(data.data.values()))), CPU).train(0))[:2]
    models = tuple(entry.id for entry in data.models)
    choice = make_tuner(PLAIN, CPU)(restrict(data.graph, models=set(models)), models)
    found = estimate(data.graph, trainings(data), choice=choice)
    batch = sum(leaf.nbytes for leaf in batches[0][1].values())
    measured = measured_peak(lambda: train(data, batches)) + batch
    assert abs(found.peak / measured - 1) <= 0.15, (found, measured)


@pytest.mark.parametrize("family", ["mlp", "cnn", "residual", "cells", "encoder", "lstm", "tied"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "Adagrad"])
def test_the_quick_bound_is_no_smaller_than_the_estimate(family, optimizer, tmp_path):
    training = {"optimizer": optimizer, "epochs": 1}
    if optimizer == "Adam":
        training["optimizer_kwargs"] = {"amsgrad": True, "lr": 0.1}
    models = [Case(f"m{n}", family, seed=n, training=training).model() for n in range(3)]
    for model, rate in zip(models, (0.1, 0.2, 0.3)):
        kwargs = {**model.training.optimizer_kwargs, "lr": rate}  # so that vectors are needed
        model.training = replace(model.training, optimizer_kwargs=kwargs)
    data = Planner().plan(models, tmp_path).graph_data
    for device_type in ("cpu", "cuda"):
        found = estimate(data.graph, trainings(data), device_type=device_type)
        assert at_most(data.graph) >= found.peak


def test_state_is_counted_by_purpose(planned):
    found = estimate(planned("mlp").graph, trainings(planned("mlp")))
    parameters = 4 * 4 * (64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)
    assert (found.parameters, found.gradients, found.buffers) == (parameters, parameters, 0)
    rest = 700  # positions of parameters, and a rate and a momentum for each of their rows
    assert parameters <= found.moments <= parameters + rest
    assert found.inputs == 32 * 64 * 4 + 32 * 8
    assert found.peak == found.state + found.inputs + found.step


def test_buffers_are_counted_with_the_copies_that_undo_a_step(planned):
    data = planned("cells-different-8")
    kept = 0
    for entry in data.models:
        state = Member(entry, data, CPU, Path(), lambda event: None).state
        buffers = [t for t in state.tensors.values() if not isinstance(t, torch.nn.Parameter)]
        kept += sum(buffer.nbytes for buffer in buffers)
    assert estimate(data.graph, trainings(data)).buffers == 2 * kept


def test_fewer_models_take_less_and_programs_that_take_turns_hold_less(planned):
    data = planned("cnn8")
    ids = tuple(entry.id for entry in data.models)
    given = data.graph, trainings(data)
    whole, half = estimate(*given), estimate(*given, models=ids[:2])
    assert half.peak < whole.peak
    assert half.parameters * 2 == whole.parameters
    part = restrict(data.graph, models=set(ids))
    apart = Rules(most_program_bytes=0)(part, ids)
    assert len(apart.programs) == 4
    assert estimate(*given, choice=apart).step < whole.step


def test_programs_that_differ_in_names_alone_are_rehearsed_once(planned):
    data = planned("cnn8")
    ids = tuple(entry.id for entry in data.models)
    apart = Rules(most_program_bytes=0)(data.graph, ids)
    cache = {}
    first = estimate(data.graph, trainings(data), choice=apart, cache=cache)
    assert len(cache) == 1
    assert estimate(data.graph, trainings(data), choice=apart, cache=cache) == first
    estimate(data.graph, trainings(data), choice=apart, device_type="cuda", cache=cache)
    estimate(data.graph, trainings(data), cache=cache)  # merged
    assert len(cache) == 3


def test_on_a_gpu_flat_steps_hold_more(planned):
    graph, given = planned("mlp").graph, trainings(planned("mlp"))
    flat = {"optimizer": "RMSprop", "optimizer_kwargs": {"lr": 0.01}}
    given = {model: replace(training, **flat) for model, training in given.items()}
    cpu, cuda = estimate(graph, given), estimate(graph, given, device_type="cuda")
    assert cuda.parameters == cpu.parameters
    assert cuda.moments > cpu.moments  # a rate for each element


def test_the_largest_batch_is_the_default(planned):
    data = planned("mlp")
    assert estimate(data.graph, trainings(data)) == estimate(
        data.graph, trainings(data), program="train/32"
    )


def test_says_what_is_missing(planned):
    data = planned("mlp")
    given = trainings(data)
    first = min(given)
    del given[first]
    with pytest.raises(GraphError, match=f"no training spec for {first}"):
        estimate(data.graph, given)
    with pytest.raises(GraphError, match="no program 'train/7'"):
        estimate(data.graph, trainings(data), program="train/7")
    validation = Graph(
        data.graph.nodes, tuple(o for o in data.graph.outputs if o.program != "train/32")
    )
    with pytest.raises(GraphError, match="no training program"):
        estimate(validation, trainings(data))


def test_measuring_counts_what_a_call_allocates_and_not_what_it_frees_of_others():
    before = [torch.zeros(100_000)]

    def act():
        before.clear()
        kept = torch.zeros(1000)
        (kept + 1).add_(1)
        return kept.sum()

    assert measured_peak(act) == pytest.approx(8000, abs=200)


def test_peak_is_all_together():
    found = Estimate(1, 2, 3, 4, 5, 6)
    assert (found.state, found.peak) == (10, 21)
    assert replace(found, step=0).peak == 15
