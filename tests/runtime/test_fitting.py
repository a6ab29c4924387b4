"""Programs that are divided before memory runs out."""

import pytest
import torch
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo.graph import verify
from cgo.runtime.choice import Rules
from cgo.runtime.fitting import fit
from cgo.runtime.memory import at_most, estimate

CPU = torch.device("cpu")
TRAINING = {"precision": "float64", "epochs": 3, "optimizer": "Adam",
            "optimizer_kwargs": {"lr": 0.01, "eps": 1e-3}}  # fmt: skip
CASES = [Case(f"m{n}", "cnn", {"dropout": 0.2}, seed=n, training=TRAINING) for n in range(6)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return Merged(CASES, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def planned(merged):
    data = merged.plan.graph_data
    trainings = {entry.id: entry.training for entry in data.models}
    return Rules()(data.graph, sorted(trainings)), trainings


def on_top(found):
    return found.peak - found.parameters - found.buffers


def test_what_fits_is_left_as_it_is(planned):
    choice, trainings = planned
    told = []
    whole = on_top(estimate(choice.graph, trainings, choice=choice))
    found, taken = fit(choice, trainings, whole, CPU, lambda what, **f: told.append((what, f)))
    assert found is choice
    assert taken == {"estimated_bytes": estimate(choice.graph, trainings, choice=choice).peak}
    assert told[0][0] == "memory"
    assert told[0][1]["estimated_bytes"] == taken["estimated_bytes"]


def test_where_memory_is_plenty_nothing_is_rehearsed(planned):
    choice, trainings = planned
    told = []
    found, taken = fit(choice, trainings, 1e15, CPU, lambda what, **f: told.append(f))
    assert found is choice
    assert taken == {"at_most_bytes": at_most(choice.graph)}
    assert told[0]["at_most_bytes"] == taken["at_most_bytes"]


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_programs_are_divided_until_a_step_fits(planned, share):
    choice, trainings = planned
    whole = on_top(estimate(choice.graph, trainings, choice=choice))
    found, _ = fit(choice, trainings, share * whole, CPU)
    assert on_top(estimate(found.graph, trainings, choice=found)) <= share * whole
    assert len(found.programs) > 1
    assert sorted(model for ids in found.programs for model in ids) == sorted(trainings)
    verify(found.graph)


def test_single_models_are_the_end_of_it(planned):
    choice, trainings = planned
    found, _ = fit(choice, trainings, 1.0, CPU)
    assert len(found.programs) == len(trainings)
    assert on_top(estimate(found.graph, trainings, choice=found)) > 1.0


@pytest.mark.parametrize("capture", [False, True])
def test_divided_models_train_as_alone(planned, tmp_path, capture):
    choice, trainings = planned
    limit = int(0.4 * on_top(estimate(choice.graph, trainings, choice=choice)))
    tuning = cgo.Tuning(measure=False, memory_bytes=limit, capture=capture)
    short = Merged(CASES, tmp_path, tuning=tuning)
    (told,) = short.told("memory")
    assert told["programs"] > 1
    assert told["limit_bytes"] == limit
    for case in CASES:
        assert_equal_float64(short, case)
