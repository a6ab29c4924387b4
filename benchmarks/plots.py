"""Draws `results/bench-<family>.png`: each method's ratio to the serial loop by number of models.

Reads all records of `cgo bench` in `results/bench-*.json`; needs `pip install '.[bench]'`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")

RESULTS = Path(__file__).parent / "results"


def records() -> dict[str, list[dict[str, Any]]]:
    """All records, by family."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(RESULTS.glob("bench-*.json")):
        for record in json.loads(path.read_text())["records"]:
            found[record["family"]].append(record)
    return found


def draw(family: str, rows: list[dict[str, Any]], path: Path) -> None:
    """One plot: a line a method, with its 95% interval."""
    methods: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["models"]):
        methods[row["method"]].append(row)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method, found in methods.items():
        ours = method.startswith("cgo")
        axes.errorbar(
            [row["models"] for row in found],
            [row["ratio"] for row in found],
            yerr=[
                [row["ratio"] - row["low"] for row in found],
                [row["high"] - row["ratio"] for row in found],
            ],
            label=method,
            marker="o",
            markersize=4,
            linewidth=2.5 if ours else 1,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["models"] for row in rows}))
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set(xlabel="models", ylabel="times the plain serial loop", title=family)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Draw all families."""
    for family, rows in records().items():
        draw(family, rows, RESULTS / f"bench-{family}.png")


if __name__ == "__main__":
    main()
