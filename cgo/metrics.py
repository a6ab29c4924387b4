"""Metric names, resolved to torchmetrics classes."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torchmetrics
from torchmetrics import Metric

from cgo.errors import SpecError
from cgo.imports import is_import_path, resolve


@cache
def metric_class(name: str) -> Any:
    """The torchmetrics class of a functional name ("f1_score" gives `F1Score`), or an import path.

    Raises:
        SpecError: torchmetrics has no metric of that name.
    """
    if is_import_path(name):
        return resolve(name, field="metrics")
    wanted = name.replace("_", "").lower()
    for candidate in dir(torchmetrics):
        found = getattr(torchmetrics, candidate)
        if inspect.isclass(found) and issubclass(found, Metric) and candidate.lower() == wanted:
            return found
    raise SpecError(
        f"metrics: torchmetrics has no metric {name!r}; use one of its functional names "
        "(such as 'accuracy') or 'package.module:name'"
    )


def _needs_task(found: Any) -> bool:
    return inspect.isclass(found) and "task" in inspect.signature(found.__new__).parameters


def check_metric(name: str) -> None:
    """Raise `SpecError` unless `name` names a metric that can be built without arguments."""
    found = metric_class(name)
    if _needs_task(found):
        return
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise SpecError(
            f"metrics: {name!r} needs arguments ({error}); wrap it in a function of your own and "
            "give that as 'package.module:name'"
        ) from error


@cache
def higher_is_better(name: str) -> bool:
    """Whether a larger value of the metric is better.

    Raises:
        SpecError: the metric does not say; set `metric_mode`.
    """
    found = metric_class(name)
    if _needs_task(found):
        found = found(task="multiclass", num_classes=2)
    elif not inspect.isclass(found):
        found = found()
    better = getattr(found, "higher_is_better", None)
    if not isinstance(better, bool):
        raise SpecError(f"metrics: {name!r} does not say which way is better; set metric_mode")
    return better


def build_metric(name: str, prediction: torch.Tensor, target: torch.Tensor) -> Metric:
    """A fresh metric for outputs and targets of these shapes.

    A classification metric's task follows from them: integer targets with one axis fewer than the
    output are classes (C = the output's axis 1); of the same shape they are binary, or multilabel
    where there is a second axis.
    """
    found = metric_class(name)
    if not _needs_task(found):
        return found()
    if prediction.dim() == target.dim() + 1:
        arguments: dict[str, Any] = {"task": "multiclass", "num_classes": prediction.shape[1]}
    elif prediction.dim() > 1 and prediction.shape[1] > 1:
        arguments = {"task": "multilabel", "num_labels": prediction.shape[1]}
    else:
        arguments = {"task": "binary"}
    return found(**arguments, validate_args=False)
