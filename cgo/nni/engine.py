"""An NNI execution engine that trains the models of a strategy merged."""

from __future__ import annotations

import itertools
import logging
import queue
import re
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nni.nas.execution import ExecutionEngine
from nni.nas.execution.event import (
    FinalMetricEvent,
    IntermediateMetricEvent,
    ModelEvent,
    TrainingEndEvent,
)
from nni.nas.space import ExecutableModelSpace, ModelStatus
from nni.runtime.trial_command_channel import (
    TrialCommandChannel,
    get_default_trial_command_channel,
    set_default_trial_command_channel,
)

from cgo.engine import CGOEngine, refuse_inside_trial
from cgo.errors import BudgetExhaustedError, CgoError, EngineClosedError, SpecError
from cgo.graph import ModelId
from cgo.interface import AbstractGraphListener, MetricData
from cgo.model import Model
from cgo.nni.translate import NotTranslated, Translator
from cgo.platforms.base import Platform
from cgo.user_code import contained, told

log = logging.getLogger(__name__)


class CGOExecutionEngine(ExecutionEngine):  # type: ignore[misc]
    """Runs NNI's strategies merged: `strategy(model_space, engine)`.

    Strategies submit models one by one; these are kept until `merge_size` are there,
    `merge_window_s` have passed since the last, or somebody waits, and then trained in one trial.
    Models whose evaluator cannot be merged run by themselves, one after another, in this process,
    as under NNI's sequential engine.

    Args:
        experiment_dir: The journal's folder; the folder of an earlier search goes on from it.
        platform: Where trials run; this machine by default.
        merge_size: Models that are trained together.
        merge_window_s: Seconds without another model after which those that are there begin.
        concurrency: Batches of `merge_size` that may be under way; as many as trials may be.
        max_models: Budget in models (NNI's `max_trial_number` counts trials, which hold many).
        max_duration_s: Budget in seconds.
        seed: Added to every candidate's seed, which otherwise follows from what it is.
        engine_options: Further arguments of `CGOEngine`.

    Raises:
        SpecError: `merge_size` or `concurrency` are below 1.
        NestedEngineError: this process is a trial, or a worker of a loader.

    Example:
        .. code-block:: python

            engine = CGOExecutionEngine(merge_size=16, max_models=64)
            strategy = nni.nas.strategy.RegularizedEvolution(population_size=16)
            strategy(SimplifiedModelSpace.from_model(space, evaluator), engine)
    """

    def __init__(
        self,
        experiment_dir: str | Path | None = None,
        *,
        platform: Platform | None = None,
        merge_size: int = 16,
        merge_window_s: float = 1.0,
        concurrency: int = 1,
        max_models: int | None = None,
        max_duration_s: float | None = None,
        seed: int = 0,
        **engine_options: Any,
    ) -> None:
        refuse_inside_trial(type(self).__name__)
        super().__init__()
        if merge_size < 1 or concurrency < 1:
            raise SpecError(f"merge_size {merge_size}, concurrency {concurrency}; at least 1")
        self._folder, self._platform, self._options = experiment_dir, platform, engine_options
        self._seed = seed
        self._merge_size, self._window_s = merge_size, merge_window_s
        self._capacity = merge_size * concurrency
        self._max_models, self._max_duration_s = max_models, max_duration_s
        self._spent_s = 0.0  # in earlier sessions
        self._earlier = 0  # models of earlier sessions
        self._submitted = 0
        self._begun = time.monotonic()
        self._history: dict[int, ExecutableModelSpace] = {}  # by identity, in order
        self._names: dict[int, ModelId] = {}
        self._spaces: dict[ModelId, ExecutableModelSpace] = {}
        self._pending: list[Model] = []
        self._due = 0.0
        self._reasons: dict[ModelId, str] = {}  # why a model is not merged
        self._errors: dict[ModelId, str] = {}
        self._changed = threading.Condition(threading.RLock())
        self._telling = threading.RLock()  # callbacks are not called from two threads at once
        self._closed = False
        self._cgo: CGOEngine | None = None
        self._translation: Translator | None = None
        self._alone: queue.SimpleQueue[ExecutableModelSpace | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._flush_late, "cgo-nni-window"), (self._run_alone, "cgo-nni"))
        ]
        for thread in self._threads:
            thread.start()

    # --- NNI's interface --------------------------------------------------------------------------

    def submit_models(self, *models: ExecutableModelSpace) -> None:
        """Take frozen models; they are `Training` from now on.

        Raises:
            SpecError: a model is not frozen, has ended, or is being trained.
            BudgetExhaustedError: `budget_available` is false.
            EngineClosedError: the engine was shut down.
        """
        for model in models:
            self._check(model)
            with self._changed:
                self._history[id(model)] = model
                self._submitted += 1
                model.status = ModelStatus.Training
            self._take(model)

    def _check(self, model: ExecutableModelSpace) -> None:
        if self._closed:
            raise EngineClosedError("the engine was shut down; make another")
        status = model.status
        if not status.frozen() or status.completed() or status is ModelStatus.Training:
            raise SpecError(
                f"submit_models: a model that is {status.value}; freeze a model and submit it once"
            )
        if met := self.limit_met():
            raise BudgetExhaustedError(met)

    def _name(self, model: ExecutableModelSpace, text: str) -> ModelId:
        """An id; of equal candidates, and of one that is tried again, each its own."""
        with self._changed:
            name = next(
                name
                for number in itertools.count(1)
                if (name := f"nni-{text}" + (f"-{number}" if number > 1 else ""))
                not in self._spaces
            )
            self._names[id(model)] = name
            self._spaces[name] = model
            return name

    def _take(self, model: ExecutableModelSpace) -> None:
        """Queue a model for merging, or to run by itself."""
        try:
            with contained:
                translated = self._translator().model(model, lambda text: self._name(model, text))
        except NotTranslated as error:
            name = self._name(model, "alone")
            self._reasons[name] = str(error)
            log.info("model %s is not merged: %s", name, error)
            self._alone.put(model)
            return
        except Exception as error:  # the user's space or data set raised
            self._fail(self._name(model, "failed"), told(error))
            return
        with self._changed:
            self._pending.append(translated)
            self._due = time.monotonic() + self._window_s
            full = len(self._pending) >= self._merge_size
            self._changed.notify_all()
        if full:
            self._flush()

    def wait_models(self, *models: ExecutableModelSpace) -> None:
        """Block until the given models (default: all) have ended; what is kept begins at once."""
        self._flush()
        with self._changed:
            self._changed.wait_for(
                lambda: all(m.status.completed() for m in models or list(self._history.values()))
            )

    def list_models(self, status: ModelStatus | None = None) -> Iterable[ExecutableModelSpace]:
        """The submitted instances, in order; of one status if it is given."""
        with self._changed:
            found = list(self._history.values())
        return [model for model in found if status is None or model.status == status]

    def idle_worker_available(self) -> bool:
        """Whether more models can be merged into a batch that has not begun, or begin one.

        Places of models that failed are free once another has been trained: a strategy that is
        asked for a model before it has seen a metric has nothing to go by, and some then stop.
        """
        with self._changed:
            states = [model.status for model in self._history.values()]
            taken = sum(not status.completed() for status in states)
            if taken and ModelStatus.Trained not in states:
                taken = len(states)
            return not self._closed and taken < self._capacity

    def budget_available(self) -> bool:
        """Whether neither `max_models` nor `max_duration_s` is used up; see `limit_met`."""
        return self.limit_met() is None

    def limit_met(self) -> str | None:
        """Which limit of the budget is used up, in words."""
        submitted = self._earlier + self._submitted
        if self._max_models is not None and submitted >= self._max_models:
            return f"max_models: {submitted} of {self._max_models} models were submitted"
        spent = self._spent()
        if self._max_duration_s is not None and spent >= self._max_duration_s:
            return f"max_duration_s: {spent:.0f} of {self._max_duration_s:g} s have passed"
        return None

    def _spent(self) -> float:
        return self._spent_s + time.monotonic() - self._begun

    def shutdown(self) -> None:
        """Stop what runs, and free everything; models that have not ended are `Interrupted`."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            dropped, self._pending = self._pending, []
            self._changed.notify_all()
        for model in dropped:
            self._end(model.model_id, ModelStatus.Interrupted)
        self._alone.put(None)
        if self._cgo is not None:
            self._cgo.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs; results themselves are in the journal."""
        return {
            "experiment_dir": str(self.experiment_dir),
            "model_count": self._earlier + self._submitted,
            "spent_s": self._spent(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an earlier search: candidates that it has trained are reported at once.

        Raises:
            SpecError: models have been submitted already, to another experiment.
        """
        given = Path(state_dict["experiment_dir"])
        if self._cgo is not None and self._cgo.experiment_dir.resolve() != given.resolve():
            raise SpecError(
                f"load_state_dict: this engine already writes to {self._cgo.experiment_dir}; load "
                "the state before models are submitted"
            )
        self._folder = given
        self._earlier, self._spent_s = state_dict["model_count"], state_dict["spent_s"]
        self._begun = time.monotonic()

    # --- beyond it --------------------------------------------------------------------------------

    @property
    def experiment_dir(self) -> Path:
        """The journal's folder."""
        return self._engine().experiment_dir

    @property
    def errors(self) -> Mapping[ModelId, str]:
        """Why models failed, by our ids; see `name_of`."""
        return dict(self._errors)

    def name_of(self, model: ExecutableModelSpace) -> ModelId:
        """Our id of a submitted model."""
        return self._names[id(model)]

    def error_of(self, model: ExecutableModelSpace) -> str | None:
        """Why a model failed."""
        return self._errors.get(self._names.get(id(model), ""))

    def explain(self) -> list[str]:
        """A line for each model that is not merged, and what merging did for the others."""
        lines = [f"{name}: runs by itself: {why}" for name, why in self._reasons.items()]
        for number, report in enumerate(self._cgo.reports if self._cgo is not None else ()):
            lines.append(
                f"trial {number}: {report.models} models, {report.captured} captured, "
                f"{report.grouped} operators fused into {report.groups}"
            )
            lines += [f"  {id_}: opaque lane: {why}" for id_, why in report.opaque.items()]
        return lines

    def _engine(self) -> CGOEngine:
        with self._changed:
            if self._cgo is None:
                self._cgo = _MergingEngine(self._folder, platform=self._platform, **self._options)
                self._cgo.register_graph_listener(_Listener(self))
            return self._cgo

    def _translator(self) -> Translator:
        with self._changed:
            if self._translation is None:
                folder = self._engine().experiment_dir / "data"
                self._translation = Translator(folder, self._seed)
            return self._translation

    # --- merging ----------------------------------------------------------------------------------

    def _flush(self) -> None:
        with self._changed:
            models, self._pending = self._pending, []
            if not models:
                return
            engine = self._engine()
        try:
            engine.submit_models(*models)
        except CgoError as error:
            for model in models:
                self._fail(model.model_id, str(error))

    def _flush_late(self) -> None:
        """Begin with a part of a batch where no more models come."""
        while not self._closed:
            with self._changed:
                left = self._due - time.monotonic() if self._pending else None
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
            self._flush()

    # --- running by itself ------------------------------------------------------------------------

    def _run_alone(self) -> None:
        while (model := self._alone.get()) is not None:
            if self._closed:
                self._end(self._names[id(model)], ModelStatus.Interrupted)
                continue
            name = self._names[id(model)]
            before = get_default_trial_command_channel()
            set_default_trial_command_channel(_Channel(self, name))
            try:
                import nni

                nni.get_next_parameter()
                with contained:
                    model.execute()
                status = ModelStatus.Trained
            except Exception as error:
                log.warning("model %s failed:\n%s", name, traceback.format_exc())
                self._errors[name] = told(error)
                status = ModelStatus.Failed
            finally:
                set_default_trial_command_channel(before)
            self._end(name, status)

    # --- events -----------------------------------------------------------------------------------

    def _tell(self, event: ModelEvent) -> None:
        """Dispatch an event; a callback that raises must not end the thread that tells."""
        with self._telling:
            try:
                with contained:
                    self.dispatch_model_event(event)
            except Exception:
                log.exception("a callback raised")
                self.default_callback(event)
        with self._changed:
            self._changed.notify_all()

    def intermediate(self, name: ModelId, metric: Any) -> None:
        """Report a model's metric of an epoch."""
        self._tell(IntermediateMetricEvent(self._spaces[name], metric))

    def final(self, name: ModelId, metric: Any) -> None:
        """Report a model's final metric."""
        self._tell(FinalMetricEvent(self._spaces[name], metric))

    def _end(self, name: ModelId, status: ModelStatus) -> None:
        self._tell(TrainingEndEvent(self._spaces[name], status))

    def _fail(self, name: ModelId, error: str) -> None:
        self._errors[name] = error
        self._end(name, ModelStatus.Failed)


#: How NNI names classes and functions in its texts.
_NAMED = re.compile(r"\bpath:([A-Za-z_]\w*(?:\.\w+)*)")


class _MergingEngine(CGOEngine):
    """Trials find the modules that spaces and data sets name in their texts, too."""

    def _modules(self, models: Sequence[Model]) -> frozenset[str]:
        texts = [v for m in models for v in (*m.kwargs.values(), *m.data.kwargs.values())]
        named = {name for text in texts if isinstance(text, str) for name in _NAMED.findall(text)}
        return super()._modules(models) | named


class _Listener(AbstractGraphListener):
    """Hands the events of our models to NNI's."""

    def __init__(self, engine: CGOExecutionEngine) -> None:
        self._engine = engine

    def on_intermediate_metric(self, model: Model, metric: MetricData) -> None:
        self._engine.intermediate(model.model_id, metric)

    def on_metric(self, model: Model, metric: MetricData) -> None:
        self._engine.final(model.model_id, metric)

    def on_training_end(self, model: Model, success: bool) -> None:
        if success:
            self._engine._end(model.model_id, ModelStatus.Trained)
        elif model.status.value == "cancelled":
            self._engine._end(model.model_id, ModelStatus.Interrupted)
        else:
            self._engine._fail(model.model_id, model.error or "unknown")


class _Channel(TrialCommandChannel):  # type: ignore[misc]
    """What NNI's trial functions talk to while a model runs by itself."""

    def __init__(self, engine: CGOExecutionEngine, name: ModelId) -> None:
        self._engine, self._name = engine, name

    def receive_parameter(self) -> Any:
        """The model that runs."""
        return {"parameter_id": 0, "parameters": self._engine._spaces[self._name]}

    def send_metric(
        self, type: Any, parameter_id: Any, trial_job_id: str, sequence: int, value: Any
    ) -> None:
        """A metric that the evaluator reports."""
        tell = self._engine.final if type == "FINAL" else self._engine.intermediate
        tell(self._name, value)
