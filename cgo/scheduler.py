"""What both engines do: queue models, plan trials, follow them, and tell everyone.

Two threads. The planner takes queued models whenever a worker is idle, captures and merges them,
and starts a trial; where none is idle and the platform has a channel into its trials, it adds them
to one that runs. The dispatcher takes everything that happens, in order, and is the only thread
that changes models and calls listeners.
"""

from __future__ import annotations

import logging
import queue
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cgo.commands import Command
from cgo.demultiplexer import Demultiplexer
from cgo.division import take_part
from cgo.errors import CgoError, EngineClosedError
from cgo.events import Event
from cgo.graph import ModelId
from cgo.graph_data import GraphData, file_sha256
from cgo.hosts import Hosts
from cgo.imports import libraries_of
from cgo.interface import AbstractGraphListener
from cgo.model import Model, ModelStatus
from cgo.passes.batch_operators import BatchOperators
from cgo.planner import Planner
from cgo.platforms.base import Expecting, Platform, TrialExit, TrialId, TrialRequest
from cgo.queued import Batch, Part, Trial, halves
from cgo.report import MergeReport
from cgo.runtime import checkpoint
from cgo.runtime.accelerator import FILLED
from cgo.runtime.member import CANCELLED
from cgo.runtime.optimizers import FUSED_OPTIMIZERS
from cgo.store import Store
from cgo.user_code import contained, told, where

log = logging.getLogger(__name__)

#: The trial under which events stand that no trial sent: failures of planning, cancellations.
NO_TRIAL = "-"
NEVER_TRAINED = "cancelled before it was trained"


#: Seconds that `close` gives a thread which is in user code before it is left behind.
PATIENCE_S = 5.0


#: A trial of fewer models is not worth a process of its own.
_LEAST_SHARE = 4


#: Seconds after the engine's start in which workers get ready, whatever is done here.
_WARM_S = 2.5


class Scheduler:
    """Runs submitted models on a platform.

    Args:
        store: The experiment's journal.
        platform: Where trials run.
        merge: Whether models share trials; without it each has its own.
        batch_operators: Which operators of different models may be fused; None: none.
        import_roots: Folders for the trial's module path, from the models it trains.
        modules: Names of the modules that models name.
        experiment: JSON settings that trials can read.
        allowed_modules: What trials may import for their documents; None: whatever these name.
        merge_always: Merge what is not expected to repay it, too.
    """

    def __init__(
        self,
        store: Store,
        platform: Platform,
        *,
        merge: bool,
        batch_operators: BatchOperators | None,
        import_roots: Callable[[Sequence[Model]], tuple[str, ...]],
        modules: Callable[[Sequence[Model]], frozenset[str]],
        experiment: Mapping[str, Any],
        allowed_modules: tuple[str, ...] | None = None,
        merge_always: bool = False,
    ) -> None:
        self._allowed_modules = allowed_modules
        self._merge_always, self._last_device = merge_always, "cpu"
        self._began = time.monotonic()
        self.reports: list[MergeReport] = []
        self._experiment = experiment
        self._store, self._platform, self._merge = store, platform, merge
        self._import_roots, self._modules = import_roots, modules
        self._planner = Planner(merge, batch_operators, import_roots)
        self._demultiplexer = Demultiplexer(store.record, store.load_state)
        self._submitted: deque[Batch] = deque()  # not looked up yet
        self._queue: deque[Batch] = deque()  # to be planned
        self._crashed: deque[Trial | Part] = deque()  # to go on
        self._ready: deque[Trial] = deque()  # planned: for an idle worker, or to join another
        self._unwanted: set[ModelId] = set()  # cancelled one by one
        self._hosts = Hosts(platform, merge, self._demultiplexer.settled)
        if not self._hosts.reachable:
            log.info("%s cannot command trials that run: models wait for their end", platform)
        self._in_hand: list[Model] = []  # the planner's, at the moment
        self._taken_at = 0  # what `_cancels` was when it took them
        self._trials: dict[TrialId, Trial] = {}
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
            batches = [Batch(list(models))] if self._merge else [Batch([m]) for m in models]
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
            waiting = (*self._submitted, *self._queue, *self._crashed, *self._ready)
            dropped = [*self._in_hand, *(model for batch in waiting for model in batch.models)]
            for queued in (self._submitted, self._queue, self._crashed, self._ready):
                queued.clear()
            running = list(self._trials)
        self._finish_later(dropped, NEVER_TRAINED, cancelled=True)
        for trial_id in running:
            self._platform.cancel(trial_id)

    def cancel(self, models: Sequence[Model]) -> None:
        """Cancel some models: what waits is dropped, what trains is stopped, what ended stays.

        A model that equals another is trained as long as either is wanted.
        """
        with self._wake:
            models = [m for m in models if not self._demultiplexer.ended(m.model_id)]
            self._unwanted.update(model.model_id for model in models)
            running = {
                id_: (trial, model)
                for trial in self._trials.values()
                for model in trial.models
                for id_ in (model.model_id, *self._demultiplexer.aliases_of(model.model_id))
            }
            joining = [(t, m) for t in self._trials.values() if t.adding for m in t.adding.models]
        stops: dict[TrialId, set[ModelId]] = {}
        dropped: list[Model] = []
        for model in models:
            trial, twin = running.get(model.model_id, (None, model))
            if trial is None or self._needed(twin):
                dropped.append(model)
            else:
                stops.setdefault(trial.request.trial_id, set()).add(twin.model_id)
        for trial, model in joining:
            if not self._needed(model):
                stops.setdefault(trial.request.trial_id, set()).add(model.model_id)
        self._drop(dropped)
        for trial_id, ids in stops.items():
            self._stop(trial_id, ids)

    def _needed(self, model: Model) -> bool:
        """Whether somebody still wants a model, or one that gets its events."""
        ids = (model.model_id, *self._demultiplexer.aliases_of(model.model_id))
        return not self._unwanted.issuperset(ids)

    def _drop(self, models: Sequence[Model]) -> None:
        """From any thread: end these models as cancelled, and none that equals one of them."""
        for model in models:
            trained = model.status is ModelStatus.TRAINING
            ended = _cancelled(model, CANCELLED if trained else NEVER_TRAINED)
            self._inbox.put(partial(self._demultiplexer.end, NO_TRIAL, ended))

    def _stop(self, trial_id: TrialId, ids: set[ModelId]) -> None:
        """Tell a trial to end models; one that cannot be told ends when nobody needs any of it."""
        command = Command("stop", models=tuple(sorted(ids)))
        if self._hosts.tell(trial_id, command):
            return
        with self._wake:
            trial = self._trials.get(trial_id)
            if trial is None:  # its end is told by now
                return
            stopped = [model for model in trial.models if model.model_id in ids]
            needed = any(
                self._needed(model) and not self._demultiplexer.settled(model.model_id)
                for model in trial.models
            )
        self._finish_later(stopped, CANCELLED, cancelled=True)
        if not needed:
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
            if event.kind == "trial" and trial.adding is not None:
                self._answered(trial, event.value)
        self._demultiplexer.dispatch(trial_id, event)

    def _answered(self, trial: Trial, value: Mapping[str, Any]) -> None:
        """A trial was told to take further models, and may have said whether it does."""
        with self._wake:
            added = trial.adding
            if added is None or value.get("document") != str(added.request.document):
                return
            trial.adding = None
            if joined := value["what"] == "added":
                trial.models = [*trial.models, *added.models]
            else:
                trial.closed = added.apart = True
                self._ready.append(added)
            self._wake.notify_all()
        if joined:
            self._store.join_trial(trial.request.trial_id, added.ids, added.report)
            shutil.rmtree(added.request.folder, ignore_errors=True)

    def _trial_ended(self, ended: TrialExit) -> None:
        with self._wake:
            trial = self._trials.pop(ended.trial_id)
            unfinished = [m for m in trial.models if not self._demultiplexer.settled(m.model_id)]
            if trial.part is not None and not unfinished:
                trial.part.passed = True  # before the planner comes to the other half
            cancelled = ended.cancelled or self._closing or trial.cancels != self._cancels
            late, trial.adding = trial.adding, None
            if late is not None:  # it may have taken them, and not come to say so
                trial.done += [model.model_id for model in late.models]
                unfinished += late.models if cancelled else []
                self._ready.extendleft([] if cancelled else [late])
            self._wake.notify_all()
        if not cancelled:
            self._finish([m for m in unfinished if not self._needed(m)], CANCELLED, cancelled=True)
            unfinished = [model for model in unfinished if self._needed(model)]
        if not unfinished:
            return
        if cancelled:
            self._finish(unfinished, CANCELLED, cancelled=True)
        elif trial.part is not None and trial.part.probe:
            self._after_probe(trial, unfinished, ended.error)
        else:
            error = ended.error or f"trial {ended.trial_id} ended before its models had"
            self._after_crash(trial, unfinished, error)

    def _after_crash(self, trial: Trial, unfinished: list[Model], error: str) -> None:
        """Go on from the checkpoint once; after that in halves, until the one at fault is alone.

        One that has not told a thing may have crashed for the machine's sake: where no trial can
        run, there is no model to look for.
        """
        log.warning("%s", error)
        with self._wake:
            first = trial.part is None and trial.restarts == 0
            if first and not trial.spoke and len(unfinished) > 1:
                self._crashed.append(Part(trial.request, unfinished, probe=True))
            elif first:
                waiting = {id(model) for model in unfinished}
                trial.done += [m.model_id for m in trial.models if id(m) not in waiting]
                trial.restarts, trial.models = 1, unfinished
                self._crashed.append(trial)
            elif len(unfinished) > 1:
                self._crashed.extend(halves(trial.request, unfinished))
            else:
                self._finish(unfinished, f"model {unfinished[0].model_id!r}: {error}")
            self._wake.notify_all()

    def _after_probe(self, trial: Trial, waiting: list[Model], error: str | None) -> None:
        """Look for the model at fault, or tell all that nothing can be trained here."""
        assert trial.part is not None
        if error is not None:
            self._finish(waiting, f"not even a trial of no models runs here: {error}")
            return
        with self._wake:
            self._crashed.extend(halves(trial.part.whole, waiting))
            self._wake.notify_all()

    def _finish(self, models: Iterable[Model], error: str, *, cancelled: bool = False) -> None:
        value = {"success": False, "error": error, "weights": None, "sha256": None}
        for model in models:
            ended = Event(model.model_id, "ended", None, value | {"cancelled": cancelled})
            if not self._demultiplexer.settled(model.model_id):
                self._demultiplexer.dispatch(NO_TRIAL, ended)

    def _finish_later(
        self, models: Sequence[Model], error: str, *, cancelled: bool = False
    ) -> None:
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
        if not (self._queue or self._crashed or self._ready):
            return False
        if self._platform.has_idle_worker():
            return True
        joining = any(self._host(trial) is not None for trial in self._ready)
        return joining or (bool(self._open()) and any(batch.may_join for batch in self._queue))

    def _stopped(self) -> bool:
        """Whether what the planner has in hand was cancelled, and so has been told to be."""
        return self._closing or self._taken_at != self._cancels

    def _next(self) -> tuple[Any, Callable[[Any], None]]:
        """What to do now, and how: look results up before a worker is needed."""
        if self._submitted:
            return self._submitted.popleft(), self._look_up
        idle = self._platform.has_idle_worker()
        if self._crashed and idle:
            found = self._crashed.popleft()
            return found, self._restart if isinstance(found, Trial) else self._start_part
        for trial in self._ready:
            if idle or self._host(trial) is not None:
                self._ready.remove(trial)
                return trial, self._place
        return self._next_batch(idle), self._plan

    def _next_batch(self, idle: bool) -> Batch:
        """What to plan next, with what may be planned with it."""
        place = next((n for n, b in enumerate(self._queue) if idle or b.may_join), 0)
        batch = self._queue[place]
        del self._queue[place]
        if self._merge and not batch.apart:
            while place < len(self._queue):
                other = self._queue[place]
                if other.apart or not (idle or other.may_join):
                    break
                batch.models += other.models
                del self._queue[place]
        return batch

    def _share(self, batch: Batch) -> Batch:
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
        self._put_back(Batch([m for m in batch.models if id(m) not in own]))
        return Batch(mine, company=batch.models)

    def _put_back(self, *batches: Batch) -> None:
        """Queue again, as the next, what is not planned now; unless it was cancelled meanwhile."""
        with self._wake:
            if not self._stopped():
                self._queue.extendleft(reversed(batches))
                later = {id(model) for batch in batches for model in batch.models}
                self._in_hand = [model for model in self._in_hand if id(model) not in later]

    def _look_up(self, batch: Batch) -> None:
        """Tell stored results at once, and queue the models that have none."""
        batch.models = [m for m in batch.models if self._needed(m) and not self._known(m)]
        with self._wake:
            if batch.models and not self._stopped():
                self._queue.append(batch)

    def _planning_failed(self, work: Batch | Part | Trial, error: Exception) -> None:
        """Find the model at fault, by planning the halves of a batch apart."""
        if self._stopped():
            return
        models = work.models
        if isinstance(work, Batch) and len(models) > 1:
            log.info("%d models cannot be planned together: %s", len(models), told(error))
            half = len(models) // 2
            self._put_back(Batch(models[:half], apart=True), Batch(models[half:], apart=True))
            return
        log.error("planning failed", exc_info=error)
        text = str(error) if isinstance(error, CgoError) else f"{told(error)} ({where(error)})"
        for model in models:
            named = f"model {model.model_id!r} could not be planned: {text}"
            self._finish_later([model], named)

    def _plan(self, batch: Batch) -> None:
        batch.models = [model for model in batch.models if self._needed(model)]
        share = self._share(batch)
        batch.models, batch.company = share.models, share.company or batch.company
        if not self._merge_always:
            spare_s = max(0.0, _WARM_S - (time.monotonic() - self._began))
            self._planner.consider(batch.company or batch.models, self._device(), spare_s)
        self._expect(batch.company or batch.models)
        # All of them first: trials that run already would take the cores from what is captured.
        self._planner.capture(batch.company)
        batch.models = [model for model in batch.models if self._needed(model)]
        fresh = batch.models = self._fitting(batch)
        if not fresh:
            return
        trial_id = self._store.next_trial_id()
        folder = self._store.trial_folder(trial_id)
        plan = self._planner.plan(fresh, folder, {**self._experiment, "trial_id": trial_id})
        for model in fresh:
            if (failure := plan.failures.get(model.model_id)) is not None:
                self._finish_later([model], failure)
        self.reports.append(plan.report)
        if plan.graph_data is None:
            return
        trained = {entry.id for entry in plan.graph_data.models}
        models = [model for model in fresh if model.model_id in trained]
        request = self._request(trial_id, plan.graph_data, fresh)
        for alias, twin in plan.graph_data.aliases.items():
            self._demultiplexer.alias(alias, twin)
        ids, report = [model.model_id for model in fresh], plan.report.as_json()
        self._place(Trial(request, models, ids=ids, report=report, apart=not batch.may_join))

    def _expect(self, models: Sequence[Model]) -> None:
        """Tell the platform what trials of these models will import."""
        modules = self._modules(models)
        if isinstance(self._platform, Expecting) and (libraries := libraries_of(modules)):
            self._platform.expect(modules, libraries)

    def _request(
        self, trial_id: TrialId, document: GraphData, models: Sequence[Model]
    ) -> TrialRequest:
        """A trial of a document that was just written."""
        roots, modules = self._import_roots(models), self._modules(models)
        eager = any(
            entry.opaque is not None or entry.training.optimizer not in FUSED_OPTIMIZERS
            for entry in document.models
        )
        folder, limits = Path(self._store.trial_folder(trial_id)), self._allowed_modules
        request = TrialRequest(trial_id, folder, roots, limits, eager=eager, modules=modules)
        return replace(request, vouched=file_sha256(request.document))

    def _device(self) -> str:
        """Where trials run, or the last ones did: "cpu", or a GPU."""
        if workers := self._platform.idle_workers():
            self._last_device = workers[0].device
        return self._last_device

    def _place(self, trial: Trial) -> None:
        """Start a trial where a worker is idle, or add its models to one that runs."""
        needless = [model.model_id for model in trial.models if not self._needed(model)]
        if len(needless) == len(trial.models):
            shutil.rmtree(trial.request.folder, ignore_errors=True)
            return
        if self._platform.has_idle_worker():
            checkpoint.end(trial.request.folder, needless)
            self._store.add_trial(trial.request.trial_id, trial.ids, trial.report)
            self._launch(trial)
            return
        with self._wake:
            if self._stopped():
                return
            self._in_hand = []
            host = self._host(trial)
            if host is None:
                self._ready.append(trial)
                return
            host.adding = trial
        self._add(host, trial, needless)

    def _add(self, host: Trial, trial: Trial, needless: Sequence[ModelId]) -> None:
        """Tell a running trial to take the models of one that was planned."""
        models = tuple(model.model_id for model in trial.models)
        command, host_id = (
            Command("add", str(trial.request.document), models, trial.request.vouched or ""),
            host.request.trial_id,
        )
        log.info("%d models are added to trial %s", len(models), host_id)
        if self._hosts.tell(host_id, command):
            if needless:
                self._hosts.tell(host_id, Command("stop", models=tuple(needless)))
            return
        with self._wake:
            host.closed = True
            if host.adding is trial:  # else its end has been told
                host.adding = None
                self._ready.append(trial)

    def _open(self) -> list[Trial]:
        """Trials that may be told to take further models; locked."""
        return self._hosts.open(self._trials.values(), self._cancels)

    def _host(self, trial: Trial) -> Trial | None:
        return self._hosts.host(trial, self._open())

    def _fitting(self, batch: Batch) -> list[Model]:
        """The models that fit into a worker's memory; the rest of a batch is queued again."""
        with self._wake:
            found = self._open()
        free = self._hosts.free_bytes(found)
        if not free:  # a platform that does not know
            return batch.models
        fitting = self._planner.fitting(batch.models, FILLED * free)
        if rest := batch.models[len(fitting) :]:
            log.info("%d of %d models fit into memory at once", len(fitting), len(batch.models))
            self._put_back(Batch(rest, company=batch.company, apart=batch.apart, waits=True))
        return fitting

    def _known(self, model: Model) -> bool:
        """Tell a stored result at once, if there is one."""
        try:
            with contained:
                content = self._planner.content(model)
        except Exception as error:
            text = f"telling what it is raised {told(error)} ({where(error)})"
            self._finish_later([model], f"model {model.model_id!r}: {text}")
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

    def _restart(self, trial: Trial) -> None:
        """Let a trial go on from its checkpoint, or begin again without one."""
        trial.done += [model.model_id for model in trial.models if not self._needed(model)]
        trial.models = [model for model in trial.models if self._needed(model)]
        if trial.models:
            checkpoint.end(trial.request.folder, trial.done)
            self._launch(trial)

    def _start_part(self, part: Part) -> None:
        """Start a half of a trial; one whose other half has passed is known to crash."""
        part.models = [model for model in part.models if self._needed(model)]
        if not part.models:
            return
        if part.other is not None and part.other.passed and len(part.models) > 1:
            with self._wake:
                if not self._stopped():
                    self._crashed.extendleft(reversed(halves(part.whole, part.models)))
                    self._in_hand = []
            return
        trial_id = self._store.next_trial_id()
        folder = Path(self._store.trial_folder(trial_id))
        ids = [] if part.probe else [model.model_id for model in part.models]
        document = take_part(part.whole.folder, folder, ids, trial_id)
        report = {"models": len(ids), "part_of": part.whole.trial_id}
        self._store.add_trial(trial_id, [*ids, *document.aliases], report)
        request = replace(part.whole, trial_id=trial_id, folder=folder, vouched=None)
        self._launch(Trial(request, part.models, part))

    def _launch(self, trial: Trial) -> None:
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
            self._finish_later(trial.models, text, cancelled=self._stopped())
            return
        if self._stopped():  # came while the process was being started
            self._platform.cancel(trial_id)


def _cancelled(model: Model, error: str) -> Event:
    value = {"success": False, "error": error, "weights": None, "sha256": None, "cancelled": True}
    return Event(model.model_id, "ended", None, value)
