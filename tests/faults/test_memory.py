"""Allocations that fail for real: models are divided, and only what is too large alone fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1]


def run(folder, widths, more_bytes=0):
    folder.mkdir()
    # Memory of large tensors goes back at once, as a GPU's allocator gives it back for another try.
    env = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1",
           "MALLOC_MMAP_THRESHOLD_": "1000000"}  # fmt: skip
    command = [sys.executable, "-m", "support.short_of_memory", str(folder), json.dumps(widths)]
    subprocess.run([*command, str(more_bytes)], env=env, check=True, timeout=300)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_too_many_models_at_once_take_turns(tmp_path):
    """A hidden layer of 16,384 over a batch of 512 is 32 MiB; a step keeps some five of them."""
    widths = [16384] * 4
    whole = run(tmp_path / "whole", widths)
    short = run(tmp_path / "short", widths, more_bytes=560 * 2**20)
    assert whole["divided"] == []
    assert short["divided"], "the limit was not reached"
    assert short["ended"] == dict.fromkeys(["m0", "m1", "m2", "m3"])
    for model, losses in whole["losses"].items():
        assert short["losses"][model] == pytest.approx(losses, rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_a_model_that_is_too_large_alone_fails_alone(tmp_path):
    widths = [512, 131072, 512]
    whole = run(tmp_path / "whole", [512, 512])
    short = run(tmp_path / "short", widths, more_bytes=600 * 2**20)
    assert "allocate memory" in short["ended"]["m1"]
    assert short["ended"]["m0"] is None
    assert short["ended"]["m2"] is None
    assert short["losses"]["m0"] == pytest.approx(whole["losses"]["m0"], rel=1e-5)
