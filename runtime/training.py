"""The training loop of a trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from cgo.commands import JOINED, Command, Commands
from cgo.division import restricted
from cgo.errors import CgoError, TrialError, UserExitError
from cgo.events import Event, cut
from cgo.graph import Graph, ModelId
from cgo.graph_data import GraphData, ModelEntry
from cgo.private.late_compiler import import_late
from cgo.runtime import allowance, checkpoint
from cgo.runtime.admission import admit
from cgo.runtime.allowance import Allowance
from cgo.runtime.cohort import Cohort
from cgo.runtime.company import Company, Setting
from cgo.runtime.device_lanes import Observer
from cgo.runtime.joining import Joiners, constants_of, read_joiners
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
    commands: Commands | None = None,
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
        commands: Which models are to join or to end meanwhile.

    Returns:
        Each trained model's final metric, aliases and those that joined included.

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
    constants = constants_of(data)
    if data.experiment.get(JOINED):  # it goes on after a crash
        data = replace(data, graph=_regrouped(data, [data.graph]))
    limits = limits or Limits.of_memory(_total_bytes(given))
    data, refused = admit(data, constants, limits, vouched=vouched)
    for id_, reason in refused.items():
        report(_failed(id_, reason))
    with tf32(tuning.tf32):
        rest = commands or Commands(), limits
        trial = _Trial(data, constants, folder, report, observer, given, tuning, *rest)
        try:
            trial.run()
        finally:
            for cohort in trial.cohorts.values():
                cohort.close()
    return trial.metrics()


def _regrouped(data: GraphData, graphs: Sequence[Graph]) -> Graph:
    """Graphs of one trial, merged by the planner's passes; few trials import these."""
    from cgo.union import fusing_of, regrouped

    return regrouped(graphs, fusing_of(data))


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


@dataclass(frozen=True)
class _Added:
    """What joins a trial, all made."""

    joiners: Joiners
    data: GraphData  # with those that train already
    members: list[Member]
    companies: list[tuple[Cohort, Company]]
    failed: Mapping[ModelId, str]


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
        commands: Commands | None = None,
        limits: Limits | None = None,
    ) -> None:
        started = time.perf_counter()
        self.data, self.folder, self.report = data, folder, report
        self._constants, self._devices = dict(constants), devices
        self._commands, self._limits = commands or Commands(), limits or Limits()
        self._allowance = Allowance(allowance.SHARE)
        self.members: dict[ModelId, Member] = {}
        self._found: dict[ModelId, float] = {}  # metrics of models that are let go of
        self._not_kept: set[ModelId] = set()  # told already
        self._pace = checkpoint.Pace()
        places = place_models(data, devices, self._tell)
        records = checkpoint.load(folder) or {}
        for entry in data.models:
            member = self._resumed(entry, places.devices[entry.id], records.get(entry.id))
            if isinstance(member, Member):
                self.members[entry.id] = member
            else:
                self.report(_failed(entry.id, member))
        record = Record(folder / RECORD, devices[0], tuning.record)
        tuner = partial(make_tuner, tuning, record=record, tell=self._tell)
        self._setting = Setting(tuner, self._tell, observer, stopped=self._stopped)
        self.cohorts: dict[str, Cohort] = {}  # by data
        given = data.graph, constants, places.feeding
        for cohort, company in self._companies(data, self.members.values(), *given):
            cohort.add(company)
        seconds = time.perf_counter() - started
        self._allowance.made(len(self.members), seconds, joining=False)
        figures = {"models": len(self.members), "loaders": len(self.cohorts), "seconds": seconds}
        self._tell("lowered", **figures, tf32=tuning.tf32)

    def _companies(
        self,
        data: GraphData,
        members: Iterable[Member],
        graph: Graph,
        constants: Mapping[str, Tensor],
        feeding: bool,
    ) -> list[tuple[Cohort, Company]]:
        """Models by their data, with the cohort that each company is to be in."""
        grouped: dict[str, list[Member]] = {}
        for member in members:
            grouped.setdefault(member.entry.data, []).append(member)
        found = []
        for key, own in grouped.items():
            if key not in self.cohorts:
                regroup = partial(_regrouped, self.data)
                cohort = Cohort(data.data[key], regroup, self._allowance, self._setting)
                self.cohorts[key] = cohort
            cohort = self.cohorts[key]
            found.append((cohort, cohort.company(graph, own, constants, feeding=feeding)))
        return found

    def _member(self, entry: ModelEntry, data: GraphData, device: torch.device) -> Member | str:
        """The model, or why it cannot be built: its own failure."""
        try:
            with contained:
                return Member(entry, data, device, self.folder, self.report)
        except Exception as error:  # of its factory, optimizer or file
            named = isinstance(error, CgoError) and not isinstance(error, UserExitError)
            return str(error) if named else f"building it raised {told(error)}"

    def _resumed(
        self, entry: ModelEntry, device: torch.device, record: dict[str, Any] | None
    ) -> Member | str:
        """The model as its checkpoint has it; from its start where that cannot be loaded."""
        member = self._member(entry, self.data, device)
        if isinstance(member, str) or record is None:
            return member
        try:
            with contained:
                member.load(record)
            return member
        except Exception as error:
            log.warning("model %r starts anew: its checkpoint raised %s", entry.id, told(error))
            return self._member(entry, self.data, device)

    def run(self) -> None:
        """Train epoch by epoch; models of different loaders take turns."""
        self._start(self.members.values())
        while True:
            self._obey()
            if not self._running():
                break
            for cohort in list(self.cohorts.values()):
                if cohort.running():
                    cohort.epoch()
                cohort.sync()
            if not self._running() or self._pace.due():  # of what has ended little is kept
                started = time.perf_counter()
                self._save()
                self._pace.wrote(time.perf_counter() - started)
        self._tell("finished")

    def _running(self) -> list[Member]:
        return [member for member in self.members.values() if member.running]

    def _start(self, members: Iterable[Member]) -> None:
        for member in members:
            member.start()

    # --- what is asked for while models train -----------------------------------------------------

    def _stopped(self) -> frozenset[ModelId]:
        return self._commands.stopped

    def _obey(self) -> None:
        """End the models that are to end, and let others join if there is time for it."""
        self._stop()
        while (command := self._commands.first()) is not None:
            if self._commands.draining:
                self._refuse(command, "the trial takes no more models")
            elif self._running() and not self._allowance.allows(len(command.models)):
                break  # what waits costs nobody anything
            else:
                self._join(command)
            self._commands.drop()
            self._stop()

    def _stop(self) -> None:
        wanted = self._commands.stopped
        for cohort in self.cohorts.values() if wanted else ():
            for company in cohort.companies:
                for member in company.running():
                    if member.id in wanted:
                        company.cancel(member.id)
        self._commands.forget(id_ for id_ in wanted if id_ in self.members)

    def _refuse(self, command: Command, reason: str) -> None:
        log.warning("%s is not added: %s", command.document, reason)
        self._tell("refused", document=command.document, reason=cut(reason))

    def _join(self, command: Command) -> None:
        """Let a further document's models train from now on; where that fails, nobody is hurt."""
        started = time.perf_counter()
        try:
            staying = restricted(self.data, [member.id for member in self._running()])
            given = self._limits, self._devices, staying
            joiners = read_joiners(Path(command.document), *given, command.vouched)
            added = self._added(joiners, staying)
        except Exception as error:
            self._refuse(command, str(error) if isinstance(error, CgoError) else told(error))
            return
        self._tell("added", document=command.document, models=added.joiners.ids)
        for id_, reason in added.failed.items():
            self.report(_failed(id_, reason))
        self._let_go()
        self._pace.renew()
        self.data = added.data
        self._constants |= added.joiners.constants
        self.members |= {member.id: member for member in added.members}
        seconds = time.perf_counter() - started
        for cohort, company in added.companies:
            company.joined_s = seconds / len(added.companies)
            cohort.add(company)
        self._start(added.members)

    def _added(self, joiners: Joiners, staying: GraphData) -> _Added:
        """Everything made that the models need, and the trial's document written."""
        from cgo.union import union, write_union  # in few trials somebody joins

        whole = union(staying, joiners.data)
        places = place_models(joiners.data, self._devices, self._tell)
        failed = dict(joiners.refused)
        members: list[Member] = []
        for entry in joiners.data.models:
            member = self._member(entry, joiners.data, places.devices[entry.id])
            if isinstance(member, Member):
                members.append(member)
            else:
                failed[entry.id] = member
        given = joiners.data.graph, joiners.constants, places.feeding
        companies = self._companies(joiners.data, members, *given)
        constants = {**self._constants, **joiners.constants}
        whole = write_union(whole, joiners.data, self.folder, constants)
        return _Added(joiners, whole, members, companies, failed)

    def _let_go(self) -> None:
        """Keep no more of models that have ended than their metrics."""
        self._found = self.metrics()
        self.members = {member.id: member for member in self._running()}

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
        found = self._found | {
            id_: member.history[-1][member.entry.training.metric_name]
            for id_, member in self.members.items()
            if member.ended is not None and member.ended["success"]
        }
        return found | {a: found[twin] for a, twin in self.data.aliases.items() if twin in found}

    def _tell(self, what: str, **figures: Any) -> None:
        self.report(Event("", "trial", None, {"what": what, **figures}))
