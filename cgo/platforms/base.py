"""The protocol that every platform follows; `tests/platforms/contract.py` is its test suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from cgo.commands import Command
from cgo.events import Event
from cgo.interface import WorkerInfo

TrialId = str


@dataclass(frozen=True)
class TrialRequest:
    """One trial to run.

    `folder` holds `graph.json`; the trial writes `weights/`, `checkpoint.pt` and `log.txt` there.
    Submitting a folder that holds a checkpoint goes on from it. `vouched` is the SHA-256 of a
    document whose operators the engine itself has captured: a trial that it shares a machine with
    need not try them again. `eager`: models of it may take steps of torch's own optimizers.
    `allowed_modules` limits what the trial imports for its document (`cgo.allowed`); it reaches the
    trial by its environment. None adds no limit. `modules` are those that its models name: who
    names the same ones needs the same libraries.
    """

    trial_id: TrialId
    folder: Path
    import_roots: tuple[str, ...] = ()
    allowed_modules: tuple[str, ...] | None = None
    vouched: str | None = None
    eager: bool = True
    modules: frozenset[str] = frozenset()

    @property
    def document(self) -> Path:
        """What it trains."""
        return self.folder / "graph.json"


@dataclass(frozen=True)
class TrialExit:
    """How a trial's process ended; `error` is None when it ran to its end."""

    trial_id: TrialId
    error: str | None
    cancelled: bool = False


class Platform(Protocol):
    """Runs trials.

    Callbacks come from the platform's own threads: per trial `on_event` in order, then `on_exit`
    exactly once, after the last event.
    """

    def start(
        self,
        on_event: Callable[[TrialId, Event], None],
        on_exit: Callable[[TrialExit], None],
    ) -> None:
        """Get ready; called once, before anything else."""

    def submit(self, request: TrialRequest) -> None:
        """Run a trial on an idle worker; raises `TrialError` when there is none."""

    def cancel(self, trial_id: TrialId) -> None:
        """Stop a trial; its `on_exit` follows. Unknown or ended trials are ignored."""

    def idle_workers(self) -> Sequence[WorkerInfo]:
        """Workers that could take a trial now."""

    def has_idle_worker(self) -> bool:
        """Whether there is one; cheap, asked often."""

    def close(self) -> None:
        """Stop all trials and wait for their exits."""


@runtime_checkable
class Expecting(Platform, Protocol):
    """A platform whose processes can prepare for trials that are not planned yet."""

    def expect(self, modules: frozenset[str], libraries: Sequence[str]) -> None:
        """Hear which modules the models of trials to come name, and what these import."""


@runtime_checkable
class Commanded(Platform, Protocol):
    """A platform with a channel into the trials that it runs.

    Without one, models that are submitted wait for an idle worker, and those that train are only
    stopped with their whole trial.
    """

    def command(self, trial_id: TrialId, command: Command) -> bool:
        """Tell a trial what to do; False: it cannot be told. True does not say that it obeys."""

    def worker_of(self, trial_id: TrialId) -> WorkerInfo | None:
        """The worker of a running trial, with the memory that is free beside it; None: unknown."""
