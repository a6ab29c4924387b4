"""`cgo run SPEC.yaml`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cgo.cli.search import search
from cgo.engine import CGOEngine
from cgo.model import ModelStatus
from cgo.search_spec import load


def run(spec: Path) -> bool:
    """Run the search of a YAML file; whether all its models were trained."""
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
    return all(model.status is ModelStatus.TRAINED for model in models)
