"""Names of metrics: what each computes, for which losses, and which are refused and why.

A name has the same meaning for every model; `docs/metrics.md` shows the table. What has no single
meaning is an import path of a function that returns a `torchmetrics.Metric`, used as it is.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from cgo.errors import SpecError
from cgo.imports import is_import_path, resolve
from cgo.model import loss_function

#: What a loss compares: one of several classes, yes-or-no labels, or numbers.
Kind = Literal["classes", "labels", "numbers"]

WAY_OUT = (
    "give 'package.module:name', a function of your own that returns a torchmetrics.Metric; it is "
    "handed outputs and targets as they are"
)


@dataclass(frozen=True)
class Row:
    """One named metric."""

    name: str
    kinds: tuple[Kind, ...]
    better: Literal["max", "min"]
    computes: str


#: "Averaged": of class 1 of two, else the mean over classes or labels; see `docs/metrics.md`.
_BOTH: tuple[Kind, ...] = ("classes", "labels")

ROWS: tuple[Row, ...] = (
    Row("accuracy", _BOTH, "max", "share of the counted targets that are right"),
    Row("hamming_distance", _BOTH, "min", "share of the counted targets that are wrong"),
    Row("exact_match", _BOTH, "max", "share of the samples whose counted targets are all right"),
    Row("precision", _BOTH, "max", "true among predicted; averaged"),
    Row("recall", _BOTH, "max", "found among true; averaged"),
    Row("specificity", _BOTH, "max", "rejected among false; averaged"),
    Row("f1_score", _BOTH, "max", "harmonic mean of precision and recall; averaged"),
    Row("jaccard_index", _BOTH, "max", "intersection over union; averaged"),
    Row("matthews_corrcoef", _BOTH, "max", "Matthews' correlation; not for several labels"),
    Row("cohen_kappa", _BOTH, "max", "agreement beyond chance; not for several labels"),
    Row("auroc", _BOTH, "max", "area under the ROC curve, one against the rest; averaged"),
    Row("average_precision", _BOTH, "max", "mean precision over recalls; averaged"),
    Row(
        "calibration_error", _BOTH, "min",
        "confidence in the predicted class against its accuracy, in 15 bins, weighted by samples; "
        "not for several labels",
    ),
    Row("perplexity", ("classes",), "min", "exponential of the mean cross entropy"),
    Row("mean_squared_error", ("numbers",), "min", "mean of squared errors, over all elements"),
    Row("mean_absolute_error", ("numbers",), "min", "mean of absolute errors, over all elements"),
    Row(
        "mean_absolute_percentage_error", ("numbers",), "min",
        "mean of absolute errors over absolute targets, which count as 1.17e-6 at least; 1 is 100%",
    ),
    Row(
        "symmetric_mean_absolute_percentage_error", ("numbers",), "min",
        "mean of absolute errors over half the sum of absolute outputs and targets; up to 2",
    ),
    Row(
        "weighted_mean_absolute_percentage_error", ("numbers",), "min",
        "sum of absolute errors over sum of absolute targets",
    ),
    Row(
        "mean_squared_log_error", ("numbers",), "min",
        "mean of squared differences of log(1 + x); above -1 only",
    ),
    Row("log_cosh_error", ("numbers",), "min", "mean of log(cosh(error)), over all elements"),
    Row("r2_score", ("numbers",), "max", "1 - squared errors over variance; mean over columns"),
    Row(
        "explained_variance", ("numbers",), "max",
        "1 - variance of errors over variance of targets; mean over columns",
    ),
    Row(
        "relative_squared_error", ("numbers",), "min",
        "squared errors over those of the targets' mean; mean over columns",
    ),
    Row("pearson_corrcoef", ("numbers",), "max", "linear correlation; mean over columns"),
    Row("spearman_corrcoef", ("numbers",), "max", "correlation of ranks; mean over columns"),
    Row(
        "concordance_corrcoef", ("numbers",), "max",
        "Lin's concordance: correlation that also minds mean and scale; mean over columns",
    ),
    Row(
        "cosine_similarity", ("numbers",), "max",
        "cosine of the angle between output and target, rows of several columns; mean over samples",
    ),
)  # fmt: skip

_MANY = "it gives a matrix or a curve, no number to compare models by"
_POINT = "it gives two numbers, and needs an argument"
#: Names that torchmetrics has, and why they are not taken.
REFUSED: dict[str, str] = {
    "confusion_matrix": _MANY,
    "roc": _MANY,
    "precision_recall_curve": _MANY,
    "stat_scores": "it gives counts, no number to compare models by",
    "precision_at_fixed_recall": _POINT,
    "recall_at_fixed_precision": _POINT,
    "sensitivity_at_specificity": _POINT,
    "specificity_at_sensitivity": _POINT,
    "fbeta_score": "its beta has no usual value, and with 1 it is 'f1_score'",
    "hinge_loss": "it judges margins, and outputs are probabilities or their logarithms",
    "logauc": "the range of false positive rates that it looks at has no usual value",
    "negative_predictive_value": "its average has no usual meaning; see 'precision'",
    "minkowski_distance": "it needs arguments",
    "tweedie_deviance_score": "its power has no usual value, and with 0 it is the squared error",
    "critical_success_index": "it needs arguments",
    "normalized_root_mean_squared_error": "what it is divided by has no usual meaning",
    "kendall_rank_corrcoef": "it has three variants; 'spearman_corrcoef' is a correlation of ranks",
    "kl_divergence": "it compares distributions, which are neither classes nor numbers",
}


@dataclass(frozen=True)
class Loss:
    """What a loss reads: kinds of targets, and what the outputs of classes or labels are."""

    kinds: tuple[Kind, ...]
    outputs: Literal["logits", "log-probabilities", "probabilities", "scores", "values"]


#: By name in `torch.nn.functional`; others there have no named metrics.
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(("classes",), "logits"),
    "nll_loss": Loss(("classes",), "log-probabilities"),
    "multi_margin_loss": Loss(("classes",), "scores"),
    "binary_cross_entropy_with_logits": Loss(("labels",), "logits"),
    "multilabel_soft_margin_loss": Loss(("labels",), "logits"),
    "binary_cross_entropy": Loss(("labels",), "probabilities"),
    "mse_loss": Loss(("numbers",), "values"),
    "l1_loss": Loss(("numbers",), "values"),
    "smooth_l1_loss": Loss(("numbers",), "values"),
    "huber_loss": Loss(("numbers",), "values"),
}
#: A loss by import path: the targets say what they are, and outputs are taken for logits.
UNKNOWN_LOSS = Loss(("classes", "labels", "numbers"), "logits")

_NEED_PROBABILITIES = ("auroc", "average_precision", "calibration_error", "perplexity")


def _spelled(name: str) -> str:
    return name.replace("_", "").lower()


_BY_SPELLING = {_spelled(row.name): row for row in ROWS}


@cache
def row_of(name: str) -> Row:
    """The row of a named metric; "f1_score" and torchmetrics' "F1Score" are the same.

    Raises:
        SpecError: it is not in the table; says why, and the way out.
    """
    found = _BY_SPELLING.get(_spelled(name))
    if found is not None:
        return found
    for refused, reason in REFUSED.items():
        if _spelled(refused) == _spelled(name):
            raise SpecError(f"metrics: {name!r} is not taken by name: {reason}; {WAY_OUT}")
    if any(_spelled(known) == _spelled(name) for known in _torchmetrics()):
        raise SpecError(
            f"metrics: {name!r} has no meaning for outputs and targets as such; {WAY_OUT}"
        )
    raise SpecError(
        f"metrics: torchmetrics has no metric {name!r}; use one of {', '.join(names())}, or "
        f"{WAY_OUT}"
    )


def names(kinds: tuple[Kind, ...] = ("classes", "labels", "numbers")) -> list[str]:
    """The named metrics of any of these kinds, in the order of the table."""
    return [row.name for row in ROWS if set(row.kinds) & set(kinds)]


def _torchmetrics() -> list[str]:
    import torchmetrics  # here, as what its import takes is for an error's message alone

    found = ((name, getattr(torchmetrics, name)) for name in dir(torchmetrics))
    kind = torchmetrics.Metric
    return [name for name, value in found if inspect.isclass(value) and issubclass(value, kind)]


def loss_of(loss: str) -> Loss | None:
    """What a loss reads; None for one of torch's that no named metric fits.

    An import path of a function in `torch.nn.functional` is that function.
    """
    from torch.nn import functional

    if is_import_path(loss):
        function = loss_function(loss)
        same = [name for name in LOSSES if getattr(functional, name) is function]
        return LOSSES[same[0]] if same else UNKNOWN_LOSS
    return LOSSES.get(loss)


def check_metric(name: str, loss: str = "cross_entropy") -> None:
    """Check that a metric has a meaning for models trained with a loss.

    Raises:
        SpecError: it is unknown, needs arguments, gives no single number, or is one of other
            targets than the loss is; the message names what can be used.
    """
    if is_import_path(name):
        _check_call(name)
        return
    row, read = row_of(name), loss_of(loss)
    if read is None:
        raise SpecError(f"metrics: {name!r} has no meaning for outputs of loss {loss!r}; {WAY_OUT}")
    if not set(row.kinds) & set(read.kinds):
        raise SpecError(
            f"metrics: {name!r} is a metric of {' and '.join(row.kinds)}, and loss {loss!r} "
            f"compares {' and '.join(read.kinds)}: use {', '.join(names(read.kinds)[:4])} or "
            f"others (docs/metrics.md), or {WAY_OUT}"
        )
    if read.outputs == "scores" and row.name in _NEED_PROBABILITIES:
        raise SpecError(
            f"metrics: {name!r} needs probabilities, and outputs of loss {loss!r} are none; "
            f"{WAY_OUT}"
        )


def _check_call(path: str) -> None:
    found = resolve(path, field="metrics")
    if inspect.isclass(found) and "task" in inspect.signature(found.__new__).parameters:
        raise SpecError(
            f"metrics: {path!r} needs a task; use a name, such as 'f1_score', or wrap it in a "
            "function of your own and give that as 'package.module:name'"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise SpecError(
            f"metrics: {path!r} needs arguments ({error}); wrap it in a function of your own and "
            "give that as 'package.module:name'"
        ) from error


@cache
def higher_is_better(name: str) -> bool:
    """Whether a larger value of the metric is better.

    Raises:
        SpecError: the metric does not say; set `metric_mode`.
    """
    if not is_import_path(name):
        return row_of(name).better == "max"
    found: Any = resolve(name, field="metrics")
    if not inspect.isclass(found):
        found = found()
    better = getattr(found, "higher_is_better", None)
    if not isinstance(better, bool):
        raise SpecError(f"metrics: {name!r} does not say which way is better; set metric_mode")
    return better
