"""`cgo run SPEC.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cgo.cli.search import search
from cgo.engine import CGOEngine
from cgo.model import ModelStatus
from cgo.search_spec import load


def run(spec: Annotated[Path, typer.Argument(help="the search, a YAML file")]) -> None:
    """Run a search; exit code 1 when a model was not trained."""
    read = load(spec)
    models = read.build()
    options = read.engine
    with CGOEngine(
        options.experiment_dir,
        import_paths=options.import_paths,
        max_models=options.max_models,
        max_duration_s=options.max_duration_s,
    ) as engine:
        search(Console(), engine, models)
    if any(model.status is not ModelStatus.TRAINED for model in models):
        raise typer.Exit(1)
