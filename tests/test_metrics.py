"""Metric names and the metrics built for them."""

import pytest
import torch
import torchmetrics

from cgo.errors import SpecError
from cgo.metrics import build_metric, check_metric, higher_is_better, metric_class


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("accuracy", torchmetrics.Accuracy),
        ("f1_score", torchmetrics.F1Score),
        ("auroc", torchmetrics.AUROC),
        ("mean_squared_error", torchmetrics.MeanSquaredError),
        ("torchmetrics:R2Score", torchmetrics.R2Score),
    ],
)
def test_functional_names_and_import_paths(name, found):
    assert metric_class(name) is found
    check_metric(name)


def test_a_metric_that_needs_arguments_says_how_to_give_them():
    with pytest.raises(SpecError, match=r"'minkowski_distance' needs arguments.*wrap it"):
        check_metric("minkowski_distance")


@pytest.mark.parametrize(("name", "better"), [("accuracy", True), ("mean_squared_error", False)])
def test_which_way_is_better(name, better):
    assert higher_is_better(name) is better


@pytest.mark.parametrize(
    ("output", "target", "task"),
    [
        (torch.rand(8, 4), torch.randint(0, 4, (8,)), "Multiclass"),
        (torch.rand(8), torch.randint(0, 2, (8,)), "Binary"),
        (torch.rand(8, 4), torch.randint(0, 2, (8, 4)), "Multilabel"),
        (torch.rand(8, 4, 5), torch.randint(0, 4, (8, 5)), "Multiclass"),
    ],
)
def test_the_task_follows_from_the_shapes(output, target, task):
    metric = build_metric("accuracy", output, target)
    assert type(metric).__name__.startswith(task)
    metric.update(output, target)
    assert 0 <= float(metric.compute()) <= 1


def test_metrics_accumulate_over_batches_of_different_sizes():
    output, target = torch.rand(10, 3), torch.randint(0, 3, (10,))
    metric = build_metric("f1_score", output, target)
    for part in (slice(0, 7), slice(7, 10)):
        metric.update(output[part], target[part])
    whole = build_metric("f1_score", output, target)
    whole.update(output, target)
    assert float(metric.compute()) == pytest.approx(float(whole.compute()))
