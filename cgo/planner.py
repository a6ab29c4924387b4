"""From submitted models to a trial's document: capture, passes, files."""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cgo import weights
from cgo.capture import Captured, Capturer, Examples
from cgo.errors import CgoError, ModelError
from cgo.graph import Graph, ModelId
from cgo.graph_data import FileRef, GraphData, ModelEntry, file_sha256
from cgo.ids import file_name
from cgo.model import DataSpec, Model, as_json, digest_of
from cgo.passes.alias_models import AliasModels, find_aliases
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.pipeline import run_pipeline
from cgo.passes.place import Need, estimate_needs
from cgo.passes.unmerged import Family, unmerged
from cgo.runtime.placing import state_bytes
from cgo.wire import why_unwritable

log = logging.getLogger(__name__)

_FUSE_ALL = BatchOperators()


@dataclass(frozen=True)
class MergeReport:
    """What merging did: counts for people, kept with the trial."""

    passes: tuple[tuple[str, int, int], ...]  # name, nodes before, nodes after
    models: int
    captured: int
    loaders_before: int
    loaders: int
    stems_shared: int  # nodes with several owners that are not inputs
    grouped: int  # nodes that are fused with others, of all programs
    groups: int  # fused operators that they become
    aliases: Mapping[ModelId, ModelId]
    opaque: Mapping[ModelId, str]
    unmerged: tuple[Family, ...]
    capture_s: float
    merge_s: float

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A trial to run, and the models that cannot be part of any."""

    graph_data: GraphData | None  # None when no model is left
    report: MergeReport
    failures: Mapping[ModelId, str]


class Planner:
    """Plans trials; captures are cached across them."""

    def __init__(
        self, merge: bool = True, batch_operators: BatchOperators | None = _FUSE_ALL
    ) -> None:
        """Set what may be merged.

        Args:
            merge: Off, nothing is shared between models but the trial.
            batch_operators: Which operators may be fused; None: none.
        """
        self._merge = merge
        self._passes = () if batch_operators is None else (batch_operators,)
        self._capturer = Capturer()
        self._examples: dict[str, Examples] = {}
        self._captured: dict[ModelId, Captured] = {}  # early
        self._failed: dict[ModelId, str] = {}  # why an early capture could not be
        self._capture_s = 0.0

    def content(self, model: Model) -> str:
        """A digest of all that decides a model's result; equal content means an equal result.

        A factory counts with its arguments and the source file it stands in; an instance with its
        captured graph and weights.
        """
        common = [as_json(model.data), as_json(model.training), model.seed]
        named = [model.data.source, model.training.loss]
        named += [model.data.augment] if model.data.augment else []
        common += [_source_hash(path) for path in named]
        if isinstance(model.module, str):
            return digest_of([model.module, _source_hash(model.module), model.kwargs, *common])
        try:
            captured = self._capture(model)
        except CgoError:
            log.debug("model %s has no content digest", model.model_id, exc_info=True)
            return digest_of(["unique", model.model_id])
        self._captured[model.model_id] = captured
        return digest_of([captured.digest, *common])

    def capture(self, models: Sequence[Model]) -> None:
        """Capture models before the trials that train them are planned; `plan` says what failed."""
        started = time.perf_counter()
        for model in models:
            id_ = model.model_id
            if id_ not in self._captured and id_ not in self._failed:
                try:
                    self._captured[id_] = self._capture(model)
                except CgoError as error:
                    self._failed[id_] = str(error)
        self._capture_s += time.perf_counter() - started

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
            captured = self._captured.get(model.model_id)
            if captured is None:  # a failure, which takes no memory
                continue
            need = _need(captured)
            state, largest = state + need.state_bytes, max(largest, need.step_bytes)
            if count and state + largest > most_bytes:
                return list(models[:count])
        return list(models)

    def captured(self) -> dict[ModelId, Captured]:
        """What was captured early and is not planned yet."""
        return dict(self._captured)

    def adopt(self, captured: Mapping[ModelId, Captured]) -> None:
        """Take over what another planner captured early, in another process say."""
        self._captured |= captured

    def plan(
        self, models: Sequence[Model], folder: Path, experiment: Mapping[str, Any] | None = None
    ) -> Plan:
        """Capture and merge models, and write the trial's document and weights into `folder`.

        Args:
            models: What the trial is to train.
            folder: The trial's own folder.
            experiment: JSON settings that the trial reads with `cgo.trial.experiment_config`.
        """
        captured, failures = self._capture_all(models)
        capture_s, self._capture_s = self._capture_s, 0.0
        started = time.perf_counter()
        kept = [model for model in models if model.model_id in captured]
        aliases = self._aliases(kept) if self._merge else {}
        counts: list[tuple[str, int, int]] = []
        graph = self._merged([captured[model.model_id] for model in kept], aliases, counts)
        merge_s = time.perf_counter() - started
        report = _report(kept, captured, aliases, graph, counts, capture_s, merge_s)
        if not kept:
            return Plan(None, report, failures)
        trained = [model for model in kept if model.model_id not in aliases]
        data = self._write(trained, captured, aliases, graph, folder, experiment or {})
        return Plan(data, report, failures)

    def _capture_all(
        self, models: Sequence[Model]
    ) -> tuple[dict[ModelId, Captured], dict[ModelId, str]]:
        self.capture(models)
        ids = [model.model_id for model in models]
        failures = {id_: self._failed.pop(id_) for id_ in ids if id_ in self._failed}
        return {id_: self._captured.pop(id_) for id_ in ids if id_ in self._captured}, failures

    def _capture(self, model: Model) -> Captured:
        return _writable(self._capturer.capture(model, self._examples_of(model.data)))

    def _examples_of(self, spec: DataSpec) -> Examples:
        if spec.digest not in self._examples:
            self._examples[spec.digest] = Examples.of(spec)
        return self._examples[spec.digest]

    def _aliases(self, models: Sequence[Model]) -> dict[ModelId, ModelId]:
        return find_aliases({model.model_id: self.content(model) for model in models})

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

    def _write(
        self,
        models: Sequence[Model],
        captured: Mapping[ModelId, Captured],
        aliases: Mapping[ModelId, ModelId],
        graph: Graph,
        folder: Path,
        experiment: Mapping[str, Any],
    ) -> GraphData:
        folder.mkdir(parents=True, exist_ok=True)
        entries: list[ModelEntry] = []
        constants: dict[str, Tensor] = {}
        for model in models:
            item = captured[model.model_id]
            entry = item.entry
            if item.state is not None:
                file = _write_tensors(
                    folder, f"start/{file_name(entry.id)}.safetensors", item.state
                )
                entry = replace(entry, weights=file)
            entries.append(entry)
            constants |= item.constants
        data = GraphData(
            models=tuple(entries),
            data={model.data.digest: model.data for model in models},
            graph=graph,
            constants=_write_tensors(folder, "constants.safetensors", constants)
            if constants
            else None,
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
    module = sys.modules.get(path.partition(":")[0])
    try:
        file = inspect.getsourcefile(module) if module is not None else None
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except (OSError, TypeError):
        return ""  # no source: a built-in or frozen module, the same in every run


def _report(
    models: Sequence[Model],
    captured: Mapping[ModelId, Captured],
    aliases: Mapping[ModelId, ModelId],
    graph: Graph,
    counts: Sequence[tuple[str, int, int]],
    capture_s: float,
    merge_s: float,
) -> MergeReport:
    opaque = {
        id_: item.entry.opaque for id_, item in captured.items() if item.entry.opaque is not None
    }
    shared = [node for node in graph.nodes if len(node.owners) > 1 and node.op != "cgo.input"]
    return MergeReport(
        passes=tuple(counts),
        models=len(models),
        captured=len(models) - len(opaque),
        loaders_before=len(models),
        loaders=len({model.data.digest for model in models}),
        stems_shared=len(shared),
        grouped=sum(node.group is not None for node in graph.nodes),
        groups=len({node.group for node in graph.nodes if node.group is not None}),
        aliases=dict(aliases),
        opaque=opaque,
        unmerged=unmerged(graph),
        capture_s=capture_s,
        merge_s=merge_s,
    )
