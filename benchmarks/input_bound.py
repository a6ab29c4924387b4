"""An input-bound search: one merged trial against a solo trial for each model.

    python benchmarks/input_bound.py [--models 8] [--rounds 5]

Every sample costs about 2 ms of CPU to load. Both sides run the same runtime in this process, so
neither counts a process start; the ratio is solo seconds over merged seconds.
"""

from __future__ import annotations

import argparse
import statistics

import common

import cgo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    common.tuned_process()
    data = cgo.DataSpec("workloads:slow_images", {"samples": 256, "validation": 64}, batch_size=32)
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=2, optimizer_kwargs={"lr": 0.05})
    models = [
        cgo.Model("workloads:mlp", {"width": 32 + 8 * n}, data=data, training=training, seed=n)
        for n in range(options.models)
    ]
    merged, solo = common.plan(models), [common.plan([model]) for model in models]
    merged_s, solo_s = [], []
    for _ in range(options.rounds):
        merged_s.append(common.merged_trial(merged))
        solo_s.append(sum(common.merged_trial(each) for each in solo))
    common.write(
        "input_bound",
        {
            "models": options.models,
            "merged_s": statistics.median(merged_s),
            "solo_s": statistics.median(solo_s),
            "target": "at least 6",
            **common.summary([s / m for s, m in zip(solo_s, merged_s)]),
        },
    )


if __name__ == "__main__":
    main()
