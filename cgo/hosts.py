"""Which of the trials that run may take further models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cgo.commands import Command
from cgo.graph import ModelId
from cgo.platforms.base import Commanded, Platform, TrialId
from cgo.queued import Trial


class Hosts:
    """Finds trials that planned models may join, and tells them.

    Args:
        platform: Where trials run; without a channel into them nobody joins any.
        merge: Whether models share trials at all.
        settled: Whether nobody waits for anything of a model.
    """

    def __init__(self, platform: Platform, merge: bool, settled: Callable[[ModelId], bool]) -> None:
        self._platform = platform
        self._channel = platform if isinstance(platform, Commanded) else None
        self._merge, self._settled = merge, settled

    @property
    def reachable(self) -> bool:
        """Whether the platform can tell its trials anything."""
        return self._channel is not None

    def tell(self, trial_id: TrialId, command: Command) -> bool:
        """Send a command; False: it does not arrive."""
        return self._channel is not None and self._channel.command(trial_id, command)

    def open(self, trials: Iterable[Trial], cancels: int) -> list[Trial]:
        """Trials that may be told to take models, those with the fewest of their own first.

        Args:
            trials: Those that run.
            cancels: How often everything was cancelled; earlier trials are on their way out.
        """
        if self._channel is None or not self._merge:
            return []
        found = [(self._training(t), t) for t in trials if t.open and t.cancels == cancels]
        ordered = sorted((pair for pair in found if pair[0]), key=lambda pair: pair[0])
        return [trial for _, trial in ordered]

    def _training(self, trial: Trial) -> int:
        return sum(not self._settled(model.model_id) for model in trial.models)

    def host(self, trial: Trial, found: Sequence[Trial]) -> Trial | None:
        """The first of the open trials that finds all modules of a planned one."""
        if trial.apart:
            return None
        roots = set(trial.request.import_roots)
        return next((host for host in found if roots.issubset(host.request.import_roots)), None)

    def free_bytes(self, found: Sequence[Trial]) -> int:
        """Memory for further models, on an idle worker or beside what runs; 0: unknown."""
        if workers := self._platform.idle_workers():
            return workers[0].free_memory_bytes
        if not found or self._channel is None:
            return 0
        worker = self._channel.worker_of(found[0].request.trial_id)
        return 0 if worker is None else worker.free_memory_bytes
