"""Metrics over a whole validation set, from what outputs say about targets.

Classes and labels are counted by column, in integers, and scikit-learn's definitions applied to
the counts at the end. Numbers go through torchmetrics in float64, or through sums of squares.
torchmetrics imports scipy, so it is imported where a metric is computed by it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cgo.errors import SpecError
from cgo.imports import is_import_path, resolve
from cgo.metrics import Loss, Row, loss_of, row_of
from cgo.runtime.accumulators import FLAT, NUMBERS, Accumulator, Ranks, Variation
from cgo.runtime.judging import Judged, check_one_hot, judge, numbers

if TYPE_CHECKING:
    from torchmetrics import Metric

_NAN = float("nan")


class Measure(ABC):
    """A metric of one model, fed batch by batch."""

    @abstractmethod
    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch, or several that were concatenated.

        Raises:
            SpecError: shapes or values do not fit the metric; says how.
        """

    @abstractmethod
    def compute(self) -> float:
        """The value over all batches; NaN where it has none, as where no target counted."""

    def held(self) -> list[Tensor]:
        """What the value follows from, where that is little; on the device, without waiting.

        Raises:
            Exception: as `compute`.
        """
        return []

    def settle(self, values: Sequence[Tensor]) -> None:
        """Go on with copies of what is `held`, on the host, so that `compute` waits for nothing."""
        assert not values, type(self).__name__


def build_metric(name: str, loss: str, device: torch.device) -> Measure:
    """A fresh measure for a metric of a model that is trained with a loss.

    Args:
        name: In the table of `cgo.metrics`, or the import path of a `torchmetrics.Metric`.
        loss: Says how outputs are read.
        device: Where outputs will be.

    Raises:
        SpecError: see `cgo.metrics.check_metric`.
    """
    if is_import_path(name):
        return _Given(name, resolve(name, field="metrics")().to(device))
    row, read = row_of(name), loss_of(loss)
    if read is None:
        raise SpecError(f"metrics: {name!r} has no meaning for outputs of loss {loss!r}")
    if row.name in NUMBERS:
        return _Numbers(row, read, NUMBERS[row.name])
    kind = _POSITIONS.get(row.name)
    return _Counts(row, read, _COUNTED[row.name]) if kind is None else kind(row, read)


class _Given(Measure):
    """A user's own metric, handed what there is."""

    def __init__(self, name: str, metric: Metric) -> None:
        self._name, self._metric = name, metric
        self._value: Any = None

    def update(self, output: Tensor, target: Tensor) -> None:
        self._metric.update(output, target)

    def held(self) -> list[Tensor]:
        self._value = self._metric.compute()
        one = isinstance(self._value, Tensor) and self._value.numel() == 1
        return [self._value] if one else []

    def settle(self, values: Sequence[Tensor]) -> None:
        for value in values:
            self._value = value

    def compute(self) -> float:
        value = self._metric.compute() if self._value is None else self._value
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise SpecError(
            f"metrics: {self._name!r} gave {what}, where a metric is one number; wrap it in a "
            "torchmetrics.Metric whose compute() gives that"
        )


# --- classes and labels ---------------------------------------------------------------------------


class _Positions(Measure):
    """A metric of classes or labels."""

    def __init__(self, row: Row, loss: Loss) -> None:
        self._row, self._loss = row, loss
        self._columns: int | None = None

    def update(self, output: Tensor, target: Tensor) -> None:
        judged = judge(self._row, self._loss, output, target)
        self._check(judged)
        if self._columns is None:
            check_one_hot(self._row, self._loss, judged)
            self._columns = judged.columns
        elif self._columns != judged.columns:
            raise SpecError(
                f"metrics: {self._row.name!r}: batches have {self._columns} and {judged.columns} "
                "classes or labels; they must all have the same"
            )
        self._add(judged)

    def _check(self, judged: Judged) -> None:
        judged.check()

    @abstractmethod
    def _add(self, judged: Judged) -> None: ...


@dataclass(frozen=True)
class Counts:
    """How often, by class or label: (K,) integers. Of classes, each position counts in one."""

    right: Tensor  # it was so, and said to be so
    said: Tensor
    true: Tensor
    counted: Tensor  # targets that were not left out
    agreed: Tensor  # right ones of them
    has_classes: bool


def count(judged: Judged) -> Counts:
    """The counts of a batch."""
    predicted, targets, counted = judged.predicted(), judged.targets, judged.counted
    if not judged.has_classes:
        yes, true = (predicted == 1) & counted, (targets == 1) & counted
        agreed = (predicted == targets) & counted
        parts = [part.sum(0) for part in (yes & true, yes, true, counted, agreed)]
        return Counts(parts[0], parts[1], parts[2], parts[3], parts[4], has_classes=False)
    # Those that do not count, and wrong ones, have a place of their own; nothing waits for a GPU.
    size = judged.columns
    counted = counted & (targets >= 0) & (targets < size)
    right = counted & (predicted == targets)
    places = [
        torch.where(which, classes, size)
        for which, classes in ((right, targets), (counted, predicted), (counted, targets))
    ]
    found = torch.zeros(3, size + 1, dtype=torch.int64, device=targets.device)
    found.scatter_add_(1, torch.stack(places), torch.ones_like(targets).expand(3, -1))
    right, said, true = found[:, :size].unbind(0)
    counted, agreed = (v.sum().expand(size) for v in (true, right))
    return Counts(right, said, true, counted, agreed, has_classes=True)


class _Sums(_Positions):
    """What follows from sums over positions; nothing waits for a GPU until they are settled."""

    def __init__(self, row: Row, loss: Loss) -> None:
        super().__init__(row, loss)
        self._sums: list[Tensor] = []
        self._wrong: Tensor | None = None  # whether any targets had wrong values
        self._refusal: SpecError | None = None  # what to raise then

    def _check(self, judged: Judged) -> None:
        self._wrong = judged.wrong if self._wrong is None else self._wrong | judged.wrong
        self._refusal = self._refusal or judged.refusal

    def _add(self, judged: Judged) -> None:
        found = self._of(judged)
        self._sums = [a + b for a, b in zip(self._sums, found)] if self._sums else found

    def held(self) -> list[Tensor]:
        return self._sums if self._wrong is None else [self._wrong, *self._sums]

    def settle(self, values: Sequence[Tensor]) -> None:
        if values:
            self._wrong, *self._sums = values

    def compute(self) -> float:
        if self._refusal is not None and bool(self._wrong):
            raise self._refusal
        return self._whole(self._sums) if self._sums else _NAN

    @abstractmethod
    def _of(self, judged: Judged) -> list[Tensor]:
        """The sums of a batch; targets with wrong values may count as anything."""

    @abstractmethod
    def _whole(self, sums: list[Tensor]) -> float: ...


class _Counts(_Sums):
    """What follows from counts."""

    def __init__(self, row: Row, loss: Loss, value: Callable[[Counts], Tensor]) -> None:
        super().__init__(row, loss)
        self._value = value
        self._has_classes = False

    def _of(self, judged: Judged) -> list[Tensor]:
        self._has_classes = judged.has_classes
        found = count(judged)
        return [found.right, found.said, found.true, found.counted, found.agreed]

    def _whole(self, sums: list[Tensor]) -> float:
        right, said, true, counted, agreed = sums
        if not bool((counted > 0).any()):
            return _NAN
        total = Counts(right, said, true, counted, agreed, self._has_classes)
        return float(self._value(total))


def _accuracy(counts: Counts) -> Tensor:
    """In float32, as torchmetrics has it."""
    agreed, counted = _pooled(counts)
    return agreed / counted


def _hamming_distance(counts: Counts) -> Tensor:
    agreed, counted = _pooled(counts)
    return (counted - agreed) / counted


def _pooled(counts: Counts) -> tuple[Tensor, Tensor]:
    """Right and counted targets of all columns; each column of classes has all of them."""
    if counts.has_classes:
        return counts.agreed[0], counts.counted[0]
    return counts.agreed.sum(), counts.counted.sum()


def _averaged(part: Callable[[Counts], tuple[Tensor, Tensor]]) -> Callable[[Counts], Tensor]:
    """A quotient for each column, 0 where nothing is divided, averaged as scikit-learn does.

    Two classes: that of class 1. More: the mean over those that are true or said somewhere.
    Labels: the mean over all.
    """

    def value(counts: Counts) -> Tensor:
        above, below = (number.double() for number in part(counts))
        quotients = torch.where(below == 0, 0.0, above / below.clamp(min=1))
        if not counts.has_classes:
            return quotients.mean()
        if len(quotients) == 2:
            return quotients[1]
        return quotients[counts.said + counts.true > 0].mean()

    return value


def _matthews(counts: Counts) -> Tensor:
    """0 where nothing varies."""
    total, agreed = (number[0].double() for number in (counts.counted, counts.agreed))
    said, true = counts.said.double(), counts.true.double()
    square = (total**2 - (said**2).sum()) * (total**2 - (true**2).sum())
    return torch.where(square > 0, (total * agreed - (said * true).sum()) / square.sqrt(), 0.0)


def _kappa(counts: Counts) -> Tensor:
    """NaN where chance explains all."""
    total, agreed = (number[0].double() for number in (counts.counted, counts.agreed))
    chance = (counts.said.double() * counts.true.double()).sum() / total
    return (agreed - chance) / (total - chance)


_COUNTED: Mapping[str, Callable[[Counts], Tensor]] = {
    "accuracy": _accuracy,
    "hamming_distance": _hamming_distance,
    "precision": _averaged(lambda c: (c.right, c.said)),
    "recall": _averaged(lambda c: (c.right, c.true)),
    "specificity": _averaged(lambda c: (c.counted - c.true - c.said + c.right, c.counted - c.true)),
    "f1_score": _averaged(lambda c: (2 * c.right, c.said + c.true)),
    "jaccard_index": _averaged(lambda c: (c.right, c.said + c.true - c.right)),
    "matthews_corrcoef": _matthews,
    "cohen_kappa": _kappa,
}


class _ExactMatch(_Sums):
    """Samples without a wrong target, among those with any that counts."""

    def _of(self, judged: Judged) -> list[Tensor]:
        counted = judged.counted
        wrong = (judged.predicted() != judged.targets) & counted
        if judged.samples:
            wrong, counted = (v.reshape(judged.samples, -1).any(1) for v in (wrong, counted))
        return [(counted & ~wrong).sum(), counted.sum()]

    def _whole(self, sums: list[Tensor]) -> float:
        right, samples = sums
        return float(right) / int(samples) if int(samples) else _NAN


class _Scores(_Positions):
    """What needs all probabilities at once."""

    def __init__(self, row: Row, loss: Loss) -> None:
        super().__init__(row, loss)
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def _add(self, judged: Judged) -> None:
        scores, targets = judged.probabilities(), judged.targets
        if judged.has_classes:
            scores, targets = scores[judged.counted], targets[judged.counted]
        self._scores.append(scores)
        self._targets.append(targets)

    def compute(self) -> float:
        if not self._scores:
            return _NAN
        scores, targets = torch.cat(self._scores), torch.cat(self._targets)
        return self._whole(scores, targets) if len(targets) else _NAN

    @abstractmethod
    def _whole(self, scores: Tensor, targets: Tensor) -> float:
        """The value for (P, K) and (P,) or (P, L)."""


class _ByColumn(_Scores):
    """A metric of one yes-or-no column: of class 1 of two, else the mean over columns.

    Columns for which it is not defined are left out: a class that is never, or always, the target.
    """

    def _whole(self, scores: Tensor, targets: Tensor) -> float:
        has_classes = targets.ndim == 1
        columns = [1] if has_classes and scores.shape[1] == 2 else range(scores.shape[1])
        values = []
        for column in columns:
            target = targets == column if has_classes else targets[:, column]
            value = self._column(scores[:, column], target.long())
            if value is not None:
                values.append(value)
        return sum(values) / len(values) if values else _NAN

    def _column(self, scores: Tensor, target: Tensor) -> float | None:
        counts = (target == 1) | (target == 0)
        scores, target = scores[counts], target[counts]
        positive = int(target.sum())
        if positive == 0 or (self._row.name == "auroc" and positive == len(target)):
            return None
        from torchmetrics.functional.classification import binary_auroc, binary_average_precision

        function: Any = binary_auroc if self._row.name == "auroc" else binary_average_precision
        return float(function(scores, target, validate_args=False))


class _CalibrationError(_Scores):
    def _whole(self, scores: Tensor, targets: Tensor) -> float:
        from torchmetrics.classification import MulticlassCalibrationError

        metric = MulticlassCalibrationError(
            scores.shape[1], n_bins=15, norm="l1", validate_args=False
        )
        metric.set_dtype(torch.float64)
        metric = metric.to(scores.device)
        metric.update(scores, targets)
        return float(metric.compute())


class _Perplexity(_Positions):
    def __init__(self, row: Row, loss: Loss) -> None:
        super().__init__(row, loss)
        self._sum: Tensor | float = 0.0
        self._count = 0

    def _add(self, judged: Judged) -> None:
        counted, targets = judged.counted, judged.targets
        likely = judged.log_probabilities()[counted].gather(1, targets[counted].unsqueeze(1))
        self._sum = self._sum - likely.sum()
        self._count += len(likely)

    def compute(self) -> float:
        return float(torch.as_tensor(self._sum / self._count).exp()) if self._count else _NAN


_POSITIONS: Mapping[str, Callable[[Row, Loss], _Positions]] = {
    "exact_match": _ExactMatch,
    "auroc": _ByColumn,
    "average_precision": _ByColumn,
    "calibration_error": _CalibrationError,
    "perplexity": _Perplexity,
}


# --- numbers --------------------------------------------------------------------------------------


class _Numbers(Measure):
    """A metric of numbers; `make` is given the number of columns."""

    def __init__(self, row: Row, loss: Loss, make: Callable[[int], Accumulator]) -> None:
        self._row, self._loss, self._make = row, loss, make
        self._metric: Accumulator | None = None
        self._value: Tensor | None = None

    def update(self, output: Tensor, target: Tensor) -> None:
        if target.numel() == 0:
            return
        outputs, targets = numbers(self._row, self._loss, output, target)
        if self._metric is None:
            self._metric = self._made(outputs)
        if outputs.shape[1] == 1 and self._row.name in FLAT:
            outputs, targets = outputs[:, 0], targets[:, 0]
        self._metric.update(outputs, targets)

    def _made(self, outputs: Tensor) -> Accumulator:
        metric = self._make(outputs.shape[1])
        if isinstance(metric, (Ranks, Variation)):
            return metric
        return metric.set_dtype(torch.float64).to(outputs.device)

    def held(self) -> list[Tensor]:
        if self._metric is None:
            return []
        with warnings.catch_warnings():  # of what does not vary
            warnings.simplefilter("ignore")
            self._value = cast("Tensor", self._metric.compute()).mean()
        return [self._value]

    def settle(self, values: Sequence[Tensor]) -> None:
        for value in values:
            self._value = value

    def compute(self) -> float:
        if self._value is None:
            self.held()
        return _NAN if self._value is None else float(self._value)
