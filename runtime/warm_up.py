"""What a process needs for trials, brought in before the first of them.

Imports take most of a trial's start. Some happen late, and some of torch's classes are changed when
they are first used (an optimizer's `step` is wrapped); both are done here, so that what is seen of
a process after a trial is that trial's doing.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cgo.runtime.forms
from cgo.private.late_compiler import import_late
from cgo.user_code import contained, told

log = logging.getLogger(__name__)

#: What a trial brings in late, beside the forms of groups.
_LATE = ("cgo.runtime.grouped_convolutions", "cgo.runtime.kernels", "cgo.runtime.opaque", "cgo.zoo")


def warm_up() -> None:
    """Import what trials need, and train for a step on each kind of device."""
    import_late()
    forms = [name for _, name, _ in pkgutil.iter_modules(cgo.runtime.forms.__path__)]
    for name in ("cgo.runtime.training", *_LATE, *(f"cgo.runtime.forms.{f}" for f in forms)):
        importlib.import_module(name)
    _make_optimizers()
    _load()
    _step(torch.device("cpu"))
    for index in range(torch.cuda.device_count()):
        _step(torch.device("cuda", index))


def warm_up_eager() -> None:
    """Take a step of one of torch's optimizers: they import torch's compiler, in most of a second.

    Importing it patches torch in many places, so that a trial had better not be the first.
    """
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    parameter.grad = torch.zeros(2)
    optimizer.step()
    scheduler.step()


def bring(libraries: Iterable[str]) -> None:
    """Import what another process has imported; what cannot be, a trial will hear of."""
    for name in libraries:
        try:
            with contained:
                importlib.import_module(name)
        except Exception as error:
            log.debug("%s cannot be imported before its trial: %s", name, told(error))


def _make_optimizers() -> None:
    """One of each class: the first of a class changes it."""
    classes: list[Any] = [cls for cls in vars(torch.optim).values() if inspect.isclass(cls)]
    for cls in classes:
        if issubclass(cls, torch.optim.Optimizer):
            try:
                cls([torch.zeros(2, 2, requires_grad=True)], lr=0.1)
            except (TypeError, ValueError, NotImplementedError, RuntimeError):  # it wants others
                continue


def _load() -> None:
    """Start a loader's process: with the first, torch begins to hear of deaths of processes."""
    for _ in DataLoader(TensorDataset(torch.zeros(1)), num_workers=1):
        pass


def _step(device: torch.device) -> None:
    """Forward and backward; an optimizer's step would import torch's compiler, which takes longer.

    Merged models take steps of their own; who needs one of torch's imports it then.
    """
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 4), nn.LayerNorm(4),
    ).to(device)  # fmt: skip
    target = torch.zeros(8, dtype=torch.int64, device=device)
    nn.functional.cross_entropy(network(torch.ones(8, 1, 8, 8, device=device)), target).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
