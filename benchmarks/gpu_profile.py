"""Kernels of merged steps, workload by workload, in one file of text.

    python benchmarks/gpu_profile.py --plans FOLDER --out FILE cnn heads
    python benchmarks/gpu_profile.py --device cpu --size reduced --plans FOLDER --out FILE cnn

Each workload's table is written before the next is begun; one that fails says why in its place, and
the command then ends with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import gpu_methods
import torch
from gpu_counting import synchronize
from gpu_plans import Place, plan
from gpu_workloads import SIZES, WORKLOADS
from torch.profiler import ProfilerActivity, profile

_FIRST, _TIMED, _PROFILED = 6, 20, 3


def profiled(name: str, size: str, plans: Path, device: torch.device, out: TextIO) -> None:
    """Write a workload's first steps, what it was told, and the table of its kernels."""
    models = WORKLOADS[name].build(size)
    data = plan(models, Place(plans / name), lambda part: None)
    started = time.perf_counter()

    def tell(what: str, **figures: Any) -> None:
        line = json.dumps({"what": what, **figures}, default=str)
        print(f"  at {time.perf_counter() - started:.1f} s: {line[:600]}", file=out)

    steps = gpu_methods.merged_steps(models, device, data, tell)
    firsts = [_seconds(lambda: steps(1), device) for _ in range(_FIRST)]
    print("  first steps, s:", ", ".join(f"{s:.3f}" for s in firsts), file=out)
    synchronize(device)
    began = time.perf_counter()
    steps(_TIMED)
    host_s = (time.perf_counter() - began) / _TIMED
    synchronize(device)
    step_s = (time.perf_counter() - began) / _TIMED
    print(f"step {1e3 * step_s:.3f} ms, of it the host {1e3 * host_s:.3f} ms", file=out)
    _table(lambda: steps(_PROFILED), device, out)


def _seconds(action: Any, device: torch.device) -> float:
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def _table(action: Any, device: torch.device, out: TextIO) -> None:
    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as seen:
        action()
        synchronize(device)
    rows = seen.key_averages()
    print(f"{_PROFILED} steps: {sum(row.count for row in rows)} events", file=out)
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(rows.table(sort_by=key, row_limit=40, max_name_column_width=110), file=out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="+", choices=tuple(WORKLOADS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--plans", type=Path, required=True, help="read, or made and kept")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    failed = 0
    with options.out.open("w", buffering=1) as out:
        for name in options.workloads:
            print(f"== {name} ==", file=out)
            try:
                profiled(name, options.size, options.plans, torch.device(options.device), out)
            except Exception:  # the next one is profiled all the same
                traceback.print_exc(file=out)
                failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
