"""Sums over an epoch that stay on the device until it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from cgo.model import TrainingSpec, metric_label
from cgo.runtime.measures import Measure, build_metric

_Key = TypeVar("_Key")

#: Losses kept before they are folded into the sum; bounds memory, costs no synchronisation.
_FOLD = 256


@lru_cache(maxsize=64)
def _weights(samples: tuple[int, ...], device: torch.device) -> Tensor:
    """Samples of batches as numbers, which all models of a loader share: each copy is a wait."""
    return torch.tensor(samples, dtype=torch.float64, device=device)


class LossMeter:
    """Mean loss over samples, in float64."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._samples: list[int] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor, samples: int) -> None:
        """Count one batch's mean loss."""
        self._losses.append(loss.detach())
        self._samples.append(samples)
        if len(self._losses) >= _FOLD:
            self._fold()

    def add_sum(self, total: Tensor, samples: int) -> None:
        """Count several batches at once: their losses times samples, float64."""
        self._sum = total if self._sum is None else self._sum + total
        self._count += samples

    def held(self) -> list[Tensor]:
        """What the mean follows from, on the device."""
        self._fold()
        return [] if self._sum is None else [self._sum]

    def settle(self, values: Sequence[Tensor]) -> None:
        """Go on with copies of what is `held`, on the host."""
        for value in values:
            self._sum = value

    def mean(self) -> float:
        """The mean; waits for the device, unless it was settled."""
        self._fold()
        return float("nan") if self._sum is None else float(self._sum) / self._count

    def _fold(self) -> None:
        if not self._losses:
            return
        losses = torch.stack([loss.reshape(()) for loss in self._losses]).double()
        folded = (losses * _weights(tuple(self._samples), losses.device)).sum()
        self._sum = folded if self._sum is None else self._sum + folded
        self._count += sum(self._samples)
        self._losses, self._samples = [], []


class EvaluationMeter:
    """Validation loss and metrics of one model over the whole validation set.

    Args:
        training: Names the metrics, and the loss by which outputs are read.
        kept_bytes: Predictions are kept until they are so large, and counted together: on a GPU a
            metric's dozen small kernels for each model and batch would take longer than the models.
    """

    def __init__(self, training: TrainingSpec, kept_bytes: int = 0) -> None:
        self._training, self._most_bytes = training, kept_bytes
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._loss = LossMeter()
        self._metrics: dict[str, Measure] = {}
        self._parts: list[int] = []  # how many tensors each holds

    def add(self, loss: Tensor, prediction: Tensor | None, target: Tensor, samples: int) -> None:
        """Count one batch."""
        self._loss.add(loss, samples)
        if not self._training.metrics:
            return
        if prediction is None:
            raise TypeError("metrics need an output that is, or begins with, a tensor")
        if not isinstance(target, Tensor):
            self._count()
        elif self._kept and not _joinable(self._kept[-1], (prediction, target)):
            self._count()  # images or sentences of another size
        self._kept.append((prediction, target))
        size = sum(p.numel() * p.element_size() for p, _ in self._kept)
        if size > self._most_bytes or not isinstance(target, Tensor):
            self._count()

    def _count(self) -> None:
        """Hand what is kept to the metrics."""
        if not self._kept:
            return
        prediction, target = self._kept[0]
        if len(self._kept) > 1:
            prediction, target = (torch.cat(list(parts)) for parts in zip(*self._kept))
        self._kept = []
        for name in self._training.metrics:
            if name not in self._metrics:
                self._metrics[name] = build_metric(name, self._training.loss, prediction.device)
            self._metrics[name].update(prediction, target)

    def held(self) -> list[Tensor]:
        """What the values follow from, on the device, as far as that is little.

        Raises:
            Exception: what a metric raised.
        """
        self._count()
        parts = [metric.held() for metric in self._metrics.values()]
        self._parts = [len(part) for part in parts]
        return [*self._loss.held(), *(value for part in parts for value in part)]

    def settle(self, values: Sequence[Tensor]) -> None:
        """Go on with copies of what is `held`, on the host."""
        rest = list(values)
        own = len(rest) - sum(self._parts)
        self._loss.settle(rest[:own])
        for metric, size in zip(self._metrics.values(), self._parts):
            metric.settle(rest[own : own + size])
            own += size

    def values(self) -> dict[str, float]:
        """`val_loss` and `val_<metric>`."""
        self._count()
        row = {"val_loss": self._loss.mean()}
        for name, metric in self._metrics.items():
            row[f"val_{metric_label(name)}"] = metric.compute()
        return row


def _joinable(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> bool:
    """Whether two batches differ in their number of samples alone."""
    return all(a.ndim and a.shape[1:] == b.shape[1:] for a, b in zip(before, after))


def fetched(wanted: Mapping[_Key, Sequence[Tensor]]) -> dict[_Key, list[Tensor]]:
    """Tensors on the host, all of a device by one transfer.

    Args:
        wanted: Small tensors of any types, each key's on any devices.
    """
    flat = [tensor for tensors in wanted.values() for tensor in tensors]
    found = {index: tensor for index, tensor in enumerate(flat) if tensor.device.type == "cpu"}
    for device in {tensor.device for tensor in flat if tensor.device.type != "cpu"}:
        here = {index: tensor for index, tensor in enumerate(flat) if tensor.device == device}
        found |= zip(here, _moved(list(here.values())))
    rest = iter([found[index] for index in range(len(flat))])
    return {key: [next(rest) for _ in tensors] for key, tensors in wanted.items()}


def _moved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, by their bytes."""
    rows = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    parts = torch.cat(rows).cpu().split([len(row) for row in rows])
    pairs = zip(parts, tensors)  # cloned, so that numbers begin where the host can read them
    return [part.clone().view(like.dtype).reshape(like.shape) for part, like in pairs]
