"""What the command line shows: a live table while models train, and the tables at the end."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from cgo.interface import AbstractGraphListener, MetricData
from cgo.model import Model, ModelStatus
from cgo.report import MergeReport
from cgo.text import printable
from cgo.timeline import Spent

_STYLES = {
    ModelStatus.SUBMITTED: "dim",
    ModelStatus.TRAINING: "cyan",
    ModelStatus.TRAINED: "green",
    ModelStatus.FAILED: "red",
    ModelStatus.CANCELLED: "yellow",
}


def format_metric(value: float | None) -> str:
    """Four decimals, or a dash for no value."""
    return "-" if value is None else f"{value:.4f}"


def plain(value: object) -> Text:
    """A text of unknown origin for a console or a table: no markup, no escape sequences."""
    return Text(printable(str(value)))


class TrialView(AbstractGraphListener):
    """A progress bar over the epochs of a trial's models, above a table of the models.

    On a terminal both are live; elsewhere each model's end is one line.
    """

    def __init__(self, console: Console, models: Sequence[Model]) -> None:
        self._console, self._models = console, list(models)
        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("[bold]trial"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            console=console,
        )
        total = sum(model.training.epochs for model in self._models)
        self._task = self._progress.add_task("trial", total=total)
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def on_intermediate_metric(self, model: Model, metric: MetricData) -> None:
        """Count an epoch."""
        self._progress.advance(self._task)

    def on_metric(self, model: Model, metric: MetricData) -> None:
        """The table reads the metric from the model."""

    def on_training_end(self, model: Model, success: bool) -> None:
        """Count the epochs that a failed model will not train; tell a plain console."""
        self._progress.advance(self._task, model.training.epochs - len(model.history))
        if not self._console.is_terminal:
            what = format_metric(model.metric) if success else f"failed: {model.error}"
            self._console.print(plain(f"{model.model_id}: {what}"), soft_wrap=True)

    def _render(self) -> Group:
        return Group(self._progress, models_table(self._models, self._console.height - 8))


def models_table(models: Sequence[Model], rows: int) -> Table:
    """Models with status, epoch and last metric; the best first where they do not all fit."""
    table = Table("model", "status", "epoch", "metric")
    shown = list(models)
    if len(shown) > rows:
        shown = leaderboard_order(shown)[: max(rows, 3)]
    for model in shown:
        last = model.intermediate_metrics[-1] if model.intermediate_metrics else None
        epoch = f"{len(model.history)}/{model.training.epochs}"
        style = _STYLES[model.status]
        status = f"[{style}]{model.status.value}[/]"
        table.add_row(plain(model.model_id), status, epoch, format_metric(last))
    return table


def leaderboard_order(models: Sequence[Model]) -> list[Model]:
    """Best metric first; models without one last."""

    def key(model: Model) -> tuple[bool, float]:
        value = model.intermediate_metrics[-1] if model.intermediate_metrics else None
        if value is None or value != value:
            return True, 0.0
        return False, -value if model.training.mode == "max" else value

    return sorted(models, key=key)


def leaderboard(models: Sequence[Model], rows: int = 10) -> Table:
    """The best models, and why others have no metric."""
    table = Table("", "model", "metric", "val_loss", "arguments", title="Leaderboard")
    for place, model in enumerate(leaderboard_order(models)[:rows], start=1):
        loss = model.history[-1]["val_loss"] if model.history else None
        arguments = ", ".join(f"{key}={value}" for key, value in model.kwargs.items())
        numbers = format_metric(model.metric), format_metric(loss)
        table.add_row(str(place), plain(model.model_id), *numbers, plain(arguments))
    return table


def failures(models: Sequence[Model]) -> Table | None:
    """Models that did not train, with their errors; None when there are none."""
    failed = [model for model in models if model.error is not None]
    if not failed:
        return None
    table = Table("model", "status", "error", title="Not trained")
    for model in failed:
        table.add_row(plain(model.model_id), model.status.value, plain(model.error))
    return table


def merge_table(report: MergeReport) -> Table:
    """Nodes before and after each pass."""
    table = Table("pass", "nodes before", "nodes after", title="Merge")
    for name, before, after in report.passes:
        table.add_row(name, f"{before:,}", f"{after:,}")
    return table


def timeline_table(spent: Sequence[Spent]) -> Table:
    """Where the time went, over all trials; the journal has it for each."""
    table = Table("what", "seconds", "share", title="Where the time went")
    total = sum(one.total_s for one in spent) or 1.0
    for what in ("capture", "merge", "start", "lowering", "tuning", "training", "other"):
        seconds = sum(getattr(one, f"{what}_s") for one in spent)
        table.add_row(what, f"{seconds:.2f}", f"{seconds / total:.0%}")
    table.caption = f"{len(spent)} trial(s), added up; some may have run side by side"
    alone = [one.alone_s for one in spent]
    if spent and None not in alone:
        seconds = sum(one for one in alone if one is not None)
        table.caption += f"; one model after another: about {seconds:.1f} s"
    return table


def merge_lines(report: MergeReport) -> list[str]:
    """What is shared, in sentences."""
    lines = [
        f"{report.models} models: {report.captured} captured, {len(report.opaque)} opaque, "
        f"{len(report.aliases)} equal to another",
        f"loaders: {report.loaders_before} -> {report.loaders}",
        f"shared nodes beside inputs (stems, counters): {report.stems_shared}",
        f"fused across models: {report.grouped:,} nodes into {report.groups:,} operators",
        f"captured in {report.capture_s:.1f} s, merged in {report.merge_s:.2f} s",
    ]
    if report.estimate is not None:
        lines.append(f"estimated: {report.estimate}")
        if not report.estimate.merge:
            lines.append("so a search trains them one after another, in one trial")
    return lines + _reasons(report.opaque)


def _reasons(opaque: Mapping[str, str]) -> list[str]:
    return [f"{model} trains as an opaque lane: {reason}" for model, reason in opaque.items()]
