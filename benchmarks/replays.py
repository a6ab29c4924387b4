"""Ways of replaying a recorded step: TorchScript's interpreter, Python, and no replay.

    python benchmarks/replays.py

TorchScript is deprecated, and is not supported on Python 3.14 and later. What it leaves is the same
record as a function of Python's, written out line by line; Inductor compiles it where that repays.
Ratios are of medians of interleaved rounds, on one thread.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from cgo import Tuning, bench
from cgo.bench import methods
from cgo.bench.families import FAMILIES
from cgo.runtime import taped
from cgo.runtime.tape import Replay, Tape, TapeError, compile_tape, interpreted

RESULTS = Path(__file__).parent / "results" / "replays.json"

ROUNDS, STEPS = 9, 20


def no_replay(tape: Tape) -> Replay:
    raise TapeError("not replayed")


WAYS = {"plain": no_replay, "torchscript": compile_tape, "python": interpreted}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for family, count in (("mlp", 8), ("mlp", 32), ("cnn8", 8), ("cells-different-8", 8),
                          ("encoders", 8)):  # fmt: skip
        steps = {}
        for name, way in WAYS.items():
            taped.fastest = way  # type: ignore[attr-defined]
            models = FAMILIES[family](count)
            steps[name] = methods.merged(models, Tuning(measure=False, tape=True))
            steps[name](6)  # recorded, checked, and replayed from then on
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                started = time.perf_counter()
                step(STEPS)
                times[name].append((time.perf_counter() - started) / STEPS)
        found = {name: statistics.median(row) for name, row in times.items()}
        ratios = {name: found["plain"] / found[name] for name in WAYS}
        rows.append({"family": family, "models": count, "step_s": found, "ratios": ratios})
        print(family, count, {name: round(ratio, 2) for name, ratio in ratios.items()}, flush=True)
    RESULTS.write_text(
        json.dumps({"environment": bench.environment(), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
