"""What the benchmarks share: environment, statistics, records, and the plain serial loop."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cgo import bench, trial
from cgo.graph_data import GraphData
from cgo.model import Model, loss_function, optimizer_class
from cgo.planner import Planner
from cgo.platforms.local import MALLOC
from cgo.runtime.data import DataSets, open_data
from cgo.runtime.state import build_module
from cgo.tuning import Tuning

RESULTS = Path(__file__).parent / "results"


def tuned_process() -> None:
    """Restart this process under the allocator settings that trials get, one thread.

    They act only if they are set before the interpreter starts.
    """
    wanted = {**MALLOC, "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    torch.set_num_threads(1)


def plan(models: Sequence[Model], tuning: Tuning | None = None) -> GraphData:
    """The merged document of the models."""
    folder = Path(tempfile.mkdtemp(prefix="cgo-benchmark-"))
    settings = {} if tuning is None else {"tuning": tuning.as_json()}
    found = Planner().plan(models, folder, settings)
    assert not found.failures, found.failures
    assert not found.report.opaque, found.report.opaque
    assert found.graph_data is not None
    return found.graph_data


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def merged_trial(data: GraphData) -> float:
    """Wall seconds of a whole trial in this process: build, load, train, evaluate, write."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: trial.execute(data, folder=Path(folder)))


def epoch_seconds(data: GraphData) -> list[float]:
    """Seconds of each epoch of a trial, the first left out."""
    rows: list[float] = []

    def note(event: Any) -> None:
        if event.kind == "epoch" and event.epoch > 0:
            rows.append(event.value["seconds"])

    trial.execute(data, report=note)
    return rows


class PlainLoop:
    """One model trained alone by hand: the baseline. One optimizer with its defaults."""

    def __init__(self, model: Model, data: DataSets) -> None:
        assert isinstance(model.module, str)
        self.spec, self.training = model.data, model.training
        self.train, self.validation = data.train.tensors, data.validation.tensors
        precision = self.training.precision
        self.net, _ = build_module(model.module, model.kwargs, model.seed, precision)
        self.loss = loss_function(self.training.loss)
        kind = optimizer_class(self.training.optimizer)
        self.optimizer = kind(self.net.parameters(), **self.training.optimizer_kwargs)

    def epoch(self, number: int) -> None:
        """Train on all batches, then evaluate."""
        inputs, targets = self.train
        generator = torch.Generator().manual_seed(self.spec.seed + number)
        for batch in torch.randperm(len(targets), generator=generator).split(self.spec.batch_size):
            self.optimizer.zero_grad()
            self.loss(self.net(inputs[batch]), targets[batch]).backward()
            self.optimizer.step()
        modes = [(part, part.training) for part in self.net.modules()]
        self.net.eval()
        inputs, targets = self.validation
        with torch.no_grad():
            for batch in torch.arange(len(targets)).split(self.spec.batch_size):
                self.loss(self.net(inputs[batch]), targets[batch])
        for part, mode in modes:
            part.training = mode


def plain_loops(models: Sequence[Model]) -> list[PlainLoop]:
    """A plain loop for each model, over data already in memory."""
    data = {model.data.digest: open_data(model.data) for model in models}
    return [PlainLoop(model, data[model.data.digest]) for model in models]


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Median of ratios and its 95% bootstrap interval."""
    return dict(zip(("ratio", "low", "high"), bench.summary(ratios)))


def write_sections(
    name: str, sections: Mapping[str, Callable[[], dict[str, Any]]], wanted: Sequence[str]
) -> None:
    """Measure the sections of a record that are wanted (none: all), and write it.

    Those that are not stay as they were.
    """
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    figures = {section: known[section] for section in sections if section in known}
    for section in wanted or sections:
        figures[section] = sections[section]()
        print(section, json.dumps(figures[section], indent=1), flush=True)
    write(name, figures)


def write(name: str, figures: dict[str, Any]) -> None:
    """Print a record and write it to `benchmarks/results/<name>.json`."""
    text = json.dumps({"benchmark": name, **figures, **bench.environment()}, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
