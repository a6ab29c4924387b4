"""Data sources for NNI's evaluators; trials import this module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset

from cgo import weights
from cgo.errors import DataError

if "nni" not in sys.modules:
    os.environ.setdefault("NNI_FRAMEWORK", "none")


def traced(train: str, validation: str) -> tuple[Any, Any]:
    """Data sets that are made anew from what `nni.trace` has kept of them.

    Args:
        train: A traced data set, as `nni.dump` writes it.
        validation: The same for validation.
    """
    import nni

    found = []
    for text in (train, validation):
        dataset: Any = nni.load(text)
        found.append(dataset.get() if hasattr(dataset, "trace_symbol") and not hasattr(
            dataset, "__getitem__") else dataset)  # fmt: skip
    return found[0], found[1]


def stored(file: str, sha256: str) -> tuple[TensorDataset, TensorDataset]:
    """Data sets of tensors from a file.

    Args:
        file: A safetensors file with `train.0`, `train.1`, ... and `validation.0`, ...
        sha256: Its hash.

    Raises:
        DataError: the file is not there, or another.
    """
    from cgo.graph_data import file_sha256

    path = Path(file)
    if not path.is_file():
        raise DataError(
            f"{file} is not there: this worker does not see the experiment's folder; put it on "
            "storage that all workers share (experiment_dir)"
        )
    if file_sha256(path) != sha256:
        raise DataError(f"{file} has changed since the search began; begin a new experiment")
    tensors = weights.load(path)

    def split(name: str) -> TensorDataset:
        count = sum(key.startswith(f"{name}.") for key in tensors)
        return TensorDataset(*(tensors[f"{name}.{index}"] for index in range(count)))

    return split("train"), split("validation")
