"""`cgo explain SPEC.yaml`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cgo.cli import view
from cgo.fusion import FusionReport, fusion_report
from cgo.graph import dump
from cgo.graph_data import GraphData
from cgo.machine import devices
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.unmerged import Family
from cgo.planner import Plan, Planner
from cgo.runtime.builder import Decision
from cgo.runtime.memory import Cache, estimate
from cgo.runtime.tuning import make_tuner
from cgo.search_spec import load
from cgo.text import printable
from cgo.tuning import Tuning

#: Steps to plan for: enough that everything may be measured that the settings allow.
_STEPS = 10**6

#: Rows of the longest table.
_MOST_ROWS = 30


def explain(spec: Path, dump_graph: bool, memory: bool) -> None:
    """Show what the search of a YAML file would merge, and why not more, without training it."""
    models = load(spec).build()
    with tempfile.TemporaryDirectory(prefix="cgo-explain-") as folder:
        planner = Planner()
        estimate = planner.estimated(models, devices()[0].device)
        plan = planner.plan(models, Path(folder))
        plan = replace(plan, report=replace(plan.report, estimate=estimate))
        show(Console(), plan)
        if memory and plan.graph_data is not None:
            _show_memory(Console(), plan.graph_data)
    if dump_graph and plan.graph_data is not None:
        print(printable(dump(plan.graph_data.graph)))


def show(console: Console, plan: Plan) -> None:
    """Print a merge plan."""
    console.print(view.merge_table(plan.report))
    lines = view.merge_lines(plan.report)
    lines += [f"{a} equals {twin}: trained once" for a, twin in plan.report.aliases.items()]
    lines += [f"{model} cannot be trained: {error}" for model, error in plan.failures.items()]
    for line in lines:
        console.print(view.plain(line), soft_wrap=True)
    console.print(_families("Not shared", plan.report.unmerged))
    if plan.graph_data is not None:
        tuner = make_tuner(Tuning(share=0.0), torch.device("cpu"), _STEPS)
        report = fusion_report(plan.graph_data.graph, BatchOperators(), tuner)
        _show_fusion(console, report)
        _show_times(console, report)


def _show_fusion(console: Console, report: FusionReport) -> None:
    """Print how one training step is executed."""
    table = Table(
        "operator", "nodes", "groups", "nodes a group", "executed as", "inputs repacked",
        title="Fused",
    )  # fmt: skip
    for row in report.fused:
        table.add_row(
            row.op, f"{row.nodes:,}", f"{len(row.sizes):,}", _sizes(row.sizes), row.form,
            f"{row.gathers:,}",
        )  # fmt: skip
    console.print(table)
    if report.repacked:
        console.print(_repacked(report.repacked))
    if report.loops:
        console.print(_families("Groups that run as loops", report.loops))
    if report.alone:
        console.print(_families("In no group", report.alone))
    fused = sum(row.nodes for row in report.fused)
    console.print(
        f"a training step: {report.nodes:,} nodes, {fused:,} of them fused into {report.groups:,} "
        f"operators; members' values are copied together for {report.gathers:,} of their inputs",
        highlight=False,
        soft_wrap=True,
    )


def _show_times(console: Console, report: FusionReport) -> None:
    """Print what groups were predicted to take, and what they take here."""
    table = Table(
        "operator", "executed as", "groups", "predicted ms", "measured ms", "error",
        title="Time of a training step, forward and backward",
    )  # fmt: skip
    for row in report.timings[:_MOST_ROWS]:
        table.add_row(
            row.op, row.form, f"{row.groups:,}", f"{row.predicted_s * 1e3:.3f}",
            f"{row.measured_s * 1e3:.3f}", f"{row.error:+.0%}",
        )  # fmt: skip
    console.print(table)
    predicted = sum(row.predicted_s for row in report.timings)
    measured = sum(row.measured_s for row in report.timings)
    if measured:
        console.print(
            f"all groups: predicted {predicted * 1e3:.2f} ms, measured {measured * 1e3:.2f} ms "
            f"({predicted / measured - 1:+.0%}); conversions and copies between them, predicted: "
            f"{report.repacking_s * 1e3:.2f} ms",
            highlight=False,
            soft_wrap=True,
        )


def _show_memory(console: Console, data: GraphData) -> None:
    """Print what training is estimated to take, merged and each model alone."""
    trainings = {entry.id: entry.training for entry in data.models if entry.opaque is None}
    if not trainings:
        return
    known: Cache = {}
    merged = estimate(data.graph, trainings, cache=known)
    alone = {m: estimate(data.graph, trainings, [m], cache=known) for m in trainings}
    table = Table("", "state", "one step on top", "peak", title="Estimated peak memory, in MB")
    largest = sorted(alone, key=lambda model: -alone[model].peak)[:_MOST_ROWS]
    rows = [("merged", merged), *((f"{model} alone", alone[model]) for model in largest)]
    for name, found in rows:
        on_top = found.peak - found.state
        table.add_row(
            view.plain(name), *(f"{size / 1e6:.2f}" for size in (found.state, on_top, found.peak))
        )
    if (rest := len(alone) - len(largest)) > 0:
        table.add_row(f"... and {rest:,} more", "", "", "")
    console.print(table)


def _repacked(decisions: Sequence[Decision]) -> Table:
    table = Table(
        "before operator", "of nodes", "inputs copied together", "first", title="Repacked"
    )
    for decision in decisions[:_MOST_ROWS]:
        size, gathers = str(decision.size), str(decision.gathers)
        table.add_row(decision.operator, size, gathers, view.plain(decision.example))
    if (rest := len(decisions) - _MOST_ROWS) > 0:
        table.add_row(f"... and {rest:,} more", "", "", "")
    return table


def _sizes(sizes: Sequence[int]) -> str:
    """`2 x 8, 5`: two groups of eight nodes and one of five."""
    counts = Counter(sizes)
    return ", ".join(f"{n} x {size}" if n > 1 else str(size) for size, n in counts.items())


def _families(title: str, families: Sequence[Family]) -> Table:
    table = Table("operator", "nodes", "reason", "for example", title=title)
    for family in families:
        reason, example = view.plain(family.reason), view.plain(family.example)
        table.add_row(family.op, f"{family.nodes:,}", reason, example)
    return table
