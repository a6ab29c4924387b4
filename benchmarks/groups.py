"""How grouping scales, and how wide the groups are: random NAS-Bench-201 networks, all different.

    python benchmarks/groups.py [--models 256] [--cells 5] [--draws 10]

Writes `results/groups.json` and the plot `results/groups.png`.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
from collections.abc import Sequence
from typing import Any

import common
import matplotlib
import merge_scale

from cgo.graph import Graph, verify
from cgo.passes.batch_operators import BatchOperators, operators
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge

matplotlib.use("Agg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=256)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    common.tuned_process()
    small = [widths(merged(captured(8, 1, seed))) for seed in range(options.draws)]
    graphs = captured(options.models, options.cells, 0)
    sizes = [options.models // part for part in (32, 16, 8, 4, 2, 1)]
    rows = [scale(graphs[:size]) for size in sizes]
    plot(rows)
    common.write(
        "groups",
        {
            "eight_models_one_cell": {
                "draws": options.draws,
                "nodes_a_group": statistics.mean(row["nodes_a_group"] for row in small),
                "least": min(row["nodes_a_group"] for row in small),
            },
            "cells_a_stage": options.cells,
            "scale": rows,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        },
    )


def captured(count: int, cells: int, seed: int) -> list[Graph]:
    """Graphs of different networks."""
    return merge_scale.capture(merge_scale.candidates(count, cells, seed))[0]


def merged(graphs: Sequence[Graph]) -> Graph:
    """The merged graph that `BatchOperators` gets."""
    return dedup_stems(dedup_inputs(merge(graphs)))


def widths(graph: Graph) -> dict[str, float]:
    """How many nodes and convolutions of the training program stand in one group."""
    training = [n for n in operators(BatchOperators()(graph)) if "/train/" in n.name]
    convolutions = [node for node in training if "conv" in node.op]
    return {
        "nodes_a_group": len(training) / len({node.group or node.name for node in training}),
        "convolutions_a_group": len(convolutions)
        / len({node.group or node.name for node in convolutions}),
    }


def scale(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Seconds of the pass for that many models."""
    graph = merged(graphs)
    gc.collect()
    seconds = common.seconds(lambda: BatchOperators()(graph))
    verified = BatchOperators()(graph)
    return {
        "models": len(graphs),
        "nodes": len(operators(graph)),
        "training_nodes": sum("/train/" in node.name for node in operators(graph)),
        "pass_s": round(seconds, 3),
        "verify_s": round(common.seconds(lambda: verify(verified)), 3),
        **widths(graph),
    }


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """Seconds over nodes, beside a straight line through the origin and the last point."""
    from matplotlib import pyplot

    nodes, seconds = [row["nodes"] for row in rows], [row["pass_s"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(nodes, seconds, "o-", label="batch_operators")
    axes.plot([0, nodes[-1]], [0, seconds[-1]], "--", color="gray", label="linear")
    axes.set(xlabel="nodes, training and evaluation", ylabel="seconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(common.RESULTS / "groups.png", dpi=120)


if __name__ == "__main__":
    main()
