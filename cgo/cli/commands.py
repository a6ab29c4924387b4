"""The commands and their options; what a command does is imported when it runs.

So help, and refusals of options, need not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train many small PyTorch models of a search as one merged graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Of `cgo.bench.families`, which needs torch.
FAMILIES = (
    "mlp", "cnn8", "cnn32", "cells", "cells-different-8", "cells-different-16",
    "cells-different-32", "encoders", "mixed",
)  # fmt: skip


@app.command()
def demo(
    experiment_dir: Annotated[
        Path | None, typer.Option(help="where the experiment goes; default: a new folder")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the digits")] = 8,
    skip_serial: Annotated[
        bool, typer.Option("--skip-serial", help="leave the serial baseline out")
    ] = False,
) -> None:
    """Search 24 different networks on handwritten digits, merged and one by one."""
    from cgo.cli.demo import demo

    _end(demo(experiment_dir, epochs, skip_serial))


@app.command()
def run(spec: Annotated[Path, typer.Argument(help="the search, a YAML file")]) -> None:
    """Run a search; exit code 1 when a model was not trained."""
    from cgo.cli.run import run

    _end(run(spec))


@app.command()
def explain(
    spec: Annotated[Path, typer.Argument(help="the search, a YAML file")],
    dump_graph: Annotated[bool, typer.Option("--dump", help="print the merged graph")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="estimate peak memory")] = False,
) -> None:
    """Show what a search would merge, and why not more, without training it."""
    from cgo.cli.explain import explain

    explain(spec, dump_graph, memory)


@app.command()
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
    from cgo.cli import bench

    if end_to_end:
        bench.whole_search(models, epochs, workers, json_file)
    else:
        bench.steps(family, models, json_file, method, rounds, threads)


def _end(well: bool) -> None:
    """End the command, with exit code 1 if it found that something is not as it should be."""
    if not well:
        raise typer.Exit(1)
