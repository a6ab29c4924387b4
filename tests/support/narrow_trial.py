"""A merged trial of narrow residual networks, in a process of its own: python narrow_trial.py DIR.

Prints how far losses and weights are from the plain loop's, and, under `guarded_malloc.c`, how many
blocks of memory were written beside.
"""

import ctypes
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from support.merged import Case, Merged, relative  # noqa: E402

TRAINING = {"epochs": 4, "optimizer": "SGD", "optimizer_kwargs": {"lr": 0.05}}
CASES = [
    *(Case(f"alike-{seed}", "narrow", seed=seed, training=TRAINING) for seed in range(3)),
    Case("single", "narrow", {"width": 3}, training=TRAINING),
    Case("one", "narrow", {"width": 1, "out": 4}, training=TRAINING),
    Case("twelve", "narrow", {"width": 12, "out": 16}, training=TRAINING),
    *(Case(f"stem-{seed}", "narrow", {"frozen": True}, seed=seed, training=TRAINING)
      for seed in range(2)),
]  # fmt: skip


def main():
    torch.set_num_threads(1)
    merged = Merged(CASES, Path(sys.argv[1]))
    assert merged.plan.report.opaque == {}
    for case in CASES:
        alone = case.alone()
        losses = zip(merged.losses[case.id], alone.losses, strict=True)
        state = merged.state(case.id)
        names = [n for n, v in alone.state.items() if v.is_floating_point() and v.ndim > 1]
        apart = [float((state[n] - alone.state[n]).norm() / alone.state[n].norm()) for n in names]
        print(case.id, max(relative(*pair) for pair in losses), max(apart))
    guard = getattr(ctypes.CDLL(None), "guarded_damage", None)
    print("damage", "unknown" if guard is None else guard())


if __name__ == "__main__":
    main()
