"""`cgo bench`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cgo.bench import Record, environment, measure
from cgo.bench.families import FAMILIES
from cgo.platforms.local import default_workers, trial_environment

_STARTED = "CGO_BENCH_STARTED"


def steps(
    families: Sequence[str] | None,
    models: int,
    json_file: Path | None,
    methods: Sequence[str] | None,
    rounds: int,
    threads: int,
) -> None:
    """Measure training steps of models of some families, or of all."""
    _restart(threads)
    torch.set_num_threads(threads)
    console = Console()
    found: list[Record] = []
    for name in families or FAMILIES:

        def skipped(method: str, reason: str, name: str = name) -> None:
            console.print(f"{name}: no {method}: {reason}", highlight=False, soft_wrap=True)

        records = measure(name, models, methods=methods, rounds=rounds, skipped=skipped)
        console.print(_table(records))
        found += records
    _write(json_file, [record.as_json() for record in found])


def _write(json_file: Path | None, rows: list[dict[str, Any]]) -> None:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"benchmark": "bench", "records": rows, **environment()}
        json_file.write_text(json.dumps(document, indent=2) + "\n")


def whole_search(models: int, epochs: int, workers: int, json_file: Path | None) -> None:
    """Measure a search from end to end; of 0 workers, with as many as it would have."""
    from cgo.bench.end_to_end import measure as measure_search

    console, workers = Console(), workers or default_workers()
    found = measure_search(
        models, epochs=epochs, workers=workers, heard=lambda line: console.print(line)
    )
    table = Table("", "seconds", title=f"A whole search: {models} models, {epochs} epochs")
    table.add_row("serial, everything", f"{found.serial_s:.1f}")
    table.add_row(f"merged, everything, {workers} worker(s)", f"{found.merged_s:.1f}")
    for name, seconds in found.phases.items():
        table.add_row(f"  of it {name.removesuffix('_s')}", f"{seconds:.1f}")
    console.print(table)
    console.print(
        f"against serial: {found.ratio:.2f}x [{found.low:.2f} - {found.high:.2f}]",
        highlight=False,
    )
    _write(json_file, [found.as_json()])


def _restart(threads: int) -> None:
    """Run under the settings that a trial gets; they act only from the start of a process."""
    if os.environ.get(_STARTED) == str(threads):
        return
    extra = {_STARTED: str(threads), "OMP_NUM_THREADS": str(threads)}
    environment = trial_environment([], extra)
    os.execve(sys.executable, [sys.executable, "-m", "cgo", *sys.argv[1:]], environment)


def _table(records: Sequence[Record]) -> Table:
    table = Table("method", "ms a step", "against serial", "95% interval", "set-up",
                  title=f"{records[0].family}, {records[0].models} models")  # fmt: skip
    for record in sorted(records, key=lambda record: -record.ratio):
        table.add_row(
            record.method,
            f"{record.median_s * 1e3:.2f}",
            f"{record.ratio:.2f}x",
            f"{record.low:.2f} - {record.high:.2f}",
            f"{record.setup_s:.1f} s",
        )
    return table
