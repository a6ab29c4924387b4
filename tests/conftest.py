"""Makes `support` importable, here and in trials, and the benchmarks here."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


def pytest_addoption(parser):
    """`--capture-way export` runs whatever captures a model with that way alone."""
    parser.addoption(
        "--capture-way", choices=["recording", "export"], help="how models are captured"
    )


def pytest_configure(config):
    if way := config.getoption("--capture-way"):
        import cgo.capture

        cgo.capture.WAYS = (way,)


@pytest.fixture(scope="session", autouse=True)
def always_merged():
    """Engines of tests merge unless they are told otherwise: estimates depend on the clock."""
    from cgo.engine import CGOEngine

    CGOEngine.__init__.__kwdefaults__["merge_always"] = True


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Measured costs of test runs stay out of the user's table."""
    os.environ["CGO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_environment():
    """What is called in this process and not in one of its own may set variables, as trials do."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def cuda():
    """A CUDA device; without one the test is skipped, and says so."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: nothing of this was tested on a GPU")
    return torch.device("cuda")


@pytest.fixture
def checkpoint_after_every_epoch(monkeypatch):
    """However long that takes, so that it is known where training goes on."""
    from cgo.runtime import checkpoint

    monkeypatch.setattr(checkpoint, "_MOST", math.inf)
