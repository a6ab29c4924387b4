"""CGO: many small PyTorch models, merged into one graph and trained in one process."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgo.engine import BaseExecutionEngine, CGOEngine, get_execution_engine
    from cgo.errors import CgoError
    from cgo.graph_data import GraphData
    from cgo.interface import (
        AbstractExecutionEngine,
        AbstractGraphListener,
        MetricData,
        WorkerInfo,
    )
    from cgo.model import DataSpec, Model, ModelStatus, TrainingSpec, best
    from cgo.passes.batch_operators import BatchOperators
    from cgo.runtime.plain_streams import KeyedStreams
    from cgo.store import Experiment, open_experiment
    from cgo.tuning import Tuning

__version__ = "0.1.0"

# Imported on first use (PEP 562), so that a trial never imports the engine.
_HOME = {
    "AbstractExecutionEngine": "cgo.interface",
    "AbstractGraphListener": "cgo.interface",
    "BaseExecutionEngine": "cgo.engine",
    "BatchOperators": "cgo.passes.batch_operators",
    "CGOEngine": "cgo.engine",
    "CgoError": "cgo.errors",
    "DataSpec": "cgo.model",
    "Experiment": "cgo.store",
    "GraphData": "cgo.graph_data",
    "KeyedStreams": "cgo.runtime.plain_streams",
    "MetricData": "cgo.interface",
    "Model": "cgo.model",
    "ModelStatus": "cgo.model",
    "TrainingSpec": "cgo.model",
    "Tuning": "cgo.tuning",
    "WorkerInfo": "cgo.interface",
    "best": "cgo.model",
    "get_execution_engine": "cgo.engine",
    "open_experiment": "cgo.store",
}

__all__ = [
    "AbstractExecutionEngine",
    "AbstractGraphListener",
    "BaseExecutionEngine",
    "BatchOperators",
    "CGOEngine",
    "CgoError",
    "DataSpec",
    "Experiment",
    "GraphData",
    "KeyedStreams",
    "MetricData",
    "Model",
    "ModelStatus",
    "TrainingSpec",
    "Tuning",
    "WorkerInfo",
    "best",
    "get_execution_engine",
    "open_experiment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cgo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
