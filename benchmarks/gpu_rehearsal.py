"""Run a bundle's stages as a bare machine would, on the CPU: `make gpu-rehearsal`.

    python benchmarks/gpu_rehearsal.py --bundle FOLDER --python PYTHON --log FILE

The bundle is copied to a folder of its own and run there by another Python, with nothing of this
environment's variables, no repository and no network: in a network namespace of its own where the
system permits that, else with a package index and a proxy that lead nowhere. The log is printed and
kept; at its end stand sizes, times and what was found wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from gpu_bundle import MOST_BYTES, size_bytes

#: Tests that need a GPU, at least.
LEAST_TESTS = 32

#: Seconds that the stages may take.
STAGE_S = {"stage1": 260.0, "stage2": 400.0}

#: What a skipped test says where there is no device; any other reason is wrong.
_NO_DEVICE = "no CUDA device"

_NOWHERE = "http://127.0.0.1:9"


def offline() -> tuple[list[str], str]:
    """What a command is put behind so that it has no network, and in words."""
    try:
        done = subprocess.run(["unshare", "-n", "true"], capture_output=True)
        if done.returncode == 0:
            return ["unshare", "-n"], "in a network namespace of its own"
    except OSError:
        pass  # there is no such command
    return [], "with a package index and a proxy that lead nowhere"


def environment(python: Path, home: Path, out: Path) -> dict[str, str]:
    """All variables that a stage gets."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8",
        "PY": str(python), "OUT": str(out), "SHM": str(home), "DEVICE": "cpu", "SIZE": "reduced",
        "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "http_proxy": _NOWHERE, "https_proxy": _NOWHERE,
    }  # fmt: skip


def rehearse(bundle: Path, python: Path, log: TextIO) -> tuple[Path, dict[str, float], list[str]]:
    """Run both stages.

    Returns:
        The folder of results (the caller's to remove), seconds by stage, and what was wrong.
    """
    place = Path(tempfile.mkdtemp(prefix="cgo-rehearsal-"))
    shutil.copytree(bundle, place / "bundle")
    (place / "home").mkdir()
    (place / "here").mkdir()  # where the stages are called from: nothing is in it
    out = place / "out"
    prefix, how = offline()
    print(f"offline {how}", file=log, flush=True)
    seconds, wrong = {}, []
    names = {str(place): "PLACE", str(python.parents[1]): "ENVIRONMENT"}
    for stage in STAGE_S:
        began = time.monotonic()
        code = _run([*prefix, "bash", str(place / "bundle" / f"{stage}.sh")], place / "here",
                    environment(python, place / "home", out), log, names)  # fmt: skip
        seconds[stage] = time.monotonic() - began
        if code:
            wrong.append(f"{stage} ended with {code}")
    return place, seconds, wrong


def _run(
    command: list[str],
    here: Path,
    variables: dict[str, str],
    log: TextIO,
    names: Mapping[str, str],
) -> int:
    """Run a command, its output going to the log and to the standard output, line by line.

    In the log, folders have the names that are given for them.
    """
    with subprocess.Popen(command, cwd=here, env=variables, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            for folder, name in names.items():
                line = line.replace(folder, name)
            print(line, end="", file=log, flush=True)
    return process.returncode


def judge(bundle: Path, out: Path, seconds: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
    """Figures of a rehearsal, and what is wrong with them."""
    tests = count_tests((out / "pytest.txt").read_text())
    sections = json.loads((out / "gpu_suite.json").read_text())["sections"]
    size = size_bytes(bundle)
    wrong = [f"a test was skipped for another reason: {why}" for why in tests["other_reasons"]]
    if tests["skipped"] < LEAST_TESTS:
        wrong.append(f"{tests['skipped']} tests that need a GPU, at least {LEAST_TESTS} are known")
    if tests["others"]:
        wrong.append(f"tests that were not skipped: {', '.join(tests['others'])}")
    wrong += [
        f"section {name}: {figures['status']} {figures.get('error', '')}".split("\n")[0]
        for name, figures in sections.items()
        if figures["status"] != "ok"
    ]
    wrong += [
        f"{stage} took {seconds[stage]:.0f} s, at most {most:.0f}"
        for stage, most in STAGE_S.items()
        if seconds[stage] > most
    ]
    if size > MOST_BYTES:
        wrong.append(f"the bundle has {size:,} bytes, at most {MOST_BYTES:,}")
    figures = {
        "bundle_bytes": size,
        "tests_skipped": tests["skipped"],
        "stage_s": {stage: round(value, 1) for stage, value in seconds.items()},
        "sections_s": {name: round(f.get("seconds", 0.0), 1) for name, f in sections.items()},
    }
    return figures, wrong


def count_tests(text: str) -> dict[str, Any]:
    """What pytest's summary says: tests skipped, for which other reasons, and any other outcome."""
    last = next((line for line in reversed(text.splitlines()) if " in " in line), "")
    outcomes = dict(
        (kind, int(count)) for count, kind in re.findall(r"(\d+) (\w+)", last.partition(" in ")[0])
    )
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.MULTILINE)
    return {
        "skipped": outcomes.pop("skipped", 0),
        "others": [f"{count} {k}" for k, count in outcomes.items()
                   if k not in ("deselected", "warning", "warnings")],
        "other_reasons": sorted({r for r in reasons if _NO_DEVICE not in r}),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="it has torch, and no cgo")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--record", type=Path, help="write figures to this file")
    options = parser.parse_args(arguments)
    with options.log.open("w") as log:
        # Not resolved: a virtual environment's Python is a link.
        place, seconds, wrong = rehearse(options.bundle, options.python.absolute(), log)
        try:
            figures, more = judge(options.bundle, place / "out", seconds)
        except OSError as error:
            figures, more = {"stage_s": seconds}, [f"a stage left no results: {error}"]
        wrong += more
        shutil.rmtree(place)
        verdict = [f"WRONG: {text}" for text in wrong] or ["nothing is wrong"]
        text = "\n".join(["", json.dumps(figures, indent=1), *verdict])
        print(text, file=log)
        print(text)
    if options.record is not None:
        options.record.write_text(json.dumps({**figures, "wrong": wrong}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
