"""The engine inside NNI experiments and under NNI's own NAS strategies.

- `CGOExecutionEngine`: an NNI `ExecutionEngine`; any NNI strategy runs on it, merged.
- `merge_experiment`: lets a `NasExperiment` run on that engine.
- `NniPlatform`: trials as trials of an NNI experiment, on any of its training services.

They need the extra `cgo-engine[nni]`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cgo.errors import SpecError

if TYPE_CHECKING:
    from cgo.nni.engine import CGOExecutionEngine
    from cgo.nni.experiment import merge_experiment
    from cgo.platforms.nni import NniPlatform

__all__ = ["CGOExecutionEngine", "NniPlatform", "merge_experiment"]

_HOMES = {
    "CGOExecutionEngine": "cgo.nni.engine",
    "NniPlatform": "cgo.platforms.nni",
    "merge_experiment": "cgo.nni.experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("nni", "pytorch_lightning"):
            raise
        raise SpecError(
            f"cgo.nni.{name} needs {error.name}, which is not installed: pip install "
            "'cgo-engine[nni]'"
        ) from error
