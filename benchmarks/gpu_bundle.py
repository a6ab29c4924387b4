"""Make the folder that a machine with a GPU and nothing else needs: `make gpu-bundle`.

    python benchmarks/gpu_bundle.py --folder build/gpu-bundle --wheels dist

It holds the wheel of the project, the wheels that such a machine lacks, the suite with the tests
that need a GPU, plans of all models, and the stages. Plans take minutes of many processors; those
that are there and still fit are kept, so what was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_suite
import torch
from gpu_children import READY
from gpu_plans import code_digest
from gpu_sections import sections
from gpu_workloads import SIZES

from cgo.graph_data import VERSION

ROOT = Path(__file__).resolve().parents[1]

#: What a machine with torch and the usual packages lacks; the index decides which versions go
#: together.
CARRIED = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection",
           "typing-extensions>=4.16")  # fmt: skip

#: A machine that is lent takes no more.
MOST_BYTES = 64 * 2**20

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
              "manylinux2014_x86_64")  # fmt: skip

_MARK = "mark.gpu"


class BundleError(Exception):
    """A bundle that cannot be made; says why."""


def carry_wheels(folder: Path, built: Path, python: str) -> list[str]:
    """Put the project's wheel and those it needs into `folder`, and nothing else.

    Args:
        folder: Of wheels; replaced as a whole.
        built: Where the project's wheel lies.
        python: The version of Python there, such as "3.12".

    Returns:
        Their names.

    Raises:
        BundleError: there is not one wheel of the project, or the index has none of the others.
    """
    own = sorted(built.glob("cgo_engine-*.whl"))
    if len(own) != 1:
        raise BundleError(f"{built} has {len(own)} wheels of the project; run `make wheel`")
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        wheels = Path(fresh) / "wheels"
        wheels.mkdir()
        shutil.copy2(own[0], wheels)
        download(wheels, python)
        if folder.exists():
            shutil.rmtree(folder)
        wheels.rename(folder)
    return sorted(path.name for path in folder.iterdir())


def download(folder: Path, python: str) -> None:
    """Fetch the carried wheels, in versions that go together, for Linux on x86-64.

    Raises:
        BundleError: pip's own words.
    """
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:",
         "--python-version", python, "--implementation", "cp", *platforms,
         "--dest", str(folder), *CARRIED],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise BundleError(f"pip cannot fetch {', '.join(CARRIED)}: {done.stderr.strip()[-2000:]}")


def carry_suite(folder: Path, root: Path = ROOT) -> list[str]:
    """Copy the benchmarks and the tests, and list the files of tests that need a GPU.

    Returns:
        These files' paths in the folder.
    """
    if folder.exists():
        shutil.rmtree(folder)
    unwanted = shutil.ignore_patterns("__pycache__", "nni", ".*")
    shutil.copytree(root / "tests", folder / "tests", ignore=unwanted)
    (folder / "benchmarks").mkdir()
    for path in sorted((root / "benchmarks").glob("*.py")):
        shutil.copy2(path, folder / "benchmarks")
    shutil.copy2(root / "pyproject.toml", folder)
    found = [
        path.relative_to(folder).as_posix()
        for path in sorted((folder / "tests").rglob("test_*.py"))
        if _MARK in path.read_text()
    ]
    (folder / "gpu_tests.txt").write_text("\n".join(found) + "\n")
    return found


def carry_stages(folder: Path, root: Path = ROOT) -> None:
    """Copy the scripts that are run there."""
    for path in sorted((root / "benchmarks" / "gpu_stages").glob("*.sh")):
        shutil.copy2(path, folder)


def carry_plans(folder: Path, size: str) -> dict[str, dict[str, Any]]:
    """Plan every section that needs it, side by side; what is there and still fits is kept.

    Returns:
        For each section whether it was there, wall seconds and figures.

    Raises:
        BundleError: sections that could not be planned, and why.
    """
    chosen = [section for section in sections("cuda") if section.plans]
    with tempfile.TemporaryDirectory(prefix="cgo-bundle-") as cache:
        start = gpu_suite.starter("cuda", size, folder, Path(cache), renew=True)
        found = gpu_suite.plan_only(chosen, start, *gpu_suite.room(size), tell=_say)
    for stale in {path.name for path in folder.iterdir()} - {section.name for section in chosen}:
        shutil.rmtree(folder / stale)
    if wrong := {n: f["error"] for n, f in found.items() if f["status"] != READY}:
        raise BundleError(f"not planned: {json.dumps(wrong, indent=1)}")
    return found


def size_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_size(folder: Path, most_bytes: int = MOST_BYTES) -> dict[str, int]:
    """Bytes of the parts of a bundle, and of it all.

    Raises:
        BundleError: they are too many; names the largest parts.
    """
    parts = {
        path.name: size_bytes(path) if path.is_dir() else path.stat().st_size
        for path in sorted(folder.iterdir())
    }
    total = sum(parts.values())
    if total > most_bytes:
        largest = sorted(parts, key=lambda name: -parts[name])[:3]
        told = ", ".join(f"{name} {parts[name]:,}" for name in largest)
        raise BundleError(
            f"{folder} has {total:,} bytes, at most {most_bytes:,} are taken; largest: {told}"
        )
    return {**parts, "total": total}


def check_ignored(folder: Path, root: Path = ROOT) -> None:
    """A bundle is no part of the repository.

    Raises:
        BundleError: git would add it.
    """
    inside = folder.resolve().is_relative_to(root.resolve())
    if not inside or not (root / ".git").exists():
        return
    done = subprocess.run(["git", "check-ignore", "-q", str(folder.resolve())], cwd=root)
    if done.returncode == 1:
        raise BundleError(f"git does not ignore {folder}; choose a folder under build/")


def make(folder: Path, built: Path, size: str, python: str) -> dict[str, Any]:
    """Make a bundle, or bring the one that is there up to date; returns its manifest."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    check_ignored(folder)
    wheels = carry_wheels(folder / "wheels", built, python)
    tests = carry_suite(folder / "suite")
    carry_stages(folder)
    (folder / "plans").mkdir(exist_ok=True)
    plans = carry_plans(folder / "plans", size)
    own = next(name for name in wheels if name.startswith("cgo_engine-"))
    manifest = {
        "size": size,
        "document_version": VERSION,
        "planning_code": code_digest(),
        "wheels": wheels,
        "wheel_sha256": hashlib.sha256((folder / "wheels" / own).read_bytes()).hexdigest(),
        "test_files": len(tests),
        "planned_with_torch": torch.__version__,
        "processors": os.cpu_count(),
        "plans": {
            name: {"seconds": round(figures["seconds"], 1), **_kept_figures(figures)}
            for name, figures in plans.items()
        },
        "made_in_s": round(time.monotonic() - started, 1),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _kept_figures(figures: dict[str, Any]) -> dict[str, Any]:
    wanted = (
        "planned_before",
        "plan_s",
        "plan_cpu_s",
        "captured",
        "nodes",
        "groups",
        "capture_processes",
    )
    return {key: figures[key] for key in wanted if key in figures}


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist", help="where `make wheel` put")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--python", default="3.12", help="the version of Python there")
    parser.add_argument("--record", type=Path, help="write planning's wall times to this file")
    options = parser.parse_args(arguments)
    try:
        manifest = make(options.folder, options.wheels, options.size, options.python)
        parts = check_size(options.folder)
    except BundleError as error:
        print(f"no bundle: {error}", file=sys.stderr)
        return 1
    if options.record is not None:
        options.record.write_text(json.dumps({**manifest, "bytes": parts}, indent=1) + "\n")
    for name, size in parts.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"bundle: {options.folder}; there: bash {options.folder.name}/run.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
