"""Merged steps of this version against another's, by turns: is anything slower than it was?

    python benchmarks/against.py --other OTHER/.venv/bin/python --out FILE

Each version runs in a process of its own environment, with its own empty table of costs. Both
prepare a family, then take turns in rounds; the ratio is the other's time over this one's, so that
above 1 this version is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, tuned_process

from cgo import bench
from cgo.bench.families import FAMILIES

#: A round takes as many steps as make up this time.
_ROUND_S = 0.25

#: What both versions run: prepares what a line says, then takes steps and answers with seconds.
_CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
from cgo.bench.families import FAMILIES
from cgo.bench.methods import all_methods
steps = None
for line in sys.stdin:
    asked = json.loads(line)
    started = time.perf_counter()
    if "family" in asked:
        steps = all_methods()["cgo"].prepare(FAMILIES[asked["family"]](asked["models"]))
        for _ in range(4):
            steps(1)
    else:
        steps(asked["steps"])
    print("took", time.perf_counter() - started, flush=True)
"""


class Version:
    """A version of the package in its own process."""

    def __init__(self, python: str, cache: Path) -> None:
        variables = {**os.environ, "CGO_CACHE": str(cache)}  # others as `tuned_process` set them
        variables.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [str(Path(python).absolute()), "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=cache,
        )

    def ask(self, **asked: Any) -> None:
        """Begin what is asked."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def __call__(self, **asked: Any) -> float:
        """Seconds of what is asked."""
        self.ask(**asked)
        return self.answer()

    def answer(self) -> float:
        """Seconds of what was asked."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("took "):
                return float(line.split()[1])
        raise SystemExit(f"{self._process.args}: ended with {self._process.wait()}")

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compared(family: str, models: int, pythons: Sequence[str], rounds: int) -> dict[str, Any]:
    """One family's steps, this version's and the other's."""
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder, name) for name in ("this", "other")]
        for cache in caches:
            cache.mkdir()
        versions = [Version(python, cache) for python, cache in zip(pythons, caches)]
        for version in versions:  # side by side
            version.ask(family=family, models=models)
        prepared = [version.answer() for version in versions]
        once = versions[0](steps=2) / 2
        steps = max(1, round(_ROUND_S / once))
        for version in versions:
            version(steps=steps)
        rows: list[tuple[float, float]] = []
        for index in range(rounds):
            order = versions if index % 2 else versions[::-1]
            found = {version: version(steps=steps) / steps for version in order}
            rows.append((found[versions[0]], found[versions[1]]))
        for version in versions:
            version.end()
    ratios = [other / this for this, other in rows]
    ratio, low, high = bench.summary(ratios)
    return {
        "family": family, "models": models, "ratio": ratio, "low": low, "high": high,
        "this_s": sorted(this for this, _ in rows)[rounds // 2],
        "other_s": sorted(other for _, other in rows)[rounds // 2],
        "prepared_s": prepared,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", required=True, help="Python of the other version's environment")
    parser.add_argument("--families", help="names with commas between; default is all")
    parser.add_argument("--models", default="8,32", help="numbers of models")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS / "against.json")
    options = parser.parse_args()
    families = options.families.split(",") if options.families else list(FAMILIES)
    found: list[dict[str, Any]] = []
    for family in families:
        for models in map(int, options.models.split(",")):
            row = compared(family, models, [sys.executable, options.other], options.rounds)
            found.append(row)
            print(
                f"{family}, {models}: {row['ratio']:.3f} [{row['low']:.3f} - {row['high']:.3f}]",
                flush=True,
            )
            record = {"benchmark": "against", **bench.environment(), "rows": found}
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tuned_process()
    main()
