"""Sums over an epoch, counted at once or together."""

import math

import pytest
import torch

import cgo
from cgo.model import TrainingSpec
from cgo.private.dispatch_modes import TorchDispatchMode
from cgo.runtime import meters
from cgo.runtime.meters import EvaluationMeter, LossMeter


def test_sums_of_several_batches_count_as_their_batches():
    one, together = LossMeter(), LossMeter()
    losses, sizes = torch.tensor([0.5, 1.5, 4.0]), [8, 8, 3]
    for loss, size in zip(losses, sizes):
        one.add(loss, size)
    together.add(losses[0], 8)
    together.add_sum((losses[1:].double() * torch.tensor(sizes[1:])).sum(), 11)
    assert together.mean() == pytest.approx(one.mean(), rel=1e-15)


SYNC_FREE = ("accuracy", "f1_score", "matthews_corrcoef", "exact_match", "hamming_distance")
NUMBERS = ("mean_squared_error", "r2_score")


#: What a GPU is waited for with: values read, and results whose size depends on values.
WAITING = [
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
]


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        masks = args[1] if name == "index" else ()
        assert name not in WAITING
        assert not any(mask is not None and mask.dtype is torch.bool for mask in masks), name
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("kept_bytes", [0, 10**9])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"])
def test_nothing_waits_for_a_gpu_until_all_is_fetched(loss, kept_bytes):
    metrics = NUMBERS if loss == "mse_loss" else SYNC_FREE[: 2 if "binary" in loss else None]
    training = TrainingSpec(loss=loss, metrics=metrics)
    meter, train = EvaluationMeter(training, kept_bytes), LossMeter()
    target = torch.ones(8, dtype=torch.int64) if loss == "cross_entropy" else torch.ones(8, 4)
    with NoWait():
        for samples in (8, 8, 3):
            train.add(torch.rand(()), samples)
            meter.add(torch.rand(()), torch.rand(samples, 4), target[:samples], samples)
        held = [*train.held(), *meter.held()]
    assert len(held) > len(metrics)
    with pytest.raises(AssertionError), NoWait():  # what makes this mean something
        meter.values()


def test_all_of_a_device_are_fetched_at_once(monkeypatch):
    moves = []

    def moved(tensors):
        moves.append(len(tensors))
        return [torch.full((), size.numel()) for size in tensors]

    monkeypatch.setattr(meters, "_moved", moved)
    there = {number: [torch.empty(number, device="meta")] * 2 for number in range(5)}
    found = meters.fetched(there | {"here": [torch.tensor(7)], "none": []})
    assert moves == [10]
    expected = {number: [number, number] for number in range(5)} | {"here": [7], "none": []}
    assert {key: [int(value) for value in own] for key, own in found.items()} == expected


def test_what_is_fetched_keeps_its_bits():
    wanted = [
        torch.arange(3), torch.tensor(True), torch.tensor([0.1, math.nan, -0.0]),
        torch.tensor(7, dtype=torch.int16), torch.rand(2, 3).double().T, torch.tensor(1e-300),
        torch.ones(()).expand(4), torch.zeros(0),
    ]  # fmt: skip
    for value, other in zip(wanted, meters._moved(wanted), strict=True):
        assert value.dtype is other.dtype
        assert torch.equal(value.nan_to_num(9.0), other.nan_to_num(9.0))
    assert meters.fetched({"a": wanted, "b": []}) == {"a": wanted, "b": []}


@pytest.mark.parametrize("metric", [*SYNC_FREE, *NUMBERS, "support.own_metrics:hits"])
def test_settled_meters_give_the_same_values(metric):
    training = TrainingSpec(
        loss="mse_loss" if metric in NUMBERS else "cross_entropy", metrics=(metric,)
    )
    plain, settled = EvaluationMeter(training), EvaluationMeter(training)
    torch.manual_seed(1)
    for _ in range(3):
        target = torch.randn(9, 4) if metric in NUMBERS else torch.randint(0, 4, (9,))
        given = torch.rand(()), torch.randn(9, 4), target, 9
        plain.add(*given)
        settled.add(*given)
    held = settled.held()
    settled.settle([value.clone() for value in held])
    for value in held:  # what is computed from now on is of the copies
        value.zero_()
    assert settled.values() == plain.values()


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
