"""Where kernels in Triton may be used."""

import pytest
import torch

from cgo.runtime import triton_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "wanted", "usable"),
    [
        (CPU, None, False),
        (CPU, True, True),
        (CPU, False, False),
        (CUDA, None, True),
        (CUDA, True, True),
        (CUDA, False, False),
    ],
)
def test_on_a_gpu_or_where_asked_for_by_the_interpreter(device, wanted, usable, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_kernels, "installed", lambda: True)
    assert triton_kernels.usable(device, wanted) is usable


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_nowhere_without_triton(device, monkeypatch):
    monkeypatch.setattr(triton_kernels, "installed", lambda: False)
    assert not triton_kernels.usable(device, True)


def test_not_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_kernels.usable(CPU, True)
