"""What a device can do: published, measured, kept."""

import dataclasses
import json
import math

import pytest
import torch

from cgo.runtime.accelerator import accelerator_for
from cgo.runtime.cost_table import CostTable
from cgo.runtime.device_profile import (
    CPU,
    PRECISIONS,
    DeviceProfile,
    measure,
    prior,
    profile_of,
)
from cgo.runtime.known_devices import PUBLISHED, published

HOST = torch.device("cpu")
GPU = torch.device("cuda:0")
H100 = prior("NVIDIA H100 80GB HBM3", (9, 0), 132)


def test_work_takes_its_launches_and_the_longer_of_moving_and_computing():
    profile = dataclasses.replace(H100, bandwidth=1e9, launch_s=1e-3, rates={"float32": 1e6})
    assert profile.seconds(2e9) == pytest.approx(2.001)
    assert profile.seconds(2e9, 3e6, launches=2) == pytest.approx(3.002)
    assert profile.seconds(0, 3e6, "unheard of", launches=0) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "bandwidth", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 3.35e12, 67e12),
        ("NVIDIA H100 PCIe", (9, 0), 114, 2.0e12, 51e12),
        ("NVIDIA H200", (9, 0), 132, 4.8e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2.039e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", (8, 0), 108, 1.935e12, 19.5e12),
        ("NVIDIA L4", (8, 9), 58, 0.3e12, 30.3e12),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 1.008e12, 82.6e12),
    ],
)
def test_known_devices_are_found_by_name(name, capability, multiprocessors, bandwidth, float32):
    found = prior(name, capability, multiprocessors)
    assert (found.bandwidth, found.rates["float32"]) == (bandwidth, float32)
    assert found.source == "published"


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "alike"),
    [
        ("NVIDIA L40S", (8, 9), 142, "RTX 4090"),  # an L40 is no L4
        ("NVIDIA GeForce RTX 4060", (8, 9), 24, "L4"),
        ("NVIDIA GeForce RTX 3060", (8, 6), 28, "L4"),
        ("Tesla V100-SXM2-16GB", (7, 0), 80, "A100"),
        ("NVIDIA B200", (10, 0), 148, "H200"),
    ],
)
def test_a_device_that_is_in_no_table_is_like_the_nearest(name, capability, multiprocessors, alike):
    known = published(name, capability, multiprocessors)
    assert any(alike in part for part in known.names)
    found = prior(name, capability, multiprocessors, cache_bytes=7)
    share = multiprocessors / known.multiprocessors
    assert found.rates["float32"] == pytest.approx(share * known.rates[1])
    assert found.cache_bytes == 7  # the driver knows better


def test_rates_grow_as_precision_falls():
    for known in PUBLISHED:
        assert list(known.rates[1:]) == sorted(known.rates[1:])
        assert known.rates[0] <= known.rates[1]


def test_a_cpu_has_the_figures_that_its_rules_were_tuned_with():
    assert profile_of(HOST) is CPU
    assert profile_of(HOST, CostTable(None, HOST), measuring=lambda expected: H100) is CPU


def test_a_device_is_measured_and_what_cannot_be_is_as_expected(monkeypatch):
    accelerator = accelerator_for(HOST)
    found = measure(accelerator, CPU)
    assert found.source == "measured"
    assert found.name == CPU.name
    assert set(found.rates) == set(PRECISIONS)
    figures = [found.bandwidth, found.launch_s, found.measure_s, *found.rates.values()]
    assert all(0 < figure < math.inf for figure in figures)
    monkeypatch.setattr(accelerator, "capture", refuse)
    again = measure(accelerator, CPU)
    assert dataclasses.replace(again, source=CPU.source) == CPU


def refuse(body, generators=()):
    raise RuntimeError("as planned")


def test_a_device_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr("cgo.runtime.device_profile.prior_of", lambda device: H100)
    asked = []

    def measuring(expected):
        asked.append(expected)
        return dataclasses.replace(expected, bandwidth=1e12, source="measured")

    path = tmp_path / "costs.sqlite"
    table = CostTable(path, GPU, key="a GPU")
    assert profile_of(GPU, table) is H100  # there was no time
    first = profile_of(GPU, table, measuring)
    second = profile_of(GPU, CostTable(path, GPU, key="a GPU"), measuring)
    assert first == second == dataclasses.replace(H100, bandwidth=1e12, source="measured")
    assert asked == [H100]
    assert profile_of(GPU, CostTable(path, GPU, key="another"), None) is H100


def test_profiles_survive_json():
    assert DeviceProfile.from_json(json.loads(json.dumps(H100.as_json()))) == H100


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth": -1.0},
        {"bandwidth": "fast"},
        {"rates": {"float32": 1.0}},
        {"launch_s": math.nan},
        {"name": 3},
        {"more": 1},
    ],
)
def test_what_is_no_profile_is_measured_again(change):
    assert DeviceProfile.from_json(H100.as_json() | change) is None
    assert DeviceProfile.from_json([]) is None
