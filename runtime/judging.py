"""What outputs say about targets: which class or label, how probable; numbers beside numbers.

How outputs are read follows from the loss, never from their values: logits that happen to lie
between 0 and 1 are logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cgo.errors import SpecError
from cgo.metrics import UNKNOWN_LOSS, WAY_OUT, Loss, Row

#: The target that `cross_entropy` and `nll_loss` leave out, as torch has it.
IGNORED = -100

_POOLED = ("accuracy", "hamming_distance", "exact_match")  # do not ask which axis is the labels'
_OF_CLASSES = ("matthews_corrcoef", "cohen_kappa", "calibration_error")
_BY_COLUMN = (
    "r2_score", "explained_variance", "relative_squared_error", "pearson_corrcoef",
    "spearman_corrcoef", "concordance_corrcoef", "cosine_similarity",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Outputs of a batch and what they should have been, position by position.

    Of classes, `outputs` are (P, C) and `targets` (P,) of integers; of L labels both are (P, L),
    targets 0 or 1. A position is a sample, or a pixel or token of one; samples follow each other.
    A single label is a matter of two classes.
    """

    outputs: Tensor
    targets: Tensor
    read_as: str  # "logits", "log-probabilities", "probabilities" or "scores"
    samples: int
    wrong: Tensor  # no dimensions: whether targets have values that they must not have
    refusal: SpecError  # what to raise then
    is_single: bool = False  # one label, given as one column of outputs

    @property
    def has_classes(self) -> bool:
        """Whether one of several classes is right; else each label by itself."""
        return self.targets.ndim == 1

    @property
    def columns(self) -> int:
        """C classes or L labels."""
        return 2 if self.is_single else self.outputs.shape[1]

    @property
    def counted(self) -> Tensor:
        """(P,) or (P, L): the targets that count."""
        return self.targets != IGNORED

    def check(self) -> None:
        """Raise if targets have values that they must not have; waits for a GPU."""
        if bool(self.wrong):
            raise self.refusal

    def predicted(self) -> Tensor:
        """The class (P,), or the label (P, L); a probability of exactly one half is a no."""
        if self.has_classes and not self.is_single:
            return self.outputs.argmax(1)
        yes = self.outputs > (0.5 if self.read_as == "probabilities" else 0)
        return (yes[:, 0] if self.is_single else yes).long()

    def probabilities(self) -> Tensor:
        """(P, C) or (P, L), in float64, so that few become equal by rounding."""
        values = self.outputs.double()
        if self.read_as == "log-probabilities":
            return values.exp().clamp(0, 1)
        if self.has_classes and not self.is_single:
            return values.softmax(1)
        yes = values if self.read_as == "probabilities" else values.sigmoid()
        return torch.cat([1 - yes, yes], 1) if self.is_single else yes

    def log_probabilities(self) -> Tensor:
        """(P, C), in float64."""
        values = self.outputs.double()
        return values if self.read_as == "log-probabilities" else values.log_softmax(1)


def judge(row: Row, loss: Loss, output: Tensor, target: Tensor) -> Judged:
    """Outputs and targets of a metric of classes or labels, as positions.

    Args:
        row: The metric; named in errors.
        loss: How the loss reads outputs.
        output: (N, C, ...) of classes, (N, ...) of labels; for a loss by import path also
            (N, ..., C), (N * T, C) for targets (N, T), and labels with axes of one element more.
        target: (N, ...), classes, or labels of 0 and 1.

    Returns:
        With whether the targets' values are wrong, which is left to be checked.

    Raises:
        SpecError: their shapes do not say which output is whose.
    """
    if loss.kinds == ("labels",) or (loss is UNKNOWN_LOSS and _is_alike(output, target)):
        return _labels(row, loss, output, target)
    return _classes(row, loss, output, target)


def _is_alike(output: Tensor, target: Tensor) -> bool:
    """Whether shapes are the same but for axes of one element."""
    return _squeezed(output) == _squeezed(target)


def _squeezed(value: Tensor) -> list[int]:
    return [*value.shape[:1], *(size for size in value.shape[1:] if size != 1)]


def _classes(row: Row, loss: Loss, output: Tensor, target: Tensor) -> Judged:
    if target.is_floating_point() or target.is_complex():
        raise _refused(row, output, target, "targets of classes are integers")
    axis = _class_axis(row, loss, output, target)
    classes = output.shape[axis]
    if classes == 1:
        raise _refused(
            row, output, target,
            "a single class is always right; train one column with "
            "'binary_cross_entropy_with_logits'",
        )  # fmt: skip
    flat = target.reshape(-1).long()
    wrong = ((flat != IGNORED) & ((flat < 0) | (flat >= classes))).any()
    reason = f"targets lie outside the {classes} classes (only {IGNORED} is left out)"
    refusal = _refused(row, output, target, reason)
    outputs = output.movedim(axis, -1).reshape(-1, classes)
    return Judged(outputs, flat, loss.outputs, target.shape[0], wrong, refusal)


def _class_axis(row: Row, loss: Loss, output: Tensor, target: Tensor) -> int:
    """Torch's losses have classes along axis 1; others say by their shapes."""
    first = output.ndim >= 2 and (output.shape[0], *output.shape[2:]) == tuple(target.shape)
    if loss is not UNKNOWN_LOSS:
        if not first:
            raise _refused(row, output, target, "classes are along axis 1 of outputs")
        return 1
    last = output.ndim >= 2 and output.shape[:-1] == target.shape
    flat = output.ndim == 2 and target.ndim > 1 and output.shape[0] == target.numel()
    if first and last and output.ndim > 2:
        raise _refused(row, output, target, "classes could be along axis 1 or along the last")
    if not (first or last or flat):
        raise _refused(row, output, target, "these fit neither as classes nor as labels")
    return 1 if first else output.ndim - 1


def _labels(row: Row, loss: Loss, output: Tensor, target: Tensor) -> Judged:
    if "labels" not in row.kinds:
        raise _refused(row, output, target, "targets are labels, one for each output")
    if output.shape != target.shape and (loss is not UNKNOWN_LOSS or not _is_alike(output, target)):
        raise _refused(row, output, target, "labels have one output each")
    outputs, values = _flat(output), _flat(target.reshape(output.shape))
    values = values if values.is_floating_point() else values.long()
    yes_or_no = (values == 0) | (values == 1)
    if loss is UNKNOWN_LOSS:
        yes_or_no |= values == IGNORED
    refusal = _refused(row, output, target, "targets of labels are 0 or 1")
    _check_labels(row, output, target, outputs.shape[1])
    is_single = outputs.shape[1] == 1
    targets = values.long()[:, 0] if is_single else values.long()
    wrong = ~yes_or_no.all()
    return Judged(outputs, targets, loss.outputs, target.shape[0], wrong, refusal, is_single)


def _check_labels(row: Row, output: Tensor, target: Tensor, labels: int) -> None:
    if labels > 1 and row.name in _OF_CLASSES:
        raise _refused(row, output, target, "it has no usual meaning for several labels")
    if labels > 1 and output.ndim == 3 and row.name not in _POOLED:
        reason = "axis 1 could be labels or positions; outputs (N, 1, ...) are of one label"
        raise _refused(row, output, target, reason)


def check_one_hot(row: Row, loss: Loss, judged: Judged) -> None:
    """Refuse what may be classes, one-hot, where the loss does not say that they are labels.

    To be called for a first batch: a later, small one may have one label a sample by chance.

    Raises:
        SpecError: each sample has exactly one label.
    """
    if loss is not UNKNOWN_LOSS or judged.has_classes:
        return
    if bool((judged.targets.sum(1) == 1).all()):
        reason = "each target has one label: they could be classes, one-hot; give class numbers"
        raise _refused(row, judged.outputs, judged.targets, reason)


def _flat(value: Tensor) -> Tensor:
    """(N, L, ...) to (P, L); (N,) and (N, 1, ...) to (P, 1)."""
    if value.ndim < 2:
        return value.reshape(-1, 1)
    return value.movedim(1, -1).reshape(-1, value.shape[1])


def numbers(row: Row, loss: Loss, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a metric of numbers, as (N, columns) in float64.

    Raises:
        SpecError: shapes differ, so that a loss would compare each output with each target.
    """
    if output.shape != target.shape and (loss is not UNKNOWN_LOSS or not _is_alike(output, target)):
        reason = "they are to be compared one by one; give both one shape"
        raise _refused(row, output, target, reason)
    if output.is_complex() or target.is_complex():
        raise _refused(row, output, target, "complex numbers have no order")
    samples = output.shape[0] if output.ndim else 1
    outputs, targets = (value.double().reshape(samples, -1) for value in (output, target))
    if row.name in _BY_COLUMN and len(_squeezed(output)) > 2:
        raise _refused(row, output, target, "it goes by columns; outputs (N,) or (N, D) have some")
    if row.name == "cosine_similarity" and outputs.shape[1] < 2:
        raise _refused(row, output, target, "an angle needs two columns at least")
    return outputs, targets


def _refused(row: Row, output: Tensor, target: Tensor, reason: str) -> SpecError:
    kinds = f"outputs {_described(output)}, targets {_described(target)}"
    return SpecError(f"metrics: {row.name!r} cannot be computed: {reason} ({kinds}); {WAY_OUT}")


def _described(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
