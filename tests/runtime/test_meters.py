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


def test_metrics_without_a_prediction_are_refused():
    meter = EvaluationMeter(cgo.TrainingSpec(metrics=("accuracy",)))
    with pytest.raises(TypeError, match="an output that is"):
        meter.add(torch.tensor(1.0), None, torch.zeros(3), 3)
