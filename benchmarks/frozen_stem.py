"""Heads over one frozen network: merged against the plain serial loop.

    python benchmarks/frozen_stem.py [--models 16] [--rounds 7]

The loop trains each model in turn, its frozen trunk in front; the merged trial computes the trunk
once a batch. The ratio is serial epoch seconds over merged epoch seconds. `stored_stems.py` is for
what computing the trunk once a sample gains.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import common
import torch

import cgo


def head_cost_ratio(loop: common.PlainLoop, size: int = 64) -> float:
    """How many times a head's training step its trunk's forward costs."""
    inputs, targets = (tensor[:size] for tensor in loop.train)
    net = loop.net
    with torch.no_grad():
        features = net.trunk(inputs)

    def head() -> None:
        loop.optimizer.zero_grad()
        loop.loss(net.head(features), targets).backward()
        loop.optimizer.step()

    def stem() -> None:
        with torch.no_grad():
            net.trunk(inputs)

    times = {
        part: statistics.median(common.seconds(part) for _ in range(20)) for part in (stem, head)
    }
    return times[stem] / times[head]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    common.tuned_process()
    data = cgo.DataSpec(
        "workloads:images",
        {"samples": 512, "validation": 128, "channels": 3, "size": 32},
        batch_size=64,
    )
    models = [
        cgo.Model(
            "workloads:headed",
            {"width": 16 + 4 * n},
            data=data,
            training=cgo.TrainingSpec(epochs=3, optimizer_kwargs={"lr": 0.01 * (n + 1)}),
            seed=n,
        )
        for n in range(options.models)
    ]
    once_a_batch = cgo.Tuning(store_stems=False)
    merged, loops = common.plan(models, once_a_batch), common.plain_loops(models)
    trunk_over_head = head_cost_ratio(loops[0])
    merged_s, serial_s = [], []

    def serial_epoch(number: int) -> None:
        for loop in loops:
            loop.epoch(number)

    for number in range(options.rounds):
        merged_s.append(statistics.median(common.epoch_seconds(merged)[:: options.models]))
        serial_s.append(common.seconds(functools.partial(serial_epoch, number)))
    common.write(
        "frozen_stem",
        {
            "models": options.models,
            "trunk_forward_over_head_step": trunk_over_head,
            "merged_epoch_s": statistics.median(merged_s),
            "serial_epoch_s": statistics.median(serial_s),
            "target": "at least 5",
            **common.summary([s / m for s, m in zip(serial_s, merged_s)]),
        },
    )


if __name__ == "__main__":
    main()
