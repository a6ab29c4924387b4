"""The serial baseline: the same models, one after another, in a plain PyTorch loop.

Runs as a process of its own under the environment that trials get, so that threads and allocator
are the same. It reads a list of models as JSON and writes one line a model. What is timed is
loading, training and evaluation of every epoch; building and importing are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from cgo.imports import resolve
from cgo.model import Model, as_json, loss_function, optimizer_class
from cgo.platforms.local import trial_environment


def measure(models: Sequence[Model], import_roots: Sequence[str] = ()) -> dict[str, float]:
    """Seconds that each model takes alone, by id."""
    document = [
        {
            "id": model.model_id,
            "module": model.module,
            "kwargs": model.kwargs,
            "seed": model.seed,
            "data": as_json(model.data),
            "training": as_json(model.training),
        }
        for model in models
    ]
    done = subprocess.run(
        [sys.executable, "-m", "cgo.cli.serial"],
        input=json.dumps(document),
        capture_output=True,
        text=True,
        check=True,
        env=trial_environment(import_roots, {}),
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def train_alone(spec: dict[str, Any]) -> float:
    """Train one model as a user would by hand; returns seconds over all epochs."""
    data, training = spec["data"], spec["training"]
    train, validation = resolve(data["source"])(**data["kwargs"])
    augment = None
    if "augment" in data:
        augment = resolve(data["augment"])(**data.get("augment_kwargs", {}))
    torch.manual_seed(spec["seed"])
    net = resolve(spec["module"])(**spec["kwargs"])
    loss_of = loss_function(training["loss"])
    optimizer = optimizer_class(training["optimizer"])(
        net.parameters(), **training["optimizer_kwargs"]
    )
    started = time.perf_counter()
    for epoch in range(training["epochs"]):
        generator = torch.Generator().manual_seed(data["seed"] + epoch)
        for batch in torch.randperm(len(train), generator=generator).split(data["batch_size"]):
            inputs, targets = train[batch]
            if augment is not None:
                with torch.no_grad():
                    inputs = augment(inputs)
            optimizer.zero_grad()
            loss_of(net(inputs), targets).backward()
            optimizer.step()
        modes = [(part, part.training) for part in net.modules()]
        net.eval()
        right = 0
        with torch.no_grad():
            for batch in torch.arange(len(validation)).split(data["batch_size"]):
                inputs, targets = validation[batch]
                output = net(inputs)
                loss_of(output, targets)
                right += int((output.argmax(1) == targets).sum())
        for part, mode in modes:
            part.training = mode
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({spec["id"]: train_alone(spec) for spec in json.load(sys.stdin)}))
