"""Trains wide networks in a process that may use only so much more memory than it has now."""

import json
import resource
import sys
from pathlib import Path

import psutil
import torch
from support.observers import Losses

import cgo
from cgo import trial
from cgo.planner import Planner

#: Of activations, (BATCH, width) in float32.
BATCH = 512


def wide(width):
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 10),
    )


def models(widths):
    data = cgo.DataSpec("support.data:digits", {"samples": 2 * BATCH, "validation": 64},
                        batch_size=BATCH)  # fmt: skip
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=2, optimizer_kwargs={"lr": 0.1})
    return [
        cgo.Model("support.short_of_memory:wide", {"width": width}, data=data, training=training,
                  seed=number, model_id=f"m{number}")
        for number, width in enumerate(widths)
    ]  # fmt: skip


def main(folder, widths, more_bytes):
    """Train, and write what was reported; `more_bytes` 0: as much as there is."""
    # Forced into one layout, all models are one program, whatever its size.
    settings = {"tuning": {"measure": False, "tape": False, "layout": "stacked"}}
    plan = Planner().plan(models(widths), folder, settings)
    if more_bytes:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, resource.RLIM_INFINITY))
    events, losses = [], Losses()
    trial.execute(plan.graph_data, folder=folder, report=events.append, observer=losses)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = {
        "ended": {e.model: e.value["error"] for e in events if e.kind == "ended"},
        "divided": [e.value for e in events if e.kind == "trial" and e.value["what"] == "divided"],
        "losses": losses.seen,
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
