"""The training loop of a trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from cgo import weights
from cgo.errors import CgoError, TrialError, UserExitError
from cgo.events import Event, cut
from cgo.graph import ModelId
from cgo.graph_data import GraphData, ModelEntry
from cgo.private.late_compiler import import_late
from cgo.runtime import checkpoint
from cgo.runtime.admission import admit
from cgo.runtime.cohort import Cohort
from cgo.runtime.device_lanes import Observer
from cgo.runtime.member import Member, Report
from cgo.runtime.placing import place_models
from cgo.runtime.precision import tf32
from cgo.runtime.record import Record
from cgo.runtime.tuning import make_tuner
from cgo.runtime.watching import Limits
from cgo.tuning import Tuning
from cgo.user_code import contained, told

log = logging.getLogger(__name__)

#: The file of a trial's folder that holds its lowering choices.
RECORD = "lowering.json"


def train(
    data: GraphData,
    folder: Path,
    report: Callable[[Event], None],
    *,
    observer: Observer | None = None,
    device: torch.device | Sequence[torch.device] | None = None,
    limits: Limits | None = None,
    vouched: bool = False,
) -> dict[ModelId, float]:
    """Train all models of a document, and say what happens to each.

    Args:
        data: What to train.
        folder: Where weights and the checkpoint go; with a checkpoint in it, training goes on.
        report: Called with each event, in order.
        observer: Sees every step.
        device: Where to train, one or several; default is all CUDA devices, or the CPU.
        limits: On each operator; default is what fails on these devices for certain.
        vouched: See `cgo.runtime.admission.admit`.

    Returns:
        Each trained model's final metric, aliases included.

    Raises:
        GraphDataError: files that the document refers to are missing or changed, or groups of its
            nodes do not do the same work.
        SpecError: settings of its tuning are refused.
        TrialError: the checkpoint in the folder cannot be read.
    """
    import_late()
    given = [device] if isinstance(device, torch.device) else list(device or _all_devices())
    given = [torch.device(d.type, d.index or 0) if d.type == "cuda" else d for d in given]
    data.check_files()
    folder.mkdir(parents=True, exist_ok=True)
    tuning = Tuning.from_json(data.experiment.get("tuning", {}))
    constants = _constants(data)
    data, refused = admit(
        data, constants, limits or Limits.of_memory(_total_bytes(given)), vouched=vouched
    )
    for id_, reason in refused.items():
        report(_failed(id_, reason))
    with tf32(tuning.tf32):
        trial = _Trial(data, constants, folder, report, observer, given, tuning)
        try:
            trial.run()
        finally:
            for cohort in trial.cohorts:
                cohort.close()
    return trial.metrics()


def _constants(data: GraphData) -> dict[str, Tensor]:
    if data.constants is None:
        return {}
    return weights.load(data.base / data.constants.file)


def _failed(id_: ModelId, error: str) -> Event:
    value = {"success": False, "error": cut(error), "weights": None, "sha256": None}
    return Event(id_, "ended", None, value)


def _total_bytes(devices: Sequence[torch.device]) -> int:
    """Memory of the largest device, whoever uses it."""
    sizes = [torch.cuda.get_device_properties(d).total_memory for d in devices if d.type == "cuda"]
    return max(sizes, default=int(psutil.virtual_memory().total))


def _all_devices() -> list[torch.device]:
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found or [torch.device("cpu")]


class _Trial:
    def __init__(
        self,
        data: GraphData,
        constants: Mapping[str, Tensor],
        folder: Path,
        report: Report,
        observer: Observer | None,
        devices: Sequence[torch.device],
        tuning: Tuning,
    ) -> None:
        started = time.perf_counter()
        self.data, self.folder, self.report = data, folder, report
        self.members: dict[ModelId, Member] = {}
        self._not_kept: set[ModelId] = set()  # told already
        places = place_models(data, devices, self._tell)
        records = checkpoint.load(folder) or {}
        for entry in data.models:
            member = self._resumed(entry, places.devices[entry.id], records.get(entry.id))
            if member is not None:
                self.members[entry.id] = member
        record = Record(folder / RECORD, devices[0], tuning.record)
        tuner = partial(make_tuner, tuning, record=record, tell=self._tell)
        self.cohorts = [
            Cohort(data, key, members, constants, observer, tuner, self._tell, places.feeding)
            for key, members in self._by_data().items()
        ]
        seconds = time.perf_counter() - started
        figures = {"models": len(self.members), "loaders": len(self.cohorts), "seconds": seconds}
        self._tell("lowered", **figures, tf32=tuning.tf32)

    def _member(self, entry: ModelEntry, device: torch.device) -> Member | None:
        try:
            with contained:
                return Member(entry, self.data, device, self.folder, self.report)
        except Exception as error:  # of its factory, optimizer or file: its own failure
            named = isinstance(error, CgoError) and not isinstance(error, UserExitError)
            self.report(
                _failed(entry.id, str(error) if named else f"building it raised {told(error)}")
            )
            return None

    def _resumed(
        self, entry: ModelEntry, device: torch.device, record: dict[str, Any] | None
    ) -> Member | None:
        """The model as its checkpoint has it; from its start where that cannot be loaded."""
        member = self._member(entry, device)
        if member is None or record is None:
            return member
        try:
            with contained:
                member.load(record)
            return member
        except Exception as error:
            log.warning("model %r starts anew: its checkpoint raised %s", entry.id, told(error))
            return self._member(entry, device)

    def _by_data(self) -> dict[str, list[Member]]:
        grouped: dict[str, list[Member]] = {}
        for member in self.members.values():
            grouped.setdefault(member.entry.data, []).append(member)
        return grouped

    def run(self) -> None:
        """Train epoch by epoch; models of different loaders take turns."""
        for member in self.members.values():
            member.start()
        while any(member.running for member in self.members.values()):
            for cohort in self.cohorts:
                if cohort.running():
                    cohort.epoch()
                cohort.sync()
            self._save()
        self._tell("finished")

    def _save(self) -> None:
        """Write the checkpoint, without what cannot be kept: that is only missed after a crash."""
        records: dict[ModelId, Any] = {}
        for id_, member in self.members.items():
            try:
                with contained:
                    records[id_] = member.dump()
            except Exception as error:
                self._miss(id_, f"model {id_!r} is in no checkpoint: {told(error)}")
        try:
            checkpoint.save(self.folder, records)
        except TrialError as error:
            self._miss("", f"{error}; training goes on without it")

    def _miss(self, model: ModelId, reason: str) -> None:
        if model not in self._not_kept:
            self._not_kept.add(model)
            log.warning("%s", reason)
            self._tell("checkpoint", reason=reason)

    def metrics(self) -> dict[ModelId, float]:
        """Final metrics of what was trained."""
        found = {
            id_: member.history[-1][member.entry.training.metric_name]
            for id_, member in self.members.items()
            if member.ended is not None and member.ended["success"]
        }
        return found | {a: found[twin] for a, twin in self.data.aliases.items() if twin in found}

    def _tell(self, what: str, **figures: Any) -> None:
        self.report(Event("", "trial", None, {"what": what, **figures}))
