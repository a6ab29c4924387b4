"""`cgo bench`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cgo.bench import Record, environment, measure
from cgo.bench.families import FAMILIES
from cgo.platforms.local import default_workers, trial_environment

_STARTED = "CGO_BENCH_STARTED"


def bench(
    family: Annotated[
        list[str] | None,
        typer.Option(help=f"one of {', '.join(FAMILIES)}; may be repeated; all if left out"),
    ] = None,
    models: Annotated[int, typer.Option(help="number of models")] = 32,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the records to this file")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="may be repeated; all but the compiled if left out")
    ] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds, at least 7")] = 9,
    threads: Annotated[int, typer.Option(help="threads of the process")] = 1,
    end_to_end: Annotated[
        bool,
        typer.Option("--end-to-end", help="a whole search, everything counted, instead of steps"),
    ] = False,
    epochs: Annotated[int, typer.Option(help="of the whole search")] = 10,
    workers: Annotated[
        int,
        typer.Option(help="trials side by side; 0: without a GPU one for each core"),
    ] = 0,
) -> None:
    """Measure a training step of many models: merged, and every way of doing without."""
    if end_to_end:
        _whole_search(models, epochs, workers or default_workers(), json_file)
        return
    _restart(threads)
    torch.set_num_threads(threads)
    console = Console()
    found: list[Record] = []
    for name in family or FAMILIES:

        def skipped(method: str, reason: str, name: str = name) -> None:
            console.print(f"{name}: no {method}: {reason}", highlight=False, soft_wrap=True)

        records = measure(name, models, methods=method, rounds=rounds, skipped=skipped)
        console.print(_table(records))
        found += records
    _write(json_file, [record.as_json() for record in found])


def _write(json_file: Path | None, rows: list[dict[str, Any]]) -> None:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"benchmark": "bench", "records": rows, **environment()}
        json_file.write_text(json.dumps(document, indent=2) + "\n")


def _whole_search(models: int, epochs: int, workers: int, json_file: Path | None) -> None:
    from cgo.bench.end_to_end import measure as measure_search

    console = Console()
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
