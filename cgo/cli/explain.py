"""`cgo explain SPEC.yaml`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cgo.cli import view
from cgo.graph import dump
from cgo.planner import MergeReport, Plan, Planner
from cgo.search_spec import load


def explain(
    spec: Annotated[Path, typer.Argument(help="the search, a YAML file")],
    dump_graph: Annotated[bool, typer.Option("--dump", help="print the merged graph")] = False,
) -> None:
    """Show what a search would merge, and why not more, without training it."""
    models = load(spec).build()
    with tempfile.TemporaryDirectory(prefix="cgo-explain-") as folder:
        plan = Planner().plan(models, Path(folder))
    show(Console(), plan)
    if dump_graph and plan.graph_data is not None:
        print(dump(plan.graph_data.graph))


def show(console: Console, plan: Plan) -> None:
    """Print a merge plan."""
    console.print(view.merge_table(plan.report))
    lines = view.merge_lines(plan.report)
    lines += [f"{a} equals {twin}: trained once" for a, twin in plan.report.aliases.items()]
    lines += [f"{model} cannot be trained: {error}" for model, error in plan.failures.items()]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_unmerged(plan.report))


def _unmerged(report: MergeReport) -> Table:
    table = Table("operator", "nodes", "reason", "for example", title="Not merged")
    for family in report.unmerged:
        table.add_row(family.op, f"{family.nodes:,}", family.reason, family.example)
    return table
