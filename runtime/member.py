"""One model while it is trained: its state, updater, history and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cgo import weights
from cgo.events import Event, cut
from cgo.graph import ModelId
from cgo.graph_data import GraphData, ModelEntry, file_sha256
from cgo.ids import file_name
from cgo.model import loss_function
from cgo.private.trees import tree_map_only
from cgo.runtime import checkpoint
from cgo.runtime.meters import LossMeter
from cgo.runtime.optimizers import Updater
from cgo.runtime.scaling import LossScale
from cgo.runtime.state import ModelState
from cgo.user_code import told

#: The error of a model that was cancelled.
CANCELLED = "cancelled while it was trained"

Report = Callable[[Event], None]


class Member:
    """A model of the trial; reports its own events and nobody else's."""

    def __init__(
        self, entry: ModelEntry, data: GraphData, device: torch.device, folder: Path, report: Report
    ) -> None:
        self.entry = entry
        self.folder, self.device = folder, device
        self.history: list[dict[str, float]] = []
        self.ended: dict[str, Any] | None = None
        self._report = report
        self.state = ModelState(entry, data, device)
        # Of one that was captured, it is part of the graph.
        self.loss = None if entry.opaque is None else loss_function(entry.training.loss)
        self.updater = Updater(entry.training, self.state.parameters())
        self.scale = LossScale.of(entry.training, device)
        self.train_loss = LossMeter()
        self.lr = self.updater.lr
        self.diverged = False  # a loss was not finite, which is to end the model

    @property
    def id(self) -> ModelId:
        """The model's id."""
        return self.entry.id

    @property
    def running(self) -> bool:
        """Whether it still trains."""
        return self.ended is None

    def start(self) -> None:
        """Report that it trains, unless a checkpoint says that it did before."""
        if self.running and not self.history:
            self._tell("started", None, None)

    def begin_epoch(self) -> None:
        """Fresh sums, and the learning rate that the epoch starts with."""
        self.train_loss = LossMeter()
        self.lr = self.updater.lr

    def step(self) -> None:
        """The step of the model's own optimizer, left out where its gradients have overflowed."""
        self.updater.step(skip=self.scale is not None and self.scale.overflowed())

    def end_epoch(self, evaluated: dict[str, float], seconds: float) -> None:
        """Add the epoch's row, report it, and end the model if it was the last."""
        epoch = len(self.history)
        train_loss = self.train_loss.mean()
        row = {"train_loss": train_loss, **evaluated, "lr": self.lr, "seconds": seconds}
        self.history.append(row)
        self._tell("epoch", epoch, row)
        if self.entry.training.stop_on_nan and not abs(train_loss) < float("inf"):
            self.fail(f"the training loss became {train_loss} in epoch {epoch}")
        elif epoch + 1 == self.entry.training.epochs:
            self._succeed(row[self.entry.training.metric_name])

    def fail(self, error: str) -> None:
        """End the model with an error."""
        self._end({"success": False, "error": cut(error), "weights": None, "sha256": None})

    def cancel(self) -> None:
        """End the model because somebody has asked for it; its history stays."""
        value = {"success": False, "error": CANCELLED, "weights": None, "sha256": None}
        self._end(value | {"cancelled": True})

    def _succeed(self, metric: float) -> None:
        path = self.folder / "weights" / f"{file_name(self.id)}.safetensors"
        tensors, aliases = self.state.state_dict()
        try:
            weights.save(path, tensors, aliases)
        except Exception as error:
            self.fail(f"its weights cannot be written: {told(error)}")
            return
        self._tell("final", None, metric)
        relative = path.relative_to(self.folder).as_posix()
        self._end(
            {"success": True, "error": None, "weights": relative, "sha256": file_sha256(path)}
        )

    def _end(self, value: dict[str, Any]) -> None:
        self.ended = value
        self._tell("ended", None, value)

    def _tell(self, kind: Any, epoch: int | None, value: Any) -> None:
        self._report(Event(self.id, kind, epoch, value))

    def dump(self) -> dict[str, Any]:
        """The member for a checkpoint; an ended one keeps only its record.

        Raises:
            TrialError: its optimizer or scheduler keeps what a checkpoint cannot hold.
            Exception: whatever that raised.
        """
        record: dict[str, Any] = {"history": self.history, "ended": self.ended}
        if self.running:
            scheduler = self.updater.scheduler
            # A packed model's tensors are views: saved as they are, they would take all of a pack.
            optimizer = self.updater.optimizer
            state = optimizer.state_dict()
            record["optimizer"] = tree_map_only(torch.Tensor, torch.clone, state)
            record["scheduler"] = None if scheduler is None else scheduler.state_dict()
            record["scale"] = None if self.scale is None else self.scale.dump()
            own = [type(part).__module__ for part in (optimizer, scheduler) if part is not None]
            known = all(module.startswith("torch.") for module in own)
            record["state"] = self.state.dump(whole=not known)  # others may change what is frozen
            if not known:
                checkpoint.check(record)
        return record

    def load(self, record: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history, self.ended = record["history"], record["ended"]
        if self.running:
            self.state.load(record["state"])
            self.updater.optimizer.load_state_dict(record["optimizer"])
            if self.updater.scheduler is not None:
                self.updater.scheduler.load_state_dict(record["scheduler"])
            if self.scale is not None:
                self.scale.load(record["scale"])
