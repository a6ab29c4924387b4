"""`cgo bench`: every family can be trained by our method; records, refusals, plug-ins."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cgo.bench import end_to_end, jax_vmap, measure, methods, ratio
from cgo.bench.families import FAMILIES
from cgo.bench.methods import NotApplicable
from cgo.errors import SpecError


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured_and_trained(family):
    models = FAMILIES[family](4)
    assert len({model.model_id for model in models}) == 4
    steps = methods.merged(models)
    steps(1)


def test_a_record_for_every_method_that_applies():
    heard = {}
    found = measure("mlp", 2, methods=["cgo", "vmap", "serial-fused"], rounds=7,
                    skipped=heard.__setitem__)  # fmt: skip
    assert [record.method for record in found] == ["serial", "cgo", "vmap", "serial-fused"]
    assert heard == {}
    for record in found:
        assert record.low <= record.ratio <= record.high
        assert math.isfinite(record.median_s)
        assert record.as_json()["family"] == "mlp"
    assert found[0].ratio == 1


def test_different_architectures_have_no_vmap():
    with pytest.raises(NotApplicable, match="one architecture"):
        methods.stacked(FAMILIES["cells-different-8"](2))


def test_vmap_trains_what_the_serial_loop_trains():
    models = FAMILIES["mlp"](2)
    solo = [methods.Solo(model, methods.batches_of(models)[model.data.digest]) for model in models]
    methods.loop(solo)(3)
    found = []
    original = methods._Momentum

    class Seen(original):
        def __init__(self, parameters, given):
            super().__init__(parameters, given)
            found.append(self)

    methods._Momentum = Seen
    try:
        methods.stacked(models)(3)
    finally:
        methods._Momentum = original
    for lane, one in enumerate(solo):
        for stacked, own in zip(found[0].parameters, one.net.parameters()):
            assert (stacked[lane] - own).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["mlp", "cnn8"])
def test_jax_trains_what_the_serial_loop_trains(family):
    pytest.importorskip("jax", reason="JAX is not installed")
    models = FAMILIES[family](3)
    (batches,) = methods.batches_of(models).values()
    solos = [methods.Solo(model, batches) for model in models]
    steps = methods.jax_vmap(models)
    for number in range(6):  # losses are of the weights before a step, moments of those before
        x, y = batches[number % len(batches)]
        expected = [solo.objective(x, y).item() for solo in solos]
        methods.loop(solos)(1)
        steps(1)
        assert np.asarray(steps.losses) == pytest.approx(expected, rel=1e-5)
    for lane, solo in enumerate(solos):
        found = [torch.from_numpy(np.array(p[lane])) for own in steps.parameters for p in own]
        for value, own in zip(found, solo.net.parameters(), strict=True):
            torch.testing.assert_close(value, own.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("encoders", "Encoder is no chain"), ("cells-different-8", "one architecture only")],
)
def test_jax_says_what_it_does_not_train(family, reason):
    with pytest.raises(NotApplicable, match=reason):
        methods.jax_vmap(FAMILIES[family](2))


def test_jax_refuses_layers_and_settings_that_it_would_take_for_others():
    models = FAMILIES["mlp"](2)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout())
    assert jax_vmap.refusal(models, net) == "no translation of Dropout, Tanh"
    reflecting = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    assert "no translation of Conv2d" in jax_vmap.refusal(models, reflecting)
    models[1].training.optimizer_kwargs["nesterov"] = True
    assert "another way" in jax_vmap.refusal(models, nn.Sequential())
    models[1].training.optimizer_kwargs.pop("nesterov")
    models[1].training.optimizer_kwargs["momentum"] = 0.5
    assert jax_vmap.refusal(models, nn.Sequential()) == "models differ in momentum"


def test_without_jax_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    heard = {}
    found = measure("mlp", 2, methods=["jax"], rounds=7, skipped=heard.__setitem__)
    assert [record.method for record in found] == ["serial"]
    assert "pip install 'cgo-engine[jax]'" in heard["jax"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "none", "count": 1}, "family: 'none' is none of mlp"),
        ({"family": "mlp", "count": 0}, "models: 0"),
        ({"family": "mlp", "count": 1, "rounds": 3}, "at least 7"),
        ({"family": "mlp", "count": 1, "methods": ["magic"]}, "method: 'magic' is none of serial"),
    ],
)
def test_bad_requests_name_the_way_out(given, message):
    with pytest.raises(SpecError, match=message):
        measure(**given)


def test_ratios_are_medians_of_rounds():
    middle, low, high = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    assert middle == 2.0
    assert low <= middle <= high


def test_the_command_writes_records(tmp_path):
    path = tmp_path / "out" / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "cgo", "bench", "--family", "mlp", "--models", "2",
         "--method", "cgo", "--rounds", "7", "--json", str(path)],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "150"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "against serial" in done.stdout
    document = json.loads(path.read_text())
    assert [record["method"] for record in document["records"]] == ["serial", "cgo"]
    assert document["threads"] == 1


@pytest.mark.long
def test_a_whole_search_is_measured_against_the_serial_one():
    heard = []
    found = end_to_end.measure(4, epochs=1, workers=2, rounds=1, heard=heard.append)
    assert found.ratio == pytest.approx(found.serial_s / found.merged_s)
    assert found.phases["capture_s"] + found.phases["training_s"] < found.merged_s
    assert len(heard) == 1
    assert found.as_json()["family"] == "end-to-end"


def test_the_searched_models_are_all_different():
    found = end_to_end.candidates(16, 10)
    assert len({(m.module, str(m.kwargs)) for m in found}) == 16
    assert {m.module for m in found} == {"cgo.zoo:cnn", "cgo.zoo:nas_bench_201"}
