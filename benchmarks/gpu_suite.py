"""Check and measure merged training on a GPU, in at most seven minutes; one file of results.

    python benchmarks/gpu_suite.py
    python benchmarks/gpu_suite.py --device cpu --reduced      # that it runs; says nothing of a GPU
    python benchmarks/gpu_suite.py --markdown benchmarks/results/gpu_suite.json

Planning (capture and merging, which need no GPU) takes minutes of many cores. It can be done
before, on any machine; what is planned is then read:

    python benchmarks/gpu_suite.py --plan-only --plans FOLDER
    python benchmarks/gpu_suite.py --plans FOLDER

Sections run in processes of their own, and each figure is written when it is found: a section that
fails, hangs or comes too late says so in the results and takes none of the others with it, and the
suite then ends with 1. A summary is printed last, at an interrupt too. The tests that need a GPU
are a command of their own, which is printed as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_children import READY, Child, serve
from gpu_plans import Place
from gpu_report import NO_CUDA, markdown, page, summary
from gpu_sections import Job, Section, described, processes_for, sections
from gpu_workloads import SIZES

from cgo import bench
from cgo.platforms.local import MALLOC

RESULTS = Path(__file__).parent / "results"

#: With less time left, no section is begun.
_LEAST_S = 5.0

#: How long all others may still be prepared when the first section is to be timed.
_PREPARE_S = 60.0

#: Seconds kept for each section, to be measured in.
_MEASURE_S = 8.0

#: How long the planner waits for one section before it looks at the next.
_POLL_S = 0.2

#: Seconds of one processor that full-size plans take, roughly: the longest are begun first.
_PLANNING = {"narrow": 300.0, "cells": 400.0, "heads": 60.0, "stored": 60.0, "wide": 50.0,
             "mix": 60.0, "encoders": 30.0, "equivalence": 40.0}  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Versions, and what this machine is."""
    found = {**bench.environment(), "system": platform.platform(), "device_used": device}
    for package in ("numpy", "triton", "cgo-engine"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cuda() -> dict[str, Any]:
    """The CUDA device, its driver, and what torch is set to."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "total_memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown: {described(error)}"


class Suite:
    """Runs sections one after another and keeps what they find.

    Args:
        chosen: The sections.
        device: "cuda" or "cpu".
        size: Of the workloads.
        out: The file of results, written after each figure.
        budget_s: For everything; what is then left is skipped.
        start: Starts a section's process.
        tell: Hears of each section.
    """

    def __init__(
        self,
        chosen: Sequence[Section],
        device: str,
        size: str,
        out: Path,
        budget_s: float,
        start: Callable[[Section], Child],
        tell: Callable[[str], None] = print,
    ) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + budget_s
        self._chosen, self._out, self._start, self._tell = chosen, out, start, tell
        self._together = device == "cuda"  # on a CPU preparing would disturb what is measured
        self._children: dict[str, Child] = {}
        self._ended: set[str] = set()
        self._now = ""  # the section that has the device
        self.results: dict[str, Any] = {
            "benchmark": "gpu_suite",
            "reduced": size != "full",
            "cuda": cuda() if device == "cuda" else None,
            "note": "" if device == "cuda" else NO_CUDA,
            "environment": environment(device),
            "budget_s": budget_s,
            "scaling": "solo methods are measured on `sampled` models and scaled to all of them by "
            "their calls of operators; compiled ones by their ratio to eager ones of their sample",
            "sections": {},
        }

    def run(self) -> dict[str, Any]:
        """Run them all; returns the results, which are written as well.

        An interrupt ends it early, with all that was found so far.
        """
        try:
            self._run()
        except KeyboardInterrupt:
            for section in self._chosen:
                status = "interrupted" if section.name == self._now else "skipped"
                self._end(section, status, "the suite was interrupted")
        finally:
            for child in self._children.values():
                child.end()
        return self.results

    def _run(self) -> None:
        if self._together:
            self._begin(self._chosen)
        waited, again = not self._together, []
        for section in self._chosen:
            if section.timed and not waited:
                again = self._prepare_all(self._chosen, _PREPARE_S)
                waited = True
            if section not in again:
                self._section(section)
        if again:
            self._begin(again)
            self._prepare_all(again, math.inf)
        for section in again:
            self._section(section, "preparing it took too long, twice")

    @property
    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = self.results["sections"]
        return found

    def _begin(self, chosen: Sequence[Section]) -> None:
        """Start processes that prepare side by side."""
        if self._left() >= _LEAST_S:
            self._children |= {section.name: self._launch(section) for section in chosen}

    def _launch(self, section: Section) -> Child:
        child = self._start(section)
        child.heard = lambda: self._note(section.name, child)
        return child

    def _prepare_all(self, chosen: Sequence[Section], most_s: float) -> list[Section]:
        """Wait until nothing is prepared any more beside what is timed.

        Returns:
            Sections that use the device to prepare, and took too long: they are stopped, to be
            begun again when the others are done.
        """
        until = min(time.monotonic() + most_s, self._deadline - _MEASURE_S * len(chosen))
        late = []
        for section in chosen:
            child = self._children.get(section.name)
            if child is not None and not child.wait_ready(until) and not section.plans:
                self._tell(f"{section.name}: stopped for now, preparing it takes too long")
                self._children.pop(section.name).end()
                late.append(section)
        return late

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _section(self, section: Section, why_none: str | None = None) -> None:
        """Run one; with `why_none`, only if its process is there."""
        if why_none is not None and section.name not in self._children:
            self._end(section, "out of time", why_none)
            return
        if self._left() < _LEAST_S:
            budget_s = self.results["budget_s"]
            self._end(section, "skipped", f"the suite's {budget_s:g} s were spent before it")
            return
        started, self._now = time.monotonic(), section.name
        self._tell(f"{started - self._started:6.1f} s  {section.name} ...")
        if section.name not in self._children:
            self._children[section.name] = self._launch(section)
        child, until = self._children[section.name], started + min(section.budget_s, self._left())
        done = child.wait_ready(until)
        child.go()
        if done and child.wait_end(until):
            self._end(section, child.status, None, started)
        else:
            child.show()
            stage = "being run" if child.status == READY else "being prepared"
            text = f"stopped after {until - started:.0f} s, while it was {stage}"
            self._end(section, "out of time", text, started)

    def _note(self, name: str, child: Child) -> None:
        """Keep what a section has found so far."""
        self._found[name] = {"status": child.status or "running", **child.figures}
        self._write()

    def _end(
        self, section: Section, status: str, error: str | None, started: float | None = None
    ) -> None:
        """Keep what a section found, and write everything."""
        if section.name in self._ended:
            return
        self._ended.add(section.name)
        child = self._children.pop(section.name, None)
        figures: dict[str, Any] = {"status": status}
        if started is not None:
            figures["seconds"] = time.monotonic() - started
        if child is not None:
            child.end()
            figures |= child.figures
        if error is not None:
            figures["error"] = error
        self._found.pop(section.name, None)  # in the order in which they end
        self._found[section.name] = figures
        spent_s = time.monotonic() - self._started
        self._tell(
            f"{spent_s:6.1f} s  {section.name}: {status} {figures.get('error', '')}".rstrip()
        )
        self._write()

    def _write(self) -> None:
        self.results["spent_s"] = time.monotonic() - self._started
        self.results["summary"] = summary(self.results)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        partial = self._out.with_suffix(".part")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self._out)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--reduced", action="store_true", help="few and small models")
    parser.add_argument("--budget-s", type=float, default=400.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_suite.json")
    parser.add_argument("--only", help="names of sections, with commas between")
    parser.add_argument("--rounds", type=int, default=5, help="of interleaved timing")
    parser.add_argument("--plans", type=Path, help="a folder of plans: read, or made and kept")
    parser.add_argument("--plan-only", action="store_true", help="make plans and measure nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print FILE as a table")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # be this section's process
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--renew", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.size = options.size or ("reduced" if options.reduced else "full")
    if options.plan_only and options.plans is None:
        parser.error("--plan-only: give the folder, --plans")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    return options


def _chosen(options: argparse.Namespace) -> list[Section]:
    """The sections that were asked for.

    Raises:
        SystemExit: one of them is not known.
    """
    known = sections(options.device)
    if options.only is None:
        return known
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - {section.name for section in known}):
        names = ", ".join(section.name for section in known)
        raise SystemExit(f"--only: {', '.join(unknown)} is none of {names}")
    return [section for section in known if section.name in wanted]


def starter(
    device: str, size: str, plans: Path, cache: Path, *, rounds: int = 5, renew: bool = False
) -> Callable[[Section], Child]:
    """What starts a section's process.

    Args:
        device: "cuda" or "cpu".
        size: Of the workloads.
        plans: The folder of all plans.
        cache: Where costs are kept that are measured in this run.
        rounds: Of interleaved timing.
        renew: Whether plans that no longer fit are made anew.
    """

    def start(section: Section) -> Child:
        command = [
            sys.executable, str(Path(__file__).resolve()), "--section", section.name,
            "--device", device, "--size", size, "--rounds", str(rounds),
            "--folder", str((plans / section.name.replace(":", "-")).resolve()),
            *(["--renew"] if renew else []),
        ]  # fmt: skip
        # The path begins with this script's folder, where its other modules are.
        variables = {"OMP_NUM_THREADS": "1", "CGO_CACHE": str(cache), "PYTHONSAFEPATH": ""}
        return Child(command, {**MALLOC, **variables, **dict(section.environment)})

    return start


def plan_only(
    chosen: Sequence[Section],
    start: Callable[[Section], Child],
    wanted: Callable[[str], int] = lambda name: 1,
    processors: int = 1,
    tell: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Prepare the sections that need no device for it, as many side by side as there is room for.

    Args:
        chosen: The sections; the costliest are begun first.
        start: Starts a section's process.
        wanted: Processors that a section keeps busy.
        processors: How many there are.
        tell: Hears of each section.

    Returns:
        For each section its status, wall seconds and figures.
    """
    pending = sorted((s for s in chosen if s.plans), key=lambda s: -_PLANNING.get(s.name, 0.0))
    running: dict[str, tuple[Child, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        while pending or running:
            taken = sum(wanted(name) for name in running)
            while pending and (not running or taken + wanted(pending[0].name) <= processors):
                section = pending.pop(0)
                running[section.name] = start(section), time.monotonic()
                taken += wanted(section.name)
            for name, (child, started) in list(running.items()):
                if child.wait_ready(time.monotonic() + _POLL_S):
                    del running[name]
                    child.end()
                    seconds = time.monotonic() - started
                    found[name] = {"status": child.status, "seconds": seconds, **child.figures}
                    tell(f"{name}: {child.figures.get('error', 'planned')}, {seconds:.1f} s")
    finally:
        for child, _ in running.values():
            child.end()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text())), end="")
        return 0
    torch.set_num_threads(1)
    if options.section is not None:
        return _be_section(options)
    if options.device == "cuda" and not options.plan_only and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; `--device cpu --reduced` shows that the suite runs")
    with tempfile.TemporaryDirectory(prefix="cgo-suite-") as folder:
        start = starter(options.device, options.size, options.plans or Path(folder) / "plans",
                        Path(folder) / "cache", rounds=options.rounds,
                        renew=options.plan_only)  # fmt: skip
        if options.plan_only:
            found = plan_only(_chosen(options), start, *room(options.size))
            return int(any(figures["status"] != READY for figures in found.values()))
        return _measure(options, start)


def _be_section(options: argparse.Namespace) -> int:
    section = next(s for s in sections(options.device) if s.name == options.section)
    processes = processes_for(section.name, options.size)
    place = Place(options.folder, processes, options.renew)
    serve(section, Job(options.device, options.size, place, options.rounds))
    return 0


def room(size: str) -> tuple[Callable[[str], int], int]:
    """Processors that a section's planning keeps busy, and how many there are."""
    return lambda name: processes_for(name, size), os.cpu_count() or 1


def _measure(options: argparse.Namespace, start: Callable[[Section], Child]) -> int:
    """Run the suite; its summary is the last that is printed, whatever ends it."""
    out = options.out or RESULTS / "gpu_suite.json"
    # So that a limit (`timeout` sends it) ends the suite as an interrupt does.
    signal.signal(signal.SIGTERM, lambda number, frame: _interrupt())
    suite = Suite(_chosen(options), options.device, options.size, out, options.budget_s, start,
                  lambda line: print(line, flush=True))  # fmt: skip
    found = suite.run()
    print(f"results: {out}; the tests that need a GPU: python -m pytest -m gpu\n")
    print(page(found), end="", flush=True)
    return int(any(figures["status"] != "ok" for figures in found["sections"].values()))


def _interrupt() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
