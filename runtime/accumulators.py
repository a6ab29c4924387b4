"""Metrics of numbers: torchmetrics', and what these lose to rounding or small scales.

torchmetrics' R2 takes targets whose squares sum to less than 1e-4 for constant, and ranks float64
values as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric


class Variation:
    """Squared errors against the variance of targets, column by column.

    Sums are taken of differences from the first target, so that a large mean costs no digits.
    """

    def __init__(self, value: Callable[[Variation], Tensor]) -> None:
        self._value = value
        self._rows = 0
        self._first = self._moved = self._moved_squares = torch.zeros(())
        self._errors = self.squares = torch.zeros(())  # (columns,), after the first row

    @property
    def spread(self) -> Tensor:
        """Squared differences of targets from their mean, summed."""
        return self._moved_squares - self._moved**2 / self._rows

    @property
    def varying(self) -> Tensor:
        """Squared differences of errors from their mean, summed."""
        return self.squares - self._errors**2 / self._rows

    def update(self, output: Tensor, target: Tensor) -> None:
        """Count rows of (N, columns)."""
        if self._rows == 0:
            self._first = target[0]
            self._moved = self._moved_squares = torch.zeros_like(target[0])
            self._errors = self.squares = torch.zeros_like(target[0])
        moved, error = target - self._first, target - output
        self._rows += len(target)
        self._moved, self._errors = self._moved + moved.sum(0), self._errors + error.sum(0)
        self._moved_squares = self._moved_squares + (moved**2).sum(0)
        self.squares = self.squares + (error**2).sum(0)

    def compute(self) -> Tensor:
        """The value of each column."""
        return self._value(self)


class Ranks:
    """Spearman's correlation: of ranks, equal values sharing the mean of theirs."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        """Keep rows of (N, columns)."""
        self._outputs.append(output)
        self._targets.append(target)

    def compute(self) -> Tensor:
        """The value of each column; NaN of what does not vary."""
        pairs = zip(torch.cat(self._outputs).unbind(1), torch.cat(self._targets).unbind(1))
        ranks = [torch.stack([_ranked(output), _ranked(target)]) for output, target in pairs]
        return torch.stack([torch.corrcoef(pair)[0, 1] for pair in ranks])


def _ranked(values: Tensor) -> Tensor:
    _, place, sizes = values.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(0) - (sizes - 1) / 2).double()[place]


def _explained(part: Tensor, spread: Tensor) -> Tensor:
    """1 - part over spread; of targets that do not vary 1 where all is right, else 0."""
    return torch.where(spread > 0, 1 - part / spread, (part == 0).to(part.dtype))


Accumulator: TypeAlias = "Metric | Variation | Ranks"


def _theirs(name: str, **options: Any) -> Callable[[int], Metric]:
    """A metric of torchmetrics that takes any number of columns."""
    return lambda columns: _class(name)(**options)


def _by_columns(name: str) -> Callable[[int], Metric]:
    """A metric of torchmetrics that is told how many columns there are."""
    return lambda columns: _class(name)(columns)


def _class(name: str) -> Callable[..., Metric]:
    import torchmetrics  # here, as most models' metrics do without it, and it imports scipy

    found: Callable[..., Metric] = getattr(torchmetrics, name)
    return found


#: By name; each is given the number of columns, and float64 values.
NUMBERS: Mapping[str, Callable[[int], Accumulator]] = {
    "mean_squared_error": _theirs("MeanSquaredError"),
    "mean_absolute_error": _theirs("MeanAbsoluteError"),
    "mean_absolute_percentage_error": _theirs("MeanAbsolutePercentageError"),
    "symmetric_mean_absolute_percentage_error": _theirs("SymmetricMeanAbsolutePercentageError"),
    "weighted_mean_absolute_percentage_error": _theirs("WeightedMeanAbsolutePercentageError"),
    "mean_squared_log_error": _theirs("MeanSquaredLogError"),
    "log_cosh_error": _by_columns("LogCoshError"),
    "r2_score": lambda columns: Variation(lambda v: _explained(v.squares, v.spread)),
    "explained_variance": lambda columns: Variation(lambda v: _explained(v.varying, v.spread)),
    "relative_squared_error": lambda columns: Variation(lambda v: v.squares / v.spread),
    "pearson_corrcoef": _by_columns("PearsonCorrCoef"),
    "spearman_corrcoef": lambda columns: Ranks(),
    "concordance_corrcoef": _by_columns("ConcordanceCorrCoef"),
    "cosine_similarity": _theirs("CosineSimilarity", reduction="mean"),
}
#: Those of torchmetrics that take one column without its axis.
FLAT = ("log_cosh_error", "pearson_corrcoef", "concordance_corrcoef")
