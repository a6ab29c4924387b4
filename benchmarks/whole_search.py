"""Where a whole search wins or loses, everything counted.

    taskset -c 0 python benchmarks/whole_search.py [SECTION ...]

Sections: `capture`, `demo_capture`, `cells`, `start`, `grid`, `one_by_one`. Each is a figure of
`results/whole_search.json`; what is not asked for stays as it was. `cells` takes two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import tuned_process, write_sections

import cgo
from cgo.capture import Capturer, Examples
from cgo.cli import serial
from cgo.cli.demo import candidates
from cgo.imports import resolve
from cgo.model import Model, as_json, loss_function
from cgo.planner import Planner
from cgo.zoo import random_cells

ROUNDS = 3


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def one_pass(model: Model, examples: Examples) -> float:
    """Forward and backward of every program shape, eagerly: the best of five."""
    net = resolve(str(model.module))(**model.kwargs)
    loss_of = loss_function(model.training.loss)

    def run() -> None:
        for leaves in examples.batches.values():
            loss_of(net(leaves["input"]), leaves["target"]).backward()

    return min(seconds(run) for _ in range(5))


def capture() -> dict[str, Any]:
    """A first network, and one of a known kind with other sizes, over their own eager passes."""
    digits = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
    pairs: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "resnet, 7": ("resnet", {"width": 8, "blocks": 3}, {"width": 12, "blocks": 3}),
        "resnet, 15": ("resnet", {"width": 8, "blocks": 7}, {"width": 16, "blocks": 7}),
        "cnn, 8": ("cnn", {"width": 8, "depth": 8}, {"width": 16, "depth": 8}),
    }  # fmt: skip
    examples = Examples.of(digits)
    Capturer().capture(model_of("mlp", {"widths": [8]}, digits), examples)  # imports
    found: dict[str, Any] = {}
    for name, (factory, first, second) in pairs.items():
        new, known = model_of(factory, first, digits), model_of(factory, second, digits)
        times: dict[str, list[float]] = {"first": [], "known": []}
        for _ in range(5):
            capturer = Capturer()
            times["first"].append(seconds(partial(capturer.capture, new, examples)))
            times["known"].append(seconds(partial(capturer.capture, known, examples)))
        found[name] = {
            "first": statistics.median(times["first"]) / one_pass(new, examples),
            "known": statistics.median(times["known"]) / one_pass(known, examples),
            "first_ms": 1e3 * statistics.median(times["first"]),
        }
    return found


def model_of(factory: str, kwargs: dict[str, Any], data: cgo.DataSpec) -> Model:
    return Model(f"cgo.zoo:{factory}", kwargs, data=data, training=cgo.TrainingSpec(), seed=1)


def demo_capture() -> dict[str, Any]:
    """The demo's 24 models, captured and planned, the data open."""
    captures, plans = [], []
    for _ in range(ROUNDS):
        models, planner = candidates(8), Planner()
        planner._examples_of(models[0].data)
        captures.append(seconds(partial(planner.capture, models)))
        with tempfile.TemporaryDirectory() as folder:
            plans.append(seconds(partial(planner.plan, models, Path(folder))))
    return {"capture_s": statistics.median(captures), "plan_s": statistics.median(plans)}


def cells() -> dict[str, Any]:
    """256 different NAS-Bench-201 networks: captured, merged, document written, on all cores."""
    data = cgo.DataSpec(
        "cgo.bench.families:random_data", {"shape": [3, 32, 32], "batch_size": 32}, batch_size=32
    )
    models = [
        Model("cgo.zoo:nas_bench_201", {"edges": edges, "cells": 5, "width": 8, "inputs": 3},
              data=data, training=cgo.TrainingSpec(), seed=seed)
        for seed, edges in enumerate(random_cells(256))
    ]  # fmt: skip
    planner = Planner(roots=lambda models: ())
    with tempfile.TemporaryDirectory() as folder:
        captured = seconds(lambda: planner.capture(models))
        planned = seconds(lambda: planner.plan(models, Path(folder)))
    return {"cores": os.cpu_count(), "capture_s": captured, "plan_s": planned}


def tiny(number: int) -> list[Model]:
    data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=1)
    return [
        Model("cgo.zoo:mlp", {"widths": [width]}, data=data, training=training, seed=number)
        for width in (16, 32)
    ]


def start() -> dict[str, Any]:
    """Two tiny models from submit to end: with a cold engine and with a warm one."""
    cold, warm, begun = [], [], []
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            with cgo.CGOEngine(Path(folder) / "experiment", merge_always=True) as engine:
                run_through(engine, tiny(0))
                cold.append(time.perf_counter() - started)
                for again in range(1, 4):
                    models = tiny(number * 10 + again)
                    warm.append(seconds(partial(run_through, engine, models)))
            experiment = cgo.open_experiment(Path(folder) / "experiment")
            for trial in experiment.trials()[1:]:
                begun.append(experiment.told_by(trial.trial_id)[0][0] - trial.started_at)
    return {
        "cold_s": statistics.median(cold),
        "warm_s": statistics.median(warm),
        "trial_start_s": statistics.median(begun),
    }


def run_through(engine: cgo.CGOEngine, models: Sequence[Model]) -> None:
    engine.submit_models(*models)
    engine.wait_models(*models)
    assert all(model.metric is not None for model in models), [model.error for model in models]


def grid() -> dict[str, Any]:
    """The serial loop in a warm process over a warm engine, by epochs and models."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Loop() as loop:
        engine = cgo.CGOEngine(Path(folder))
        with engine:
            run_through(engine, tiny(0))
            for epochs in (1, 2, 5, 20, 50):
                for count in (1, 4, 16, 64):
                    rounds = 1 if count * epochs > 300 else ROUNDS
                    ratios = [
                        loop.run(models) / seconds(partial(run_through, engine, models))
                        for models in (mixed(count, epochs, seed) for seed in range(rounds))
                    ]
                    report = engine.reports[-1]
                    ways = "merged" if report.captured else "plain"
                    found[f"{epochs} x {count}"] = [statistics.median(ratios), ways]
                    print(epochs, count, found[f"{epochs} x {count}"], flush=True)
    return found


def mixed(count: int, epochs: int, seed: int) -> list[Model]:
    """Models of the demo's families in turn, none twice."""
    every = candidates(epochs)
    found = []
    for number in range(count):
        like = every[number * 7 % len(every)]
        found.append(
            Model(like.module, like.kwargs, data=like.data, training=like.training,
                  seed=100_000 * count + 1000 * seed + number)  # equal ones are trained once
        )  # fmt: skip
    return found


class Loop:
    """The plain loop in a process of its own that is there already."""

    def __enter__(self) -> Loop:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--loop"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.run(tiny(0))
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, models: Sequence[Model]) -> float:
        """Seconds to open the data, build and train the models, one after another."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        specs = [
            {"module": m.module, "kwargs": m.kwargs, "seed": m.seed, "data": as_json(m.data),
             "training": as_json(m.training)}
            for m in models
        ]  # fmt: skip
        started = time.perf_counter()
        self._process.stdin.write(json.dumps(specs) + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()
        return time.perf_counter() - started


def loop() -> None:
    """In the process of a `Loop`."""
    for line in sys.stdin:
        for spec in json.loads(line):
            serial.train_alone(spec)
        print("done", flush=True)


def one_by_one() -> dict[str, Any]:
    """64 candidates submitted as earlier ones end, eight at a time, over all at once."""
    found: dict[str, list[float]] = {"at once": [], "one by one": []}
    for number in range(ROUNDS):
        for way in found:
            models = mixed(64, 3, number)
            with tempfile.TemporaryDirectory() as folder, cgo.CGOEngine(Path(folder)) as engine:
                run_through(engine, tiny(0))
                action = run_through if way == "at once" else trickle
                found[way].append(seconds(partial(action, engine, models)))
            print(way, found[way][-1], flush=True)
    middle = {way: statistics.median(times) for way, times in found.items()}
    return {**middle, "over": middle["one by one"] / middle["at once"]}


def trickle(engine: cgo.CGOEngine, models: Sequence[Model], most: int = 8) -> None:
    """Keep some models running, as an evolutionary search does."""
    waiting, running = list(models), []
    while waiting or running:
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
            engine.submit_models(running[-1])
        time.sleep(0.005)
        running = [model for model in running if not model.status.ended]
    assert all(model.metric is not None for model in models)


SECTIONS = {
    "capture": capture,
    "demo_capture": demo_capture,
    "cells": cells,
    "start": start,
    "grid": grid,
    "one_by_one": one_by_one,
}


if __name__ == "__main__":
    tuned_process()
    if sys.argv[1:] == ["--loop"]:
        loop()
    else:
        write_sections("whole_search", SECTIONS, sys.argv[1:])
