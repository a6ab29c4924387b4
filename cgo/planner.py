"""From submitted models to a trial's document: capture, passes, files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cgo import weights
from cgo.capture import Captured, Capturer, Examples
from cgo.capture.helpers import Helpers
from cgo.errors import CgoError, EngineClosedError, ModelError, UserExitError
from cgo.garbage import uncollected
from cgo.graph import Graph, ModelId
from cgo.graph_data import FileRef, GraphData, ModelEntry, file_sha256
from cgo.ids import file_name
from cgo.imports import loaded
from cgo.model import DataSpec, Model, as_json, digest_of
from cgo.passes.alias_models import AliasModels, find_aliases
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.pipeline import run_pipeline
from cgo.passes.place import Need, estimate_needs
from cgo.report import MergeReport, report_of
from cgo.runtime.placing import state_bytes
from cgo.user_code import contained, told, where
from cgo.wire import why_unwritable
from cgo.worth import Estimate, Sample, estimate

log = logging.getLogger(__name__)

_FUSE_ALL = BatchOperators()

#: Seconds of steps that are tried before it is decided whether to merge.
_SAMPLING_S = 0.015


@dataclass(frozen=True)
class Plan:
    """A trial to run, and the models that cannot be part of any."""

    graph_data: GraphData | None  # None when no model is left
    report: MergeReport
    failures: Mapping[ModelId, str]


class Planner:
    """Plans trials; captures are cached across them.

    A model that cannot be captured, estimated or written is a failure with an error of its own,
    and never of the others.
    """

    def __init__(
        self,
        merge: bool = True,
        batch_operators: BatchOperators | None = _FUSE_ALL,
        roots: Callable[[Sequence[Model]], Sequence[str]] | None = None,
    ) -> None:
        """Set what may be merged.

        Args:
            merge: Off, nothing is shared between models but the trial.
            batch_operators: Which operators may be fused; None: none.
            roots: Gives the folders in which what models name is found, so that other processes
                can help to capture many; None: this one captures all.
        """
        self._roots = roots
        self._merge = merge
        self._passes = () if batch_operators is None else (batch_operators,)
        self._capturer = Capturer()
        self._examples: dict[str, Examples] = {}
        self._refused: dict[str, Exception] = {}  # what their data raised, in this capture
        self._stopped = threading.Event()
        self._captured: dict[ModelId, Captured] = {}  # early
        self._failed: dict[ModelId, str] = {}  # why an early capture could not be
        self._capture_s = 0.0
        self._estimates: dict[ModelId, Estimate] = {}  # of what is not planned yet

    def content(self, model: Model) -> str:
        """A digest of all that decides a model's result; equal content means an equal result.

        A factory counts with its arguments and the source file it stands in; an instance with its
        captured graph and weights. One that cannot be captured is like no other.
        """
        if isinstance(model.module, str):
            return _digest(model, None)
        self.capture([model])
        captured = self._captured.get(model.model_id)
        if captured is None:
            return digest_of(["unique", model.model_id])
        return _digest(model, captured)

    def capture(self, models: Sequence[Model]) -> None:
        """Capture models before the trials that train them are planned; `plan` says what failed.

        Raises:
            EngineClosedError: `stop` was called.
        """
        started = time.perf_counter()
        self._refused = {}
        new = [m for m in models if m.model_id not in self._captured.keys() | self._failed.keys()]
        waiting = deque({model.model_id: model for model in new}.values())
        roots, most = ((), 0) if self._roots is None else (self._roots(new), None)
        with Helpers(waiting, self._note, roots, most) as helpers:
            count = 0
            while (model := helpers.take()) is not None:
                if self._stopped.is_set():
                    raise EngineClosedError("the engine is closed; nothing more is captured")
                self._capture_here(model)
                count += 1
                helpers.consider((time.perf_counter() - started) / count)
        self._capture_s += time.perf_counter() - started

    def consider(
        self, models: Sequence[Model], device: str, spare_s: float = 0.0
    ) -> Estimate | None:
        """Leave models uncaptured that are not worth merging; they train as they are.

        Args:
            models: Of one trial, or of several side by side.
            device: Where they train: "cpu", or any other for a GPU.
            spare_s: For how long workers are not ready yet.

        Returns:
            What was estimated; None where nothing could be, or where models are given as modules,
            which only a graph takes to a trial.
        """
        new = [m for m in models if m.model_id not in self._captured.keys() | self._failed.keys()]
        if not new or len(new) < len(models) or not self._merge:
            return None
        if not all(isinstance(model.module, str) for model in new):
            return None
        found = self.estimated(new, device, spare_s)
        if found is None:
            return None
        self._estimates |= dict.fromkeys((model.model_id for model in new), found)
        if not found.merge:
            for model in new:
                self._capture_here(model, f"merging would not repay itself ({found})")
        return found

    def _share(self, models: Sequence[Model]) -> Estimate | None:
        """These models' part of what was estimated for them and others."""
        found = [self._estimates.pop(model.model_id, None) for model in models]
        known = [estimate for estimate in found if estimate is not None]
        return known[0].share(len(known)) if known else None

    def estimated(
        self, models: Sequence[Model], device: str, spare_s: float = 0.0
    ) -> Estimate | None:
        """Both sides, from a step of one model of each factory, tried for about `_SAMPLING_S`.

        None where not one of them could be tried.
        """
        self._refused = {}
        groups: dict[str, list[Model]] = {}
        for model in models:
            groups.setdefault(str(model.module), []).append(model)
        samples: list[Sample] = []  # one for each model of a factory that was tried
        batches: list[tuple[int, int]] = []
        spent_s = 0.0  # in steps: what a first one imports would be imported anyway
        for group in sorted(groups.values(), key=len, reverse=True):
            middle = group[len(group) // 2]
            try:
                with contained:
                    examples = self._examples_of(middle.data)
                    found = self._capturer.sample(middle, examples)
            except Exception as error:  # its capture will say so
                log.debug("%r is no sample: %s", middle.model_id, told(error))
                continue
            samples += [found] * len(group)
            batches += [examples.epoch] * len(group)
            spent_s += 2 * found.step_s
            if spent_s > _SAMPLING_S:
                break
        if not samples:
            return None
        each = [sum(numbers) // len(batches) for numbers in zip(*batches)]
        epochs = [model.training.epochs for model in models]
        return estimate(samples, epochs, (each[0], each[1]), device=device, spare_s=spare_s)

    def _capture_here(self, model: Model, plain: str = "") -> None:
        """Capture a model; or leave it as it is, for a reason."""
        try:
            with contained:
                captured = self._capture(model) if not plain else self._plain(model, plain)
        except Exception as error:
            self._note(model, None, _failure(model.model_id, "capturing it", error))
        else:
            self._note(model, captured)

    def _note(self, model: Model, captured: Captured | None, failure: str = "") -> None:
        """Keep what became of a model that was captured, here or elsewhere."""
        if captured is None:
            self._failed[model.model_id] = failure
        else:
            self._captured[model.model_id] = captured

    def take(self, id_: ModelId) -> tuple[Captured | None, str]:
        """What a model was captured as, or why it could not be; it is forgotten here."""
        return self._captured.pop(id_, None), self._failed.pop(id_, "")

    def stop(self) -> None:
        """Let `capture` end after the model that it is at; from another thread."""
        self._stopped.set()

    def fitting(self, models: Sequence[Model], most_bytes: float) -> list[Model]:
        """The first of the models that one trial can hold in memory; at least one.

        All of them keep their state while they train; activations are counted once, for the model
        with the largest, as programs take turns where memory asks for it.

        Args:
            models: In the order in which they are to be trained; they are captured.
            most_bytes: Of the trial's devices together.
        """
        self.capture(models)
        state = largest = 0
        for count, model in enumerate(models):
            need = self._need(model.model_id)
            if need is None:  # a failure, which takes no memory
                continue
            state, largest = state + need.state_bytes, max(largest, need.step_bytes)
            if count and state + largest > most_bytes:
                return list(models[:count])
        return list(models)

    def _need(self, id_: ModelId) -> Need | None:
        captured = self._captured.get(id_)
        if captured is None:
            return None
        try:
            return _need(captured)
        except Exception as error:
            del self._captured[id_]
            self._failed[id_] = _failure(id_, "estimating its memory", error)
            return None

    def captured(self) -> dict[ModelId, Captured]:
        """What was captured early and is not planned yet."""
        return dict(self._captured)

    def adopt(self, captured: Mapping[ModelId, Captured]) -> None:
        """Take over what another planner captured early, in another process say."""
        self._captured |= captured

    def plan(
        self,
        models: Sequence[Model],
        folder: Path,
        experiment: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Capture and merge models, and write the trial's document and weights into `folder`.

        Args:
            models: What the trial is to train.
            folder: The trial's own folder.
            experiment: JSON settings that the trial reads with `cgo.trial.experiment_config`.

        Raises:
            Exception: the models cannot be planned together, for whatever reason a pass had. Fewer
                of them may: what was captured is kept for another call.
        """
        captured, failures = self._capture_all(models)
        try:
            with uncollected():
                plan = self._planned(models, captured, failures, folder, experiment or {})
            return replace(plan, report=replace(plan.report, estimate=self._share(models)))
        except Exception:
            self._captured |= captured
            self._failed |= failures
            raise

    def _planned(
        self,
        models: Sequence[Model],
        captured: Mapping[ModelId, Captured],
        failures: dict[ModelId, str],
        folder: Path,
        experiment: Mapping[str, Any],
    ) -> Plan:
        capture_s, self._capture_s = self._capture_s, 0.0
        started = time.perf_counter()
        kept = [model for model in models if model.model_id in captured]
        entries, aliases = self._entries(kept, captured, failures, folder)
        kept = [model for model in kept if model.model_id not in failures]
        counts: list[tuple[str, int, int]] = []
        graph = self._merged([captured[model.model_id] for model in kept], aliases, counts)
        merge_s = time.perf_counter() - started
        report = report_of(kept, captured, aliases, graph, counts, capture_s, merge_s)
        if not kept:
            return Plan(None, report, failures)
        trained = [model for model in kept if model.model_id not in aliases]
        data = _write(trained, entries, captured, aliases, graph, folder, experiment)
        return Plan(data, report, failures)

    def _entries(
        self,
        models: Sequence[Model],
        captured: Mapping[ModelId, Captured],
        failures: dict[ModelId, str],
        folder: Path,
    ) -> tuple[dict[ModelId, ModelEntry], dict[ModelId, ModelId]]:
        """The document's entries of models, with their files written, and the aliases.

        What fails is added to `failures`; the next model that equals it is then tried itself.
        """
        contents: dict[ModelId, str] = {}
        for model in models:
            with self._noting(model.model_id, "telling what it is", failures):
                contents[model.model_id] = _digest(model, captured[model.model_id])
        entries: dict[ModelId, ModelEntry] = {}
        while True:
            alive = {id_: content for id_, content in contents.items() if id_ not in failures}
            aliases = find_aliases(alive) if self._merge else {}
            missing = [id_ for id_ in alive if id_ not in aliases and id_ not in entries]
            if not missing:
                return entries, aliases
            for id_ in missing:
                with self._noting(id_, "writing its start", failures):
                    entries[id_] = _entry(captured[id_], folder)

    @staticmethod
    @contextlib.contextmanager
    def _noting(id_: ModelId, doing: str, failures: dict[ModelId, str]) -> Iterator[None]:
        """Make what is raised the failure of one model."""
        try:
            yield
        except Exception as error:
            failures[id_] = _failure(id_, doing, error)

    def _capture_all(
        self, models: Sequence[Model]
    ) -> tuple[dict[ModelId, Captured], dict[ModelId, str]]:
        self.capture(models)
        ids = [model.model_id for model in models]
        failures = {id_: self._failed.pop(id_) for id_ in ids if id_ in self._failed}
        return {id_: self._captured.pop(id_) for id_ in ids if id_ in self._captured}, failures

    def _capture(self, model: Model) -> Captured:
        return _writable(self._capturer.capture(model, self._examples_of(model.data)))

    def _plain(self, model: Model, reason: str) -> Captured:
        return self._capturer.plain(model, self._examples_of(model.data), reason)

    def _examples_of(self, spec: DataSpec) -> Examples:
        key = spec.digest
        if key in self._refused:
            raise self._refused[key]  # by other models' capture: it is not opened for each
        if key not in self._examples:
            try:
                with contained:
                    self._examples[key] = Examples.of(spec)
            except Exception as error:
                self._refused[key] = error
                raise
        return self._examples[key]

    def _merged(
        self,
        captured: Sequence[Captured],
        aliases: Mapping[ModelId, ModelId],
        counts: list[tuple[str, int, int]],
    ) -> Graph:
        # By id, so that what is shared and grouped does not depend on the order of submission.
        ordered = sorted(captured, key=lambda item: item.entry.id)
        graphs = [item.graph for item in ordered if item.graph is not None]
        graph = merge(graphs)
        before = len(graph.nodes)
        counts.append(("merge", before, before))
        if not self._merge:
            return graph

        passes = (AliasModels(aliases), dedup_inputs, dedup_stems, *self._passes)

        def count(name: str, result: Graph) -> None:
            counts.append((name, counts[-1][2], len(result.nodes)))

        return run_pipeline(graph, passes, count)


def _failure(id_: ModelId, doing: str, error: Exception) -> str:
    """A model's own error, which names it."""
    log.debug("model %r: %s failed", id_, doing, exc_info=error)
    if isinstance(error, CgoError) and not isinstance(error, UserExitError):
        text = str(error)
        return text if repr(id_) in text else f"model {id_!r}: {text}"
    return f"model {id_!r}: {doing} raised {told(error)} ({where(error)})"


def _digest(model: Model, captured: Captured | None) -> str:
    """See `Planner.content`; an instance has been captured."""
    common = [as_json(model.data), as_json(model.training), model.seed]
    named = [model.data.source, model.training.loss]
    named += [model.data.augment] if model.data.augment else []
    common += [_source_hash(path) for path in named]
    if isinstance(model.module, str):
        return digest_of([model.module, _source_hash(model.module), model.kwargs, *common])
    assert captured is not None
    return digest_of([captured.digest, *common])


def _entry(captured: Captured, folder: Path) -> ModelEntry:
    """A model's entry in the document, with the files that it starts from."""
    entry = captured.entry
    if captured.state is not None:
        file = _write_tensors(folder, f"start/{file_name(entry.id)}.safetensors", captured.state)
        entry = replace(entry, weights=file)
    if captured.begun is not None:
        file = _write_tensors(folder, f"begun/{file_name(entry.id)}.safetensors", captured.begun)
        entry = replace(entry, begun=file)
    return entry


def _write(
    models: Sequence[Model],
    entries: Mapping[ModelId, ModelEntry],
    captured: Mapping[ModelId, Captured],
    aliases: Mapping[ModelId, ModelId],
    graph: Graph,
    folder: Path,
    experiment: Mapping[str, Any],
) -> GraphData:
    """The trial's document, written into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    constants: dict[str, Tensor] = {}
    for model in models:
        constants |= captured[model.model_id].constants
    data = GraphData(
        models=tuple(entries[model.model_id] for model in models),
        data={model.data.digest: model.data for model in models},
        graph=graph,
        constants=_write_tensors(folder, "constants.safetensors", constants) if constants else None,
        aliases=dict(aliases),
        experiment=dict(experiment),
        base=folder,
    )
    data.write(folder / "graph.json")
    return data


def _writable(captured: Captured) -> Captured:
    """The capture; as an opaque lane if a trial would refuse to read it, and all its company."""
    reason = None if captured.graph is None else why_unwritable(captured.graph)
    if reason is None:
        return captured
    entry = captured.entry
    if entry.factory is None:
        raise ModelError(f"model {entry.id!r}: its graph cannot be sent to a trial: {reason}")
    return Captured(replace(entry, opaque=reason), None)


def _need(captured: Captured) -> Need:
    state = state_bytes(captured.entry)
    if captured.graph is None:
        return Need(state, 0, 0.0)
    (need,) = estimate_needs(captured.graph).values()
    return Need(state, need.step_bytes, need.work_s)


def _write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> FileRef:
    weights.save(folder / name, tensors)
    return FileRef(name, file_sha256(folder / name))


def _source_hash(path: str) -> str:
    """A hash of the file in which an import path's module stands; "" for anything else."""
    module = loaded(path.partition(":")[0])
    try:
        file = inspect.getsourcefile(module) if module is not None else None
        if not file:
            return ""
        found = Path(file).stat()
        return _file_hash(file, found.st_mtime_ns, found.st_size)
    except (OSError, TypeError):
        return ""  # no source: a built-in or frozen module, the same in every run


@functools.lru_cache(maxsize=256)
def _file_hash(file: str, mtime_ns: int, size: int) -> str:
    """A hash of a file, which is read again once it has changed: models by hundreds name it."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
