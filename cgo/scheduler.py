"""What both engines do: queue models, plan trials, follow them, and tell everyone.

Two threads. The planner takes queued models whenever a worker is idle, captures and merges them,
and starts a trial. The dispatcher takes everything that happens, in order, and is the only thread
that changes models and calls listeners.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cgo.demultiplexer import Demultiplexer
from cgo.division import take_part
from cgo.errors import CgoError, EngineClosedError
from cgo.events import Event
from cgo.graph import ModelId
from cgo.graph_data import file_sha256
from cgo.interface import AbstractGraphListener
from cgo.model import Model
from cgo.passes.batch_operators import BatchOperators
from cgo.planner import Planner
from cgo.platforms.base import Platform, TrialExit, TrialId, TrialRequest
from cgo.report import MergeReport
from cgo.runtime import checkpoint
from cgo.runtime.accelerator import FILLED
from cgo.store import Store
from cgo.user_code import contained, told, where

log = logging.getLogger(__name__)

#: The trial under which events stand that no trial sent: failures of planning, cancellations.
NO_TRIAL = "-"
NEVER_TRAINED = "cancelled before it was trained"


#: Seconds that `close` gives a thread which is in user code before it is left behind.
PATIENCE_S = 5.0


@dataclass
class _Batch:
    models: list[Model]
    company: Sequence[Model] = ()  # of a share: the models of all shares
    apart: bool = False  # could not be planned with others, and is joined with none


@dataclass
class _Part:
    """Some models of a trial that crashed, which go on in a trial of their own."""

    whole: TrialRequest
    models: list[Model]
    other: _Part | None = None  # the other half
    passed: bool = False  # its trial ran to its end
    probe: bool = False  # a trial of no models: can there be any?


@dataclass
class _Trial:
    request: TrialRequest
    models: list[Model]  # without aliases
    part: _Part | None = None
    restarts: int = 0
    done: list[ModelId] = field(default_factory=list)  # models that ended before it crashed
    spoke: bool = False  # it told something
    cancels: int = 0  # how often everything had been cancelled when it began


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
        self._planner = Planner(merge, batch_operators, import_roots)
        self._demultiplexer = Demultiplexer(store.record, store.load_state)
        self._submitted: deque[_Batch] = deque()  # not looked up yet
        self._queue: deque[_Batch] = deque()  # to be planned
        self._crashed: deque[_Trial | _Part] = deque()  # to go on
        self._in_hand: list[Model] = []  # the planner's, at the moment
        self._taken_at = 0  # what `_cancels` was when it took them
        self._trials: dict[TrialId, _Trial] = {}
        self._closing = False
        self._cancels = 0
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
        """Drop what is queued or planned and stop what runs; what was reported stays."""
        with self._wake:
            self._cancels += 1
            waiting = (*self._submitted, *self._queue, *self._crashed)
            dropped = [*self._in_hand, *(model for batch in waiting for model in batch.models)]
            for queued in (self._submitted, self._queue, self._crashed):
                queued.clear()
            running = list(self._trials)
        self._end_all(dropped, NEVER_TRAINED, cancelled=True)
        for trial_id in running:
            self._platform.cancel(trial_id)

    def close(self) -> None:
        """Cancel everything and wait until all threads and processes are gone.

        A thread that is in user code (an import, a factory, a listener) for longer than
        `PATIENCE_S` is left behind, which is said aloud: it ends with the process.
        """
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify_all()
        self._planner.stop()
        self.cancel_all()
        self._join(self._planning)
        self._platform.close()
        self._inbox.put(None)
        self._join(self._dispatcher)

    @staticmethod
    def _join(thread: threading.Thread) -> None:
        if thread is threading.current_thread():
            return
        thread.join(PATIENCE_S)
        if thread.is_alive():
            frame = sys._current_frames().get(thread.ident or 0)
            stack = traceback.extract_stack(frame) if frame is not None else []
            place = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "?"
            log.warning(
                "%s is still at %s after %g s; it is left behind", thread.name, place, PATIENCE_S
            )

    # --- dispatcher thread ----------------------------------------------------------------------

    def _run_dispatcher(self) -> None:
        while (action := self._inbox.get()) is not None:
            try:
                with contained:
                    action()
            except Exception:
                log.exception("an event could not be handled")

    def _dispatch(self, trial_id: TrialId, event: Event) -> None:
        if (trial := self._trials.get(trial_id)) is not None:
            trial.spoke = True
        self._demultiplexer.dispatch(trial_id, event)

    def _trial_ended(self, ended: TrialExit) -> None:
        with self._wake:
            trial = self._trials.pop(ended.trial_id)
            unfinished = [m for m in trial.models if not self._demultiplexer.ended(m.model_id)]
            if trial.part is not None and not unfinished:
                trial.part.passed = True  # before the planner comes to the other half
            self._wake.notify_all()
        if not unfinished:
            return
        if ended.cancelled or self._closing or trial.cancels != self._cancels:
            self._finish(unfinished, "cancelled while it was trained", cancelled=True)
        elif trial.part is not None and trial.part.probe:
            self._after_probe(trial, unfinished, ended.error)
        else:
            error = ended.error or f"trial {ended.trial_id} ended before its models had"
            self._after_crash(trial, unfinished, error)

    def _after_crash(self, trial: _Trial, unfinished: list[Model], error: str) -> None:
        """Go on from the checkpoint once; after that in halves, until the one at fault is alone.

        One that has not told a thing may have crashed for the machine's sake: where no trial can
        run, there is no model to look for.
        """
        log.warning("%s", error)
        with self._wake:
            first = trial.part is None and trial.restarts == 0
            if first and not trial.spoke and len(unfinished) > 1:
                self._crashed.append(_Part(trial.request, unfinished, probe=True))
            elif first:
                waiting = {id(model) for model in unfinished}
                trial.done = [m.model_id for m in trial.models if id(m) not in waiting]
                trial.restarts, trial.models = 1, unfinished
                self._crashed.append(trial)
            elif len(unfinished) > 1:
                self._crashed.extend(_halves(trial.request, unfinished))
            else:
                self._finish(unfinished, f"model {unfinished[0].model_id!r}: {error}")
            self._wake.notify_all()

    def _after_probe(self, trial: _Trial, waiting: list[Model], error: str | None) -> None:
        """Look for the model at fault, or tell all that nothing can be trained here."""
        assert trial.part is not None
        if error is not None:
            self._finish(waiting, f"not even a trial of no models runs here: {error}")
            return
        with self._wake:
            self._crashed.extend(_halves(trial.part.whole, waiting))
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
                self._in_hand, self._taken_at = list(work.models), self._cancels
            try:
                with contained:
                    handle(work)
            except Exception as error:
                self._planning_failed(work, error)
            with self._wake:
                self._in_hand = []

    def _has_work(self) -> bool:
        if self._closing or self._submitted:
            return True
        return bool(self._queue or self._crashed) and self._platform.has_idle_worker()

    def _stopped(self) -> bool:
        """Whether what the planner has in hand was cancelled, and so has been told to be."""
        return self._closing or self._taken_at != self._cancels

    def _next(self) -> tuple[Any, Callable[[Any], None]]:
        """What to do now, and how: look results up before a worker is needed."""
        if self._submitted:
            return self._submitted.popleft(), self._look_up
        if self._crashed:
            found = self._crashed.popleft()
            return found, self._restart if isinstance(found, _Trial) else self._start_part
        batch = self._queue.popleft()
        if self._merge and not batch.apart:
            while self._queue and not self._queue[0].apart:
                batch.models += self._queue.popleft().models
        return batch, self._plan

    def _share(self, batch: _Batch) -> _Batch:
        """One idle worker's share of a batch; the rest is queued again, for the others.

        Every n-th model, so that each worker gets some of every family.
        """
        if not self._merge or batch.apart:
            return batch
        shares = len(batch.models) // _LEAST_SHARE
        workers = min(shares, len(self._platform.idle_workers())) if shares > 1 else 1
        if workers < 2:
            return batch
        mine = batch.models[::workers]
        own = {id(model) for model in mine}
        self._put_back(_Batch([m for m in batch.models if id(m) not in own]))
        return _Batch(mine, company=batch.models)

    def _put_back(self, *batches: _Batch) -> None:
        """Queue again, as the next, what is not planned now; unless it was cancelled meanwhile."""
        with self._wake:
            if not self._stopped():
                self._queue.extendleft(reversed(batches))
                later = {id(model) for batch in batches for model in batch.models}
                self._in_hand = [model for model in self._in_hand if id(model) not in later]

    def _look_up(self, batch: _Batch) -> None:
        """Tell stored results at once, and queue the models that have none."""
        batch.models = [model for model in batch.models if not self._known(model)]
        with self._wake:
            if batch.models and not self._stopped():
                self._queue.append(batch)

    def _planning_failed(self, work: _Batch | _Part | _Trial, error: Exception) -> None:
        """Find the model at fault, by planning the halves of a batch apart."""
        if self._stopped():
            return
        models = work.models
        if isinstance(work, _Batch) and len(models) > 1:
            log.info("%d models cannot be planned together: %s", len(models), told(error))
            half = len(models) // 2
            self._put_back(_Batch(models[:half], apart=True), _Batch(models[half:], apart=True))
            return
        log.error("planning failed", exc_info=error)
        text = str(error) if isinstance(error, CgoError) else f"{told(error)} ({where(error)})"
        for model in models:
            named = f"model {model.model_id!r} could not be planned: {text}"
            self._end_all([model], named)

    def _plan(self, batch: _Batch) -> None:
        share = self._share(batch)
        batch.models, batch.company = share.models, share.company or batch.company
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
        trained = {entry.id for entry in plan.graph_data.models}
        models = [model for model in fresh if model.model_id in trained]
        roots = self._import_roots(fresh)
        vouched = file_sha256(Path(folder) / "graph.json")
        request = TrialRequest(trial_id, Path(folder), roots, self._allowed_modules, vouched)
        self._store.add_trial(trial_id, [m.model_id for m in fresh], plan.report.as_json())
        for alias, twin in plan.graph_data.aliases.items():
            self._demultiplexer.alias(alias, twin)
        self._launch(_Trial(request, models))

    def _fitting(self, batch: _Batch) -> list[Model]:
        """The models that fit into a worker's memory; the rest of a batch is queued again."""
        workers = self._platform.idle_workers()
        free = workers[0].free_memory_bytes if workers else 0
        if not free:  # a platform that does not know
            return batch.models
        fitting = self._planner.fitting(batch.models, FILLED * free)
        if rest := batch.models[len(fitting) :]:
            log.info("%d of %d models fit into memory at once", len(fitting), len(batch.models))
            self._put_back(_Batch(rest, company=batch.company, apart=batch.apart))
        return fitting

    def _known(self, model: Model) -> bool:
        """Tell a stored result at once, if there is one."""
        try:
            with contained:
                content = self._planner.content(model)
        except Exception as error:
            text = f"telling what it is raised {told(error)} ({where(error)})"
            self._end_all([model], f"model {model.model_id!r}: {text}")
            return True
        try:
            self._store.set_content(model.model_id, content)
            found = self._store.find_result(content)
        except Exception as error:  # it is trained instead
            log.warning("results of %r cannot be looked up: %s", model.model_id, told(error))
            return False
        if found is None:
            return False

        def replay() -> None:
            for trial_id, event in found:
                copied = Event(model.model_id, event.kind, event.epoch, event.value)
                self._demultiplexer.dispatch(trial_id, copied)

        self._inbox.put(replay)
        return True

    def _restart(self, trial: _Trial) -> None:
        """Let a trial go on from its checkpoint, or begin again without one."""
        checkpoint.end(trial.request.folder, trial.done)
        self._launch(trial)

    def _start_part(self, part: _Part) -> None:
        """Start a half of a trial; one whose other half has passed is known to crash."""
        if part.other is not None and part.other.passed and len(part.models) > 1:
            with self._wake:
                if not self._stopped():
                    self._crashed.extendleft(reversed(_halves(part.whole, part.models)))
                    self._in_hand = []
            return
        trial_id = self._store.next_trial_id()
        folder = Path(self._store.trial_folder(trial_id))
        ids = [] if part.probe else [model.model_id for model in part.models]
        document = take_part(part.whole.folder, folder, ids, trial_id)
        report = {"models": len(ids), "part_of": part.whole.trial_id}
        self._store.add_trial(trial_id, [*ids, *document.aliases], report)
        request = replace(part.whole, trial_id=trial_id, folder=folder, vouched=None)
        self._launch(_Trial(request, part.models, part))

    def _launch(self, trial: _Trial) -> None:
        """Run a trial, unless it was cancelled by now."""
        trial_id, trial.cancels = trial.request.trial_id, self._taken_at
        with self._wake:
            if self._stopped():
                return
            self._trials[trial_id] = trial
            self._in_hand = []
        try:
            self._platform.submit(trial.request)
        except Exception as error:
            log.error("trial %s could not be started", trial_id, exc_info=error)
            with self._wake:
                self._trials.pop(trial_id, None)
            text = f"trial {trial_id} could not be started: {told(error)}"
            self._end_all(trial.models, text, cancelled=self._stopped())
            return
        if self._stopped():  # came while the process was being started
            self._platform.cancel(trial_id)


def _halves(whole: TrialRequest, models: Sequence[Model]) -> tuple[_Part, _Part]:
    half = len(models) // 2
    first, second = _Part(whole, list(models[:half])), _Part(whole, list(models[half:]))
    first.other, second.other = second, first
    return first, second
