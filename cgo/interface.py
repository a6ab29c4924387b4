"""The interface that search strategies program against; names follow NNI's Retiarii."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from cgo.graph import ModelId
from cgo.graph_data import GraphData
from cgo.model import Model

__all__ = [
    "AbstractExecutionEngine",
    "AbstractGraphListener",
    "GraphData",
    "MetricData",
    "WorkerInfo",
]

#: One model's metric, or the metrics of all models of a trial.
MetricData = float | Mapping[ModelId, float]


@dataclass(frozen=True)
class WorkerInfo:
    """An idle worker: what a trial could run on now."""

    worker_id: str
    device: str  # "cpu", "cuda:0"
    device_name: str  # "NVIDIA H200"; for a CPU its model name
    total_memory_bytes: int
    free_memory_bytes: int


class AbstractGraphListener(ABC):
    """Hears of models; only `on_metric` has to be defined, the others do nothing.

    All calls come from one thread, in order for each model. An exception in a listener is logged
    with its traceback; other listeners are still called.
    """

    @abstractmethod
    def on_metric(self, model: Model, metric: MetricData) -> None:
        """A model's final metric; comes before `on_training_end`."""

    def on_intermediate_metric(self, model: Model, metric: MetricData) -> None:  # noqa: B027
        """A model's metric after an epoch."""

    def on_training_end(self, model: Model, success: bool) -> None:  # noqa: B027
        """Nothing more will be heard of this model."""


class AbstractExecutionEngine(ABC):
    """Trains submitted models."""

    @abstractmethod
    def submit_models(self, *models: Model) -> None:
        """Hand over models for training; returns before they are trained.

        Raises:
            DuplicateModelError: a model object or id was submitted before; nothing is submitted.
            EngineClosedError: the engine is closed.
            BudgetExhaustedError: the engine's `max_models` or `max_duration_s` is spent.
        """

    @abstractmethod
    def wait_models(self, *models: Model, timeout_s: float | None = None) -> None:
        """Block until the given models (default: all submitted) have ended.

        Raises:
            WaitTimeoutError: `timeout_s` passed first; the models train on.
            KeyboardInterrupt: Ctrl-C; running trials were stopped and what was reported is kept.
        """

    @abstractmethod
    def list_models(self) -> list[Model]:
        """Copies of all models of the experiment, in order of submission."""

    @abstractmethod
    def query_available_resource(self) -> list[WorkerInfo]:
        """The idle workers."""

    @abstractmethod
    def budget_exhausted(self) -> bool:
        """Whether `max_models` have been submitted or `max_duration_s` have passed."""

    @abstractmethod
    def register_graph_listener(self, listener: AbstractGraphListener) -> None:
        """Call `listener` for every event from now on."""

    @classmethod
    @abstractmethod
    def trial_execute_graph(cls, graph_data: GraphData | None = None) -> MetricData:
        """Inside a trial: train the document's models and return every model's final metric.

        Args:
            graph_data: What to train; None takes the document that the trial was started with.
        """
