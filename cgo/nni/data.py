"""Data sources for NNI's evaluators; trials import this module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset

from cgo import weights
from cgo.errors import DataError
from cgo.nni.texts import check_text

if "nni" not in sys.modules:
    os.environ.setdefault("NNI_FRAMEWORK", "none")


def traced(train: str, validation: str) -> tuple[Any, Any]:
    """Data sets that are made anew from what `nni.trace` has kept of them.

    Args:
        train: A traced data set, as `nni.dump` writes it.
        validation: The same for validation.
    """
    for text in (train, validation):
        check_text(text, "source")
    import nni
    from nni.common.serializer import SerializableObject

    # Of what was frozen, NNI gives the recipe; of what was made before, the thing itself.
    found: list[Any] = [nni.load(text) for text in (train, validation)]
    first, second = (d.get() if type(d) is SerializableObject else d for d in found)
    return first, second


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
