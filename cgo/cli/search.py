"""Running a search with a view of it; shared by `demo` and `run`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from cgo.cli import view
from cgo.engine import CGOEngine
from cgo.model import Model
from cgo.store import open_experiment
from cgo.timeline import timeline


def search(console: Console, engine: CGOEngine, models: Sequence[Model]) -> None:
    """Train the models and show them, then the leaderboard, what was merged, and
    where the time went."""
    with view.TrialView(console, models) as shown:
        engine.register_graph_listener(shown)
        engine.submit_models(*models)
        engine.wait_models(*models)
    console.print(view.leaderboard(models))
    if (failed := view.failures(models)) is not None:
        console.print(failed)
    for report in engine.reports:
        console.print(view.merge_table(report))
        for line in view.merge_lines(report):
            console.print(view.plain(line), soft_wrap=True)
    console.print(view.timeline_table(timeline(open_experiment(engine.experiment_dir))))
    console.print(view.plain(f"experiment: {engine.experiment_dir}"), soft_wrap=True)
