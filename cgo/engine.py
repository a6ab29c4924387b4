"""The execution engines: `CGOEngine` merges models, `BaseExecutionEngine` trains one a trial."""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from typing_extensions import Self

from cgo.allowed import checked_modules, is_allowed, refusal
from cgo.errors import (
    BudgetExhaustedError,
    DuplicateModelError,
    EngineClosedError,
    NestedEngineError,
    SpecError,
    WaitTimeoutError,
)
from cgo.graph import ModelId
from cgo.graph_data import GraphData
from cgo.imports import import_roots, is_import_path
from cgo.interface import (
    AbstractExecutionEngine,
    AbstractGraphListener,
    WorkerInfo,
)
from cgo.model import Model, ModelStatus
from cgo.passes.batch_operators import BatchOperators
from cgo.platforms.base import Platform
from cgo.platforms.local import GRACE_S, IN_TRIAL, LocalPlatform
from cgo.report import MergeReport
from cgo.scheduler import Scheduler
from cgo.store import Store, spec_of
from cgo.tuning import Tuning
from cgo.union import fusing_as_json

#: Seconds in which what was interrupted may end: trials are killed after less.
_CANCELLING_S = 2 * GRACE_S

_FUSE_ALL = BatchOperators()
_TUNED = Tuning()


class _Engine(AbstractExecutionEngine):
    """What the two engines share; they differ in whether models share a trial.

    Args:
        experiment_dir: Where the journal, weights and logs go; a new folder under
            `./cgo-experiments` by default. An existing experiment goes on.
        platform: Where trials run; this machine by default.
        import_paths: Further folders in which trials find user modules.
        max_models: Most models that may be submitted.
        max_duration_s: Seconds from the engine's start in which models may be submitted.
        batch_operators: Which operators of different models may be fused, and how wide; None: none,
            then what a model computes does not depend on its company by a single bit.
        tuning: How trials choose kernels, layouts and group sizes.
        allowed_modules: Modules and packages that trials may import for what a document names:
            factories, data sources, losses, metrics, optimizers, schedulers, augmentation. Torch's
            own names and `cgo.zoo` always may. None: whatever a document names, which is code.
        merge_always: Merge models also where that is expected to take longer than it saves, as it
            does for very few steps. Otherwise these are trained one after another in one trial.

    Raises:
        NestedEngineError: this process is a trial, or a worker of a loader.
        SpecError: `allowed_modules` holds something else than names of modules.
        StoreError: the experiment cannot be opened, or another engine holds it.
    """

    _merge: ClassVar[bool]

    def __init__(
        self,
        experiment_dir: str | Path | None = None,
        *,
        platform: Platform | None = None,
        import_paths: Iterable[str | Path] = (),
        max_models: int | None = None,
        max_duration_s: float | None = None,
        batch_operators: BatchOperators | None = _FUSE_ALL,
        tuning: Tuning = _TUNED,
        allowed_modules: Iterable[str] | None = None,
        merge_always: bool = False,
    ) -> None:
        refuse_inside_trial(type(self).__name__)
        self._allowed_modules = checked_modules(allowed_modules)
        self._import_paths = tuple(str(Path(path).resolve()) for path in import_paths)
        self._max_models, self._max_duration_s = max_models, max_duration_s
        self._started = time.monotonic()
        self._models: dict[ModelId, Model] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._store = Store(Path(experiment_dir) if experiment_dir is not None else _new_folder())
        self._earlier = self._store.specs()  # of sessions before this one
        self._platform = platform if platform is not None else LocalPlatform()
        self._scheduler = Scheduler(
            self._store,
            self._platform,
            merge=self._merge,
            batch_operators=batch_operators,
            import_roots=self._import_roots,
            modules=self._modules,
            experiment={
                "experiment_dir": str(self._store.folder),
                "engine": type(self).__name__,
                "max_models": max_models,
                "max_duration_s": max_duration_s,
                "tuning": tuning.as_json(),
                **fusing_as_json(batch_operators),
            },
            allowed_modules=self._allowed_modules,
            merge_always=merge_always,
        )
        atexit.register(self.close)

    @property
    def experiment_dir(self) -> Path:
        """Where the journal, weights and logs are; `cgo.open_experiment` reads it."""
        return self._store.folder

    @property
    def reports(self) -> Sequence[MergeReport]:
        """What merging did, one report a trial planned so far."""
        return tuple(self._scheduler.reports)

    def submit_models(self, *models: Model) -> None:
        """Queue models for training; see `AbstractExecutionEngine`."""
        with self._lock:
            self._check(models)
            self._store.add_models(models)
            self._scheduler.submit(models)
            for model in models:
                self._models[model.model_id] = model

    def _check(self, models: Sequence[Model]) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed; submit to a new one")
        seen: dict[ModelId, Model] = {}
        for model in models:
            if not isinstance(model, Model):
                raise SpecError(f"submit_models: expected a Model, got {type(model).__name__}")
            if model in (self._models.get(model.model_id), seen.get(model.model_id)):
                raise DuplicateModelError(
                    f"model {model.model_id!r} was submitted before; to train it again, make "
                    "another Model (equal ones are trained once and reported for both)"
                )
            if model.model_id in self._models or model.model_id in seen:
                raise DuplicateModelError(
                    f"model id {model.model_id!r} was submitted before, for another model; give "
                    "each model its own id"
                )
            self._check_earlier(model)
            self._check_modules(model)
            seen[model.model_id] = model
        self._check_budget(len(models))

    def _check_earlier(self, model: Model) -> None:
        """An id of an earlier session may be submitted again, for the same model."""
        earlier = self._earlier.get(model.model_id)
        if earlier is not None and (earlier != spec_of(model) or not isinstance(model.module, str)):
            raise DuplicateModelError(
                f"model id {model.model_id!r} stands for another model in experiment "
                f"{self.experiment_dir}; give this one another id"
            )

    def _check_modules(self, model: Model) -> None:
        """Refuse at once what a trial would fail the model for: a name that it may not import."""
        if self._allowed_modules is None:
            return
        for field, path in _named(model):
            module = path.partition(":")[0]
            if not is_allowed(module, self._allowed_modules):
                why = refusal(path, module, self._allowed_modules)
                raise SpecError(f"submit_models: model {model.model_id!r}: {field}: {why}")

    def _check_budget(self, more: int) -> None:
        if self._max_models is not None and len(self._models) + more > self._max_models:
            raise BudgetExhaustedError(
                f"max_models is {self._max_models}: {len(self._models)} were submitted and {more} "
                "more do not fit"
            )
        if self._out_of_time():
            raise BudgetExhaustedError(f"max_duration_s ({self._max_duration_s:g} s) has passed")

    def _out_of_time(self) -> bool:
        spent = time.monotonic() - self._started
        return self._max_duration_s is not None and spent >= self._max_duration_s

    def budget_exhausted(self) -> bool:
        """Whether `max_models` have been submitted or `max_duration_s` have passed."""
        full = self._max_models is not None and len(self._models) >= self._max_models
        return full or self._out_of_time()

    def wait_models(self, *models: Model, timeout_s: float | None = None) -> None:
        """Block until the models have ended; see `AbstractExecutionEngine`."""
        with self._lock:
            ids = [model.model_id for model in models] or list(self._models)
            unknown = [id_ for id_ in ids if id_ not in self._models]
        if unknown:
            raise SpecError(f"wait_models: not submitted to this engine: {', '.join(unknown)}")
        try:
            if self._scheduler.wait(ids, timeout_s):
                return
        except KeyboardInterrupt:
            self._scheduler.cancel_all()
            self._scheduler.wait(ids, _CANCELLING_S)
            raise
        left = [id_ for id_ in ids if not self._models[id_].status.ended]
        raise WaitTimeoutError(
            f"{len(left)} of {len(ids)} models had not ended after {timeout_s:g} s "
            f"({', '.join(left[:5])}{', ...' if len(left) > 5 else ''}); they train on"
        )

    def cancel_models(self, *models: Model) -> None:
        """Cancel models, and return before they have ended; `wait_models` waits for that.

        Those that wait are dropped. Those that train are stopped at their next step, and keep the
        history that they have by then; what trains beside them goes on. Of those that have ended,
        nothing changes. A model that equals another one is trained on as long as that is wanted.
        On a platform without a channel into its trials, such as NNI's, nothing more is told of a
        model that trains, and its trial ends with the last of its models.

        Args:
            models: Submitted models, or copies of them.

        Raises:
            SpecError: a model was not submitted to this engine; none is cancelled.

        Example:
            >>> import cgo
            >>> data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
            >>> models = [cgo.Model("cgo.zoo:mlp", {"widths": [w]}, data=data,
            ...                     training=cgo.TrainingSpec(metrics=("accuracy",), epochs=epochs))
            ...           for w, epochs in ((16, 1), (32, 100_000))]
            >>> with cgo.CGOEngine() as engine:
            ...     engine.submit_models(*models)
            ...     engine.wait_models(models[0])
            ...     engine.cancel_models(models[1])
            ...     engine.wait_models()
            >>> [model.status.value for model in models]
            ['trained', 'cancelled']
        """
        for model in models:
            if not isinstance(model, Model):
                raise SpecError(f"cancel_models: expected a Model, got {type(model).__name__}")
        with self._lock:
            found = [self._models[m.model_id] for m in models if m.model_id in self._models]
            unknown = [m.model_id for m in models if m.model_id not in self._models]
        if unknown:
            raise SpecError(f"cancel_models: not submitted to this engine: {', '.join(unknown)}")
        self._scheduler.cancel(found)

    def list_models(self, *statuses: ModelStatus) -> list[Model]:
        """Copies of the submitted models, in order; of the given statuses if any are."""
        with self._lock:
            models = list(self._models.values())
        return [model.copy() for model in models if not statuses or model.status in statuses]

    def query_available_resource(self) -> list[WorkerInfo]:
        """The idle workers."""
        return list(self._platform.idle_workers())

    def register_graph_listener(self, listener: AbstractGraphListener) -> None:
        """Call `listener` for every event from now on."""
        if not isinstance(listener, AbstractGraphListener):
            raise SpecError(f"expected an AbstractGraphListener, got {type(listener).__name__}")
        self._scheduler.register(listener)

    @classmethod
    def trial_execute_graph(cls, graph_data: GraphData | None = None) -> Mapping[ModelId, float]:
        """Inside a trial: train the document's models and return every model's final metric."""
        from cgo.trial import execute

        return execute(graph_data)

    def close(self) -> None:
        """Cancel what is not finished and free everything; safe to call again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._scheduler.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _import_roots(self, models: Sequence[Model]) -> tuple[str, ...]:
        """Where a trial finds what its models name: never through the current directory."""
        roots = (*self._import_paths, *import_roots(sorted(self._modules(models))))
        return tuple(dict.fromkeys((*roots, *_script_folder())))

    def _modules(self, models: Sequence[Model]) -> frozenset[str]:
        """The modules that models name."""
        paths = (path for model in models for _, path in _named(model))
        return frozenset(path.partition(":")[0] for path in paths)


class CGOEngine(_Engine):
    """Merges the models it is given: one graph, one process, one loader for all that share data.

    Example:
        >>> import cgo
        >>> data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
        >>> training = cgo.TrainingSpec(metrics=("accuracy",), epochs=1)
        >>> models = [cgo.Model("cgo.zoo:mlp", {"widths": [w]}, data=data, training=training)
        ...           for w in (16, 32)]
        >>> with cgo.CGOEngine() as engine:
        ...     engine.submit_models(*models)
        ...     engine.wait_models()
        >>> [model.status.value for model in models]
        ['trained', 'trained']
    """

    _merge = True


class BaseExecutionEngine(_Engine):
    """Trains each model in a trial of its own: the baseline, and a base for other engines."""

    _merge = False


def refuse_inside_trial(name: str) -> None:
    """See that this process may have an engine.

    Raises:
        NestedEngineError: it is a trial, or a worker of a loader; says which module made one.
    """
    data = sys.modules.get("torch.utils.data")
    worker = data is not None and data.get_worker_info() is not None
    if IN_TRIAL not in os.environ and not worker:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    raise NestedEngineError(
        f"a {name} was made inside {'a worker of a loader' if worker else 'a trial'}, by "
        f"{frame.f_code.co_filename}, line {frame.f_lineno}: a trial imports the modules that its "
        "models name, and this one runs a search when it is imported; put what submits models "
        'under `if __name__ == "__main__":`, or into another file'
    )


def _named(model: Model) -> list[tuple[str, str]]:
    """The import paths of a model, each with its field."""
    training = model.training
    fields = [
        ("module", model.module), ("source", model.data.source), ("augment", model.data.augment),
        ("loss", training.loss), ("optimizer", training.optimizer),
        ("scheduler", training.scheduler), *(("metrics", metric) for metric in training.metrics),
    ]  # fmt: skip
    return [(name, p) for name, p in fields if isinstance(p, str) and is_import_path(p)]


def _new_folder() -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Path("cgo-experiments") / name


def _script_folder() -> tuple[str, ...]:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return (os.path.dirname(os.path.abspath(file)),) if file else ()


_process_engine: _Engine | None = None
_process_lock = threading.Lock()


def get_execution_engine(**options: Any) -> AbstractExecutionEngine:
    """The process-wide engine, made on first use; for strategies that expect a singleton.

    Args:
        options: Arguments of `CGOEngine`, such as `platform`.

    Raises:
        SpecError: arguments were given, and the engine is there already.
    """
    global _process_engine
    with _process_lock:
        if _process_engine is None or _process_engine._closed:
            _process_engine = CGOEngine(**options)
        elif options:
            raise SpecError(
                f"get_execution_engine: the engine is there already, without {', '.join(options)}; "
                "give arguments in the first call, or close() it first"
            )
        return _process_engine
