"""One trial on several devices, which the CPU plays: each model as alone, wherever it is."""

import pytest
import torch
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo.runtime import training
from cgo.runtime.cohort import Cohort
from cgo.runtime.placing import Places, place_models, state_bytes

DEVICES = [torch.device("cpu", index) for index in range(3)]
TRAINING = {"precision": "float64", "epochs": 3, "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9}}


class Spread(Merged):
    """A merged trial on several devices."""

    def run(self, data, **given):
        return training.train(data, given["folder"], given["report"], observer=self, device=DEVICES)


def cases():
    families = ["mlp", "cnn", "mlp", "cells", "cnn", "mlp"]
    found = [Case(f"m{n}", family, {"dropout": 0.2}, seed=n, training=TRAINING)
             for n, family in enumerate(families)]  # fmt: skip
    trap = Case("opaque", "trap", {"kind": "control_flow"}, training=TRAINING)
    return [*found, trap]


def test_models_on_several_devices_equal_training_alone(tmp_path, monkeypatch):
    opened = []
    plain = Cohort._open

    def counted(cohort):
        loader = plain(cohort)
        opened.append(id(loader))
        return loader

    monkeypatch.setattr(Cohort, "_open", counted)
    given = cases()
    merged = Spread(given, tmp_path, tuning=cgo.Tuning(measure=False, capture=True))
    for case in given:
        assert_equal_float64(merged, case)
    assert len(set(opened)) == 1  # one loader for all devices
    (placed,) = merged.told("placed")
    assert all(placed["models"])
    assert placed["makespan_s"] >= placed["bound_s"]
    steps = [value for value in merged.told("captured") if value["program"] == "train/32"]
    assert len(steps) > 1  # one a device


def test_a_single_device_needs_no_plan(tmp_path):
    merged = Merged([Case("m", "mlp", training=TRAINING)], tmp_path)
    told = []
    found = place_models(merged.plan.graph_data, DEVICES[:1], lambda *args, **kw: told.append(args))
    assert found.devices == {"m": DEVICES[0]}
    assert told == []


def test_state_is_parameters_gradients_moments_and_buffers(tmp_path):
    merged = Merged([Case("m", "cnn", training={**TRAINING, "epochs": 1})], tmp_path)
    (entry,) = merged.plan.graph_data.models
    state = merged.state("m")
    expected = 0
    for item in entry.state:
        size = state[item.path].numel() * 8 if item.path in state else 8
        expected += size * (3 if item.kind == "parameter" else 1)
    assert state_bytes(entry) == expected


@pytest.mark.parametrize("capture", [False, True])
def test_a_stem_on_one_device_feeds_models_on_others(tmp_path, monkeypatch, capture):
    """As `place` may decide: nothing is stored, each batch's values are computed once."""

    def spread(data, devices, tell):
        found = {entry.id: devices[n % 3] for n, entry in enumerate(data.models)}
        return Places(found, feeding=True)

    monkeypatch.setattr(training, "place_models", spread)
    given = [Case(f"m{n}", "headed", {"width": 4 + n}, seed=n, training=TRAINING) for n in range(4)]
    tuning = cgo.Tuning(measure=False, store_stems=False, capture=capture)
    merged = Spread(given, tmp_path, tuning=tuning)
    assert [one["models"] for one in merged.told("stems") if one.get("fed")] == [4]
    for case in given:
        assert_equal_float64(merged, case)
