"""Makes `support` importable, here and in trials."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def cuda():
    """A CUDA device; without one the test is skipped, and says so."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: nothing of this was tested on a GPU")
    return torch.device("cuda")
