"""Which models run as one program, and which groups as loops."""

import math

import torch
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo.graph import Graph, verify
from cgo.planner import Planner
from cgo.runtime import tuning
from cgo.runtime.choice import LOOP, Rules, _activation_bytes, rules_for
from cgo.runtime.emitter import runs

TRAINING = {"precision": "float64", "epochs": 2}


def cases(*families):
    return [Case(f"m{seed}", family, seed=seed, training=TRAINING)
            for seed, family in enumerate(families)]  # fmt: skip


def planned(given, folder):
    return Planner().plan([case.model() for case in given], folder).graph_data.graph


def names(graph: Graph) -> set[str]:
    return {node.group for node in graph.nodes if node.group}


def choose(graph, **rules):
    models = sorted({output.model for output in graph.outputs})
    return Rules(**rules)(graph, models)


def test_without_limits_all_models_are_one_program(tmp_path):
    graph = planned(cases("mlp", "cnn", "mlp"), tmp_path)
    choice = choose(graph)
    assert choice.programs == (("m0", "m1", "m2"),)
    assert choice.graph == graph


def test_small_programs_hold_models_that_are_alike(tmp_path):
    graph = planned(cases("mlp", "cnn", "mlp", "cnn"), tmp_path)
    size = _activation_bytes(graph)
    assert size["m0"] == size["m2"] < size["m1"]
    choice = choose(graph, most_program_bytes=2 * size["m0"])
    assert sorted(choice.programs) == [("m0", "m2"), ("m1",), ("m3",)]
    alone = choose(graph, most_program_bytes=0)
    assert sorted(alone.programs) == [("m0",), ("m1",), ("m2",), ("m3",)]
    verify(alone.graph)
    owners = [{min(n.owners) for n in part} for part in runs(alone.graph.nodes) if part[0].group]
    assert all(len(found) == 1 for found in owners)


def test_models_on_one_stem_stay_together(tmp_path):

    data = cgo.DataSpec("cgo.zoo:digits", batch_size=32)
    models = [cgo.Model("cgo.zoo:stemmed", {"width": width}, data=data,
                        training=cgo.TrainingSpec(epochs=1), model_id=f"m{width}")
              for width in (8, 16)]  # fmt: skip
    graph = Planner().plan(models, tmp_path).graph_data.graph
    assert choose(graph, most_program_bytes=0).programs == (("m16", "m8"),)


def test_groups_of_large_members_are_loops(tmp_path):
    graph = planned(cases("cnn", "cnn"), tmp_path)
    assert all(name.endswith(LOOP) for name in names(choose(graph, most_lane_bytes=0).graph))
    some = {name.endswith(LOOP) for name in names(choose(graph, most_lane_bytes=4000).graph)}
    assert some == {True, False}


def test_every_choice_trains_as_alone(tmp_path, monkeypatch):
    given = cases("cnn", "cnn", "mlp", "residual", "cells", "cells")
    alone = {case.id: case.alone() for case in given}
    for number, rules in enumerate((Rules(), Rules(0), Rules(math.inf, 0), Rules(5000, 400_000))):
        monkeypatch.setattr(tuning, "rules_for", lambda device, rules=rules: rules)
        merged = Merged(given, tmp_path / str(number))
        for case in given:
            assert_equal_float64(merged, case, alone[case.id])


def test_a_cpu_has_the_rules_that_it_was_tuned_with():
    rules = rules_for(torch.device("cpu"))
    assert rules.most_lane_bytes == 2**17
    assert rules.most_program_bytes == 24e6
    assert rules.margin == 0.5
    assert rules.widths(16, 2**13, 2**11) == [16]  # all of it fits into a cache
    assert rules.widths(16, 2**15, 2**13) == [2, 4, 8, 16]
    assert rules.widths(16, 2**20, 2**18) == [2, 4, 8]
    assert rules.widths(2, 2**20, 2**18) == [2]


def test_a_gpu_has_full_width_whatever_values_take():
    rules = rules_for(torch.device("cuda"))
    assert rules.most_lane_bytes == rules.most_program_bytes == math.inf
    assert [rules.widths(size, 2**25, 2**23) for size in (2, 31, 255)] == [[2], [31], [255]]


def test_groups_on_a_gpu_are_divided_where_kernels_cannot_count_their_elements():
    rules = rules_for(torch.device("cuda"))
    assert rules.widths(256, 2**25, 2**23) == [128]
    assert rules.widths(300, 2**25, 2**23) == [150]
    assert rules.widths(3, 2**34, 2**32) == [1]
