"""What the runtime costs: a merged trial of one model against the plain loop.

    python benchmarks/overhead.py [--rounds 9]

Epochs of both, interleaved. The ratio is our seconds over the plain loop's.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import common

import cgo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    common.tuned_process()
    data = cgo.DataSpec("workloads:images", {"samples": 3200, "validation": 64}, batch_size=32)
    training = cgo.TrainingSpec(epochs=5, optimizer_kwargs={"lr": 0.01, "momentum": 0.9})
    figures = {}
    for name in ("mlp", "cnn"):
        model = cgo.Model(f"workloads:{name}", data=data, training=training)
        merged, (loop,) = common.plan([model]), common.plain_loops([model])
        loop.epoch(0)
        ours, plain = [], []
        for _ in range(options.rounds):
            ours.append(statistics.median(common.epoch_seconds(merged)))
            epochs = [functools.partial(loop.epoch, epoch) for epoch in range(4)]
            plain.append(statistics.median(map(common.seconds, epochs)))
        figures[name] = {
            "steps_an_epoch": 100,
            "merged_step_us": statistics.median(ours) * 1e4,
            "plain_step_us": statistics.median(plain) * 1e4,
            **common.summary([a / b for a, b in zip(ours, plain)]),
        }
    common.write("overhead", {"target": "at most 1.05", "models": figures})


if __name__ == "__main__":
    main()
