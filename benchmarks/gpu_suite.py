"""Check and measure merged training on a GPU, in at most eight minutes; one file of results.

    python benchmarks/gpu_suite.py
    python benchmarks/gpu_suite.py --device cpu --reduced      # that it runs; says nothing of a GPU
    python benchmarks/gpu_suite.py --markdown benchmarks/results/gpu_suite.json

Planning (capture and merging, which need no GPU) takes minutes of many cores. It can be done
before, on any machine; what is planned is then read:

    python benchmarks/gpu_suite.py --plan-only --plans FOLDER
    python benchmarks/gpu_suite.py --plans FOLDER

Sections run in processes of their own and are written as they end: one that fails, hangs or comes
too late says so in the results, and takes none of the others with it. The tests that need a GPU are
a command of their own, which is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
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
from gpu_report import NO_CUDA, markdown, summary
from gpu_sections import Job, Section, described, processes_for, sections
from gpu_workloads import SIZES

from cgo import bench
from cgo.platforms.local import MALLOC

RESULTS = Path(__file__).parent / "results"

#: With less time left, no section is begun.
_LEAST_S = 5.0

#: How long all others may be prepared before the first section is timed.
_PREPARE_S = 150.0

#: Seconds kept for each section that is prepared late, to be measured in.
_MEASURE_S = 8.0


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
        out: The file of results, written after each section.
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
        self.results: dict[str, Any] = {
            "benchmark": "gpu_suite",
            "reduced": size != "full",
            "cuda": cuda() if device == "cuda" else None,
            "note": "" if device == "cuda" else NO_CUDA,
            "environment": environment(device),
            "budget_s": budget_s,
            "scaling": "solo methods are measured on `sampled` models, and scaled to all of them; "
            "compiled ones by their ratio to eager ones of the same sample",
            "sections": {},
        }

    def run(self) -> dict[str, Any]:
        """Run them all; returns the results, which are written as well."""
        early = [section for section in self._chosen if not section.late]
        late = [section for section in self._chosen if section.late]
        try:
            for wave in (early, late):
                self._wave(wave)
        finally:
            for child in self._children.values():
                child.end()
        return self.results

    def _wave(self, wave: Sequence[Section]) -> None:
        if self._together and self._left() >= _LEAST_S:
            self._children |= {section.name: self._start(section) for section in wave}
        waited = not self._together
        for section in wave:
            if section.timed and not waited:
                self._prepare_all(wave)
                waited = True
            self._section(section)

    def _prepare_all(self, wave: Sequence[Section]) -> None:
        """Wait until nothing is prepared any more beside what is timed."""
        kept = _MEASURE_S * len(wave)
        until = min(time.monotonic() + _PREPARE_S, self._deadline - kept)
        for section in wave:
            if section.name in self._children:
                ready = self._children[section.name].wait_ready(until)
                if section.late and not ready:  # it would go on using the device
                    self._end(section, "out of time", "preparing it took too long")

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _section(self, section: Section) -> None:
        if section.name in self.results["sections"]:
            return
        if self._left() < _LEAST_S:
            budget_s = self.results["budget_s"]
            self._end(section, "skipped", f"the suite's {budget_s:g} s were spent before it")
            return
        self._tell(f"{section.name} ...")
        started = time.monotonic()
        if section.name not in self._children:
            self._children[section.name] = self._start(section)
        child, until = self._children[section.name], started + min(section.budget_s, self._left())
        done = child.wait_ready(until)
        child.go()
        if done and child.wait_end(until):
            self._end(section, child.status, None, started)
        else:
            stage = "being run" if child.status == READY else "being prepared"
            text = f"stopped after {until - started:.0f} s, while it was {stage}"
            self._end(section, "out of time", text, started)

    def _end(
        self, section: Section, status: str, error: str | None, started: float | None = None
    ) -> None:
        """Keep what a section found, and write everything."""
        child = self._children.pop(section.name, None)
        figures: dict[str, Any] = {"status": status}
        if started is not None:
            figures["seconds"] = time.monotonic() - started
        if child is not None:
            child.end()
            figures |= child.figures
        if error is not None:
            figures["error"] = error
        self.results["sections"][section.name] = figures
        self._tell(f"{section.name}: {status} {figures.get('error', '')}".rstrip())
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
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_suite.json")
    parser.add_argument("--only", help="names of sections, with commas between")
    parser.add_argument("--rounds", type=int, default=5, help="of interleaved timing")
    parser.add_argument("--plans", type=Path, help="a folder of plans: read, or made and kept")
    parser.add_argument("--plan-only", action="store_true", help="make plans and measure nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print FILE as a table")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # be this section's process
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
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


def _starter(options: argparse.Namespace, plans: Path, cache: Path) -> Callable[[Section], Child]:
    def start(section: Section) -> Child:
        command = [
            sys.executable, str(Path(__file__).resolve()), "--section", section.name,
            "--device", options.device, "--size", options.size, "--rounds", str(options.rounds),
            "--folder", str((plans / section.name.replace(":", "-")).resolve()),
        ]  # fmt: skip
        tables = {"CGO_CACHE": str(cache)}  # costs are measured in this run
        return Child(command, {**MALLOC, "OMP_NUM_THREADS": "1", **tables,
                               **dict(section.environment)})  # fmt: skip

    return start


def plan_only(chosen: Sequence[Section], start: Callable[[Section], Child]) -> int:
    """Prepare the sections that need no device for it; returns how many failed."""
    failed = 0
    for section in chosen:
        if section.late:
            continue
        child = start(section)
        child.wait_ready(math.inf)
        child.end()
        failed += child.status != READY
        print(f"{section.name}: {child.figures.get('error', 'planned')}", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text())), end="")
        return 0
    if options.section is not None:
        torch.set_num_threads(1)
        section = next(s for s in sections(options.device) if s.name == options.section)
        job = Job(options.device, options.size, options.folder,
                  processes_for(section, options.size), options.rounds)  # fmt: skip
        serve(section, job)
        return 0
    if options.device == "cuda" and not options.plan_only and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; `--device cpu --reduced` shows that the suite runs")
    torch.set_num_threads(1)
    out = options.out or RESULTS / "gpu_suite.json"
    with tempfile.TemporaryDirectory(prefix="cgo-suite-") as folder:
        start = _starter(options, options.plans or Path(folder), Path(folder) / "cache")
        if options.plan_only:
            return int(plan_only(_chosen(options), start) > 0)
        chosen = _chosen(options)
        found = Suite(chosen, options.device, options.size, out, options.budget_s, start).run()
    print(f"results: {out}; the tests that need a GPU: python -m pytest -m gpu")
    return int(any(figures["status"] != "ok" for figures in found["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
