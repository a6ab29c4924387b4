"""What both engines do: queue models, plan trials, follow them, and tell everyone.

Two threads. The planner takes queued models whenever a worker is idle, captures and merges them,
and starts a trial. The dispatcher takes everything that happens, in order, and is the only thread
that changes models and calls listeners.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgo.demultiplexer import Demultiplexer
from cgo.errors import CgoError, EngineClosedError
from cgo.events import Event
from cgo.graph import ModelId
from cgo.interface import AbstractGraphListener
from cgo.model import Model
from cgo.passes.batch_operators import BatchOperators
from cgo.planner import MergeReport, Planner
from cgo.platforms.base import Platform, TrialExit, TrialId, TrialRequest
from cgo.runtime.accelerator import FILLED
from cgo.store import Store

log = logging.getLogger(__name__)

#: The trial under which events stand that no trial sent: failures of planning, cancellations.
NO_TRIAL = "-"
NEVER_TRAINED = "cancelled before it was trained"


@dataclass
class _Batch:
    models: list[Model]
    alone: bool = False  # trained in a trial of its own
    company: Sequence[Model] = ()  # of a share: the models of all shares


@dataclass
class _Trial:
    request: TrialRequest
    models: list[Model]  # without aliases
    alone: bool
    restarts: int = 0


#: A trial of fewer models is not worth a process of its own.
_LEAST_SHARE = 4


class Scheduler:
    """Runs submitted models on a platform.

    Args:
        store: The experiment's journal.
        platform: Where trials run.
        merge: Whether models share trials; without it each has its own.
        batch_operators: Which operators of different models may be fused; None: none.
        import_roots: Folders for the trial's module path, from the models it trains.
        experiment: JSON settings that trials can read.
        allowed_modules: What trials may import for their documents; None: whatever these name.
    """

    def __init__(
        self,
        store: Store,
        platform: Platform,
        *,
        merge: bool,
        batch_operators: BatchOperators | None,
        import_roots: Callable[[Sequence[Model]], tuple[str, ...]],
        experiment: Mapping[str, Any],
        allowed_modules: tuple[str, ...] | None = None,
    ) -> None:
        self._allowed_modules = allowed_modules
        self.reports: list[MergeReport] = []
        self._experiment = experiment
        self._store, self._platform, self._merge = store, platform, merge
        self._import_roots = import_roots
        self._planner = Planner(merge, batch_operators)
        self._demultiplexer = Demultiplexer(store.record, store.load_state)
        self._submitted: deque[_Batch] = deque()  # not looked up yet
        self._queue: deque[_Batch] = deque()  # to be planned
        self._restarts: deque[_Trial] = deque()
        self._trials: dict[TrialId, _Trial] = {}
        self._closing = False
        self._cancelled = False
        self._wake = threading.Condition()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        platform.start(
            lambda trial, event: self._inbox.put(lambda: self._dispatch(trial, event)),
            lambda ended: self._inbox.put(lambda: self._trial_ended(ended)),
        )
        self._dispatcher = self._thread(self._run_dispatcher, "cgo-dispatcher")
        self._planning = self._thread(self._run_planner, "cgo-planner")

    @staticmethod
    def _thread(target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    # --- called by the engine -----------------------------------------------------------------

    def register(self, listener: AbstractGraphListener) -> None:
        """Call a listener from now on."""
        self._demultiplexer.register(listener)

    def submit(self, models: Sequence[Model]) -> None:
        """Queue models; those of one call stay together."""
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is closed; submit to a new one")
            self._cancelled = False
            for model in models:
                self._demultiplexer.add(model)
            batches = [_Batch(list(models))] if self._merge else [_Batch([m]) for m in models]
            self._submitted.extend(batches)
            self._wake.notify_all()

    def wait(self, ids: Iterable[ModelId], timeout_s: float | None) -> bool:
        """Block until the models have ended; False when the time ran out."""
        if threading.current_thread() is self._dispatcher:
            raise CgoError(
                "wait_models was called from a listener, whose return it would wait for; wait in "
                "another thread"
            )
        return self._demultiplexer.wait(ids, timeout_s)

    def cancel_all(self) -> None:
        """Drop what is queued and stop what runs; what was reported stays."""
        with self._wake:
            self._cancelled = True
            waiting = (*self._submitted, *self._queue)
            dropped = [model for batch in waiting for model in batch.models]
            self._submitted.clear()
            self._queue.clear()
            dropped += [model for trial in self._restarts for model in trial.models]
            self._restarts.clear()
            running = list(self._trials)
        self._end_all(dropped, NEVER_TRAINED, cancelled=True)
        for trial_id in running:
            self._platform.cancel(trial_id)

    def close(self) -> None:
        """Cancel everything and wait until all threads and processes are gone."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify_all()
        self.cancel_all()
        self._join(self._planning)
        self._platform.close()
        self._inbox.put(None)
        self._join(self._dispatcher)

    @staticmethod
    def _join(thread: threading.Thread) -> None:
        if thread is not threading.current_thread():
            thread.join()

    # --- dispatcher thread ----------------------------------------------------------------------

    def _run_dispatcher(self) -> None:
        while (action := self._inbox.get()) is not None:
            try:
                action()
            except Exception:
                log.exception("an event could not be handled")

    def _dispatch(self, trial_id: TrialId, event: Event) -> None:
        self._demultiplexer.dispatch(trial_id, event)

    def _trial_ended(self, ended: TrialExit) -> None:
        with self._wake:
            trial = self._trials.pop(ended.trial_id)
            self._wake.notify_all()
        unfinished = [m for m in trial.models if not self._demultiplexer.ended(m.model_id)]
        if not unfinished:
            return
        if ended.cancelled or self._closing or self._cancelled:
            self._finish(unfinished, "cancelled while it was trained", cancelled=True)
        elif ended.error is None:
            error = f"trial {ended.trial_id} ended without a result for this model"
            self._finish(unfinished, error)
        else:
            self._after_crash(trial, unfinished, ended.error)

    def _after_crash(self, trial: _Trial, unfinished: list[Model], error: str) -> None:
        """Go on from the checkpoint once; then train each model apart, to find the one at fault."""
        log.warning("%s", error)
        with self._wake:
            if trial.restarts == 0:
                trial.restarts, trial.models = 1, unfinished
                self._restarts.append(trial)
            elif len(unfinished) > 1:
                self._queue.extend(_Batch([model], alone=True) for model in unfinished)
            else:
                self._finish(unfinished, error)
            self._wake.notify_all()

    def _finish(self, models: Iterable[Model], error: str, *, cancelled: bool = False) -> None:
        value = {"success": False, "error": error, "weights": None, "sha256": None}
        for model in models:
            ended = Event(model.model_id, "ended", None, value | {"cancelled": cancelled})
            if not self._demultiplexer.ended(model.model_id):
                self._demultiplexer.dispatch(NO_TRIAL, ended)

    def _end_all(self, models: Sequence[Model], error: str, *, cancelled: bool = False) -> None:
        """From another thread: let the dispatcher end these models."""
        self._inbox.put(lambda: self._finish(models, error, cancelled=cancelled))

    # --- planner thread -------------------------------------------------------------------------

    def _run_planner(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._closing:
                    return
                work, handle = self._next()
            try:
                handle(work)
            except Exception as error:
                self._planning_failed(work, error)

    def _has_work(self) -> bool:
        if self._closing or self._submitted:
            return True
        return bool(self._queue or self._restarts) and self._platform.has_idle_worker()

    def _next(self) -> tuple[Any, Callable[[Any], None]]:
        """What to do now, and how: look results up before a worker is needed."""
        if self._submitted:
            return self._submitted.popleft(), self._look_up
        if self._restarts:
            return self._restarts.popleft(), self._launch
        batch = self._queue.popleft()
        if self._merge and not batch.alone:
            while self._queue and not self._queue[0].alone:
                batch.models += self._queue.popleft().models
            batch = self._share(batch)
        return batch, self._plan

    def _share(self, batch: _Batch) -> _Batch:
        """One idle worker's share of a batch; the rest is queued again, for the others.

        Every n-th model, so that each worker gets some of every family.
        """
        shares = len(batch.models) // _LEAST_SHARE
        workers = min(shares, len(self._platform.idle_workers())) if shares > 1 else 1
        if workers < 2:
            return batch
        mine = batch.models[::workers]
        own = {id(model) for model in mine}
        self._queue.appendleft(_Batch([m for m in batch.models if id(m) not in own]))
        return _Batch(mine, company=batch.models)

    def _look_up(self, batch: _Batch) -> None:
        """Tell stored results at once, and queue the models that have none."""
        batch.models = [model for model in batch.models if not self._known(model)]
        with self._wake:
            stopped = self._closing or self._cancelled
            if batch.models and not stopped:
                self._queue.append(batch)
        if stopped:
            self._end_all(batch.models, NEVER_TRAINED, cancelled=True)

    def _planning_failed(self, work: _Batch | _Trial, error: Exception) -> None:
        log.exception("planning failed")
        text = str(error) if isinstance(error, CgoError) else traceback.format_exc()
        self._end_all(work.models, f"the trial could not be planned: {text}")

    def _plan(self, batch: _Batch) -> None:
        # All of them first: trials that run already would take the cores from what is captured.
        self._planner.capture(batch.company)
        fresh = batch.models = self._fitting(batch)
        trial_id = self._store.next_trial_id()
        folder = self._store.trial_folder(trial_id)
        plan = self._planner.plan(fresh, folder, {**self._experiment, "trial_id": trial_id})
        for model in fresh:
            if (failure := plan.failures.get(model.model_id)) is not None:
                self._end_all([model], failure)
        self.reports.append(plan.report)
        if plan.graph_data is None:
            return
        self._store.add_trial(trial_id, [m.model_id for m in fresh], plan.report.as_json())
        for alias, twin in plan.graph_data.aliases.items():
            self._demultiplexer.alias(alias, twin)
        trained = {entry.id for entry in plan.graph_data.models}
        models = [model for model in fresh if model.model_id in trained]
        roots = self._import_roots(fresh)
        request = TrialRequest(trial_id, Path(folder), roots, self._allowed_modules)
        self._launch(_Trial(request, models, batch.alone))

    def _fitting(self, batch: _Batch) -> list[Model]:
        """The models that fit into a worker's memory; the rest of a batch is queued again."""
        workers = self._platform.idle_workers()
        free = workers[0].free_memory_bytes if workers else 0
        if not free:  # a platform that does not know
            return batch.models
        fitting = self._planner.fitting(batch.models, FILLED * free)
        if rest := batch.models[len(fitting) :]:
            log.info("%d of %d models fit into memory at once", len(fitting), len(batch.models))
            with self._wake:
                self._queue.appendleft(_Batch(rest, company=batch.company))
        return fitting

    def _known(self, model: Model) -> bool:
        """Tell a stored result at once, if there is one."""
        content = self._planner.content(model)
        self._store.set_content(model.model_id, content)
        found = self._store.find_result(content)
        if found is None:
            return False

        def replay() -> None:
            for trial_id, event in found:
                copied = Event(model.model_id, event.kind, event.epoch, event.value)
                self._demultiplexer.dispatch(trial_id, copied)

        self._inbox.put(replay)
        return True

    def _launch(self, trial: _Trial) -> None:
        with self._wake:
            stopped = self._closing or self._cancelled
            if not stopped:
                self._trials[trial.request.trial_id] = trial
        if stopped:
            self._end_all(trial.models, NEVER_TRAINED, cancelled=True)
            return
        try:
            self._platform.submit(trial.request)
        except Exception:
            with self._wake:
                self._trials.pop(trial.request.trial_id, None)
            raise
        if self._closing or self._cancelled:  # came while the process was being started
            self._platform.cancel(trial.request.trial_id)
