"""Sums over an epoch, counted at once or together."""

import pytest
import torch

import cgo
from cgo.runtime.meters import EvaluationMeter, LossMeter


def test_sums_of_several_batches_count_as_their_batches():
    one, together = LossMeter(), LossMeter()
    losses, sizes = torch.tensor([0.5, 1.5, 4.0]), [8, 8, 3]
    for loss, size in zip(losses, sizes):
        one.add(loss, size)
    together.add(losses[0], 8)
    together.add_sum((losses[1:].double() * torch.tensor(sizes[1:])).sum(), 11)
    assert together.mean() == pytest.approx(one.mean(), rel=1e-15)


@pytest.mark.parametrize("kept_bytes", [0, 500, 10**9])
def test_predictions_that_are_kept_give_the_same_metrics(kept_bytes):
    training = cgo.TrainingSpec(metrics=("accuracy", "f1_score", "auroc"))
    torch.manual_seed(0)
    batches = [(torch.rand(n, 5).softmax(1), torch.randint(0, 5, (n,))) for n in (16, 16, 7)]
    at_once, kept = EvaluationMeter(training), EvaluationMeter(training, kept_bytes)
    for prediction, target in batches:
        for meter in (at_once, kept):
            meter.add(torch.tensor(1.0), prediction, target, len(target))
    assert kept.values() == pytest.approx(at_once.values(), rel=1e-6)


def test_batches_of_other_sizes_are_kept_apart():
    """Images or sentences that are as long as the longest of their batch."""
    training = cgo.TrainingSpec(metrics=("accuracy", "f1_score", "support.own_metrics:hits"))
    torch.manual_seed(0)
    lengths = (4, 4, 6, 6, 2)
    batches = [(torch.randn(8, 3, n), torch.randint(0, 3, (8, n))) for n in lengths]
    at_once, kept = EvaluationMeter(training), EvaluationMeter(training, 10**9)
    for prediction, target in batches:
        for meter in (at_once, kept):
            meter.add(torch.tensor(1.0), prediction, target, len(target))
    right = sum(int((p.argmax(1) == t).sum()) for p, t in batches)
    assert kept.values() == pytest.approx(at_once.values())
    assert kept.values()["val_accuracy"] == pytest.approx(right / (8 * sum(lengths)))


@pytest.mark.parametrize("kept_bytes", [0, 10**9])
def test_batches_without_counted_targets(kept_bytes):
    meter = EvaluationMeter(cgo.TrainingSpec(metrics=("accuracy", "auroc")), kept_bytes)
    target = torch.tensor([0, 1, 1, 0])
    for targets in (torch.full((4,), -100), target, torch.full((4,), -100)):
        output = torch.nn.functional.one_hot(targets.clamp(min=0), 2).float()
        meter.add(torch.tensor(1.0), output, targets, 4)
    assert meter.values() == {"val_loss": 1.0, "val_accuracy": 1.0, "val_auroc": 1.0}


def test_the_loss_says_what_outputs_are():
    """All of them lie between 0 and 1, and would pass for probabilities."""
    output, target = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1.0, 0.0, 1.0])
    values = {}
    for loss in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
        meter = EvaluationMeter(cgo.TrainingSpec(loss=loss, metrics=("accuracy", "recall")))
        meter.add(torch.tensor(1.0), output, target, 3)
        values[loss] = meter.values()
    assert values["binary_cross_entropy_with_logits"]["val_accuracy"] == pytest.approx(2 / 3)
    assert values["binary_cross_entropy_with_logits"]["val_recall"] == 1
    assert values["binary_cross_entropy"]["val_accuracy"] == pytest.approx(2 / 3)
    assert values["binary_cross_entropy"]["val_recall"] == 0.5


def test_metrics_without_a_prediction_are_refused():
    meter = EvaluationMeter(cgo.TrainingSpec(metrics=("accuracy",)))
    with pytest.raises(TypeError, match="an output that is"):
        meter.add(torch.tensor(1.0), None, torch.zeros(3), 3)
