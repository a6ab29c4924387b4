"""Metrics of classes and labels against scikit-learn's functions, over random batches."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cgo.errors import SpecError
from cgo.metrics import ROWS
from cgo.runtime.measures import build_metric

CPU = torch.device("cpu")
CROSS, LOGITS = "cross_entropy", "binary_cross_entropy_with_logits"
ROUNDING = {"rel": 1e-6, "abs": 1e-7}  # some figures of torchmetrics are float32


def measured(name, loss, batches):
    measure = build_metric(name, loss, CPU)
    for output, target in batches:
        measure.update(output, target)
    return measure.compute()


def cut(output, target, points):
    """Batches that end at these samples, and the rest."""
    bounds = itertools.pairwise([0, *points, len(target)])
    return [(output[a:b], target[a:b]) for a, b in bounds]


def quiet(function, *given, **more):
    with warnings.catch_warnings():  # of what is not defined
        warnings.simplefilter("ignore")
        return function(*given, **more)


@st.composite
def classified(draw):
    """Outputs (N, C), some targets left out, and how they are batched."""
    count, samples = draw(st.integers(2, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    used = draw(st.integers(1, count))  # some classes never occur
    output = torch.randn(samples, count, generator=generator) * draw(st.sampled_from([0.1, 1, 9]))
    target = torch.randint(0, used, (samples,), generator=generator)
    ignored = torch.rand(samples, generator=generator) < draw(st.sampled_from([0, 0.3, 0.95]))
    target[ignored] = -100
    if draw(st.booleans()):  # all between 0 and 1
        output = output.sigmoid()
    return output, target, sorted(draw(st.lists(st.integers(0, samples), max_size=3)))


def averages(classes):
    return {"average": "binary" if classes == 2 else "macro", "zero_division": 0}


OF_PREDICTIONS = {
    "accuracy": lambda t, p, c: sk.accuracy_score(t, p),
    "hamming_distance": lambda t, p, c: sk.hamming_loss(t, p),
    "exact_match": lambda t, p, c: sk.accuracy_score(t, p),
    "precision": lambda t, p, c: sk.precision_score(t, p, **averages(c)),
    "recall": lambda t, p, c: sk.recall_score(t, p, **averages(c)),
    "f1_score": lambda t, p, c: sk.f1_score(t, p, **averages(c)),
    "jaccard_index": lambda t, p, c: sk.jaccard_score(t, p, **averages(c)),
    "matthews_corrcoef": lambda t, p, c: sk.matthews_corrcoef(t, p),
    "cohen_kappa": lambda t, p, c: sk.cohen_kappa_score(t, p),
    "specificity": lambda t, p, c: specificity(t, p, c),
}


def specificity(target, predicted, classes):
    """The recall of the negatives: of class 1 of two, else the mean over classes that occur."""
    occur = [1] if classes == 2 else sorted({*target, *predicted})
    return np.mean(
        [sk.recall_score(target != k, predicted != k, zero_division=0) for k in occur]
    )  # fmt: skip


@pytest.mark.parametrize("name", OF_PREDICTIONS)
@given(case=classified())
@settings(max_examples=40, deadline=None)
def test_metrics_of_predicted_classes_are_scikit_learns(name, case):
    output, target, points = case
    found = measured(name, CROSS, cut(output, target, points))
    counted = target != -100
    if not counted.any():
        assert math.isnan(found)
        return
    true, said = target[counted].numpy(), output[counted].argmax(1).numpy()
    expected = quiet(OF_PREDICTIONS[name], true, said, output.shape[1])
    assert found == pytest.approx(float(expected), nan_ok=True, **ROUNDING)


def test_accuracy_has_the_bits_that_torchmetrics_gives():
    import torchmetrics

    torch.manual_seed(0)
    for samples, classes in ((7, 2), (50, 10), (4321, 3)):
        output, target = torch.randn(samples, classes), torch.randint(0, classes, (samples,))
        old = torchmetrics.Accuracy(task="multiclass", num_classes=classes)
        assert measured("accuracy", CROSS, [(output, target)]) == float(old(output, target))


@given(classified(), st.sampled_from(["cross_entropy", "nll_loss"]))
@settings(max_examples=100, deadline=None)
def test_areas_are_scikit_learns_over_classes_that_occur(case, loss):
    output, target, points = case
    counted = target != -100
    if loss == "nll_loss":  # in float32 two of these may be equal where what they come from is not
        output = output.log_softmax(1)
        scores = output[counted].double().exp().numpy()
    else:
        scores = output[counted].double().softmax(1).numpy()
    true, classes = target[counted].numpy(), output.shape[1]
    columns = [1] if classes == 2 else range(classes)
    for name, score in (
        ("auroc", sk.roc_auc_score), ("average_precision", sk.average_precision_score),
    ):  # fmt: skip
        most = 1 if name == "auroc" else 2  # where nothing is negative there is no area
        known = [k for k in columns if 0 < (true == k).mean() < most] if len(true) else []
        expected = [quiet(score, true == k, scores[:, k]) for k in known]
        found = measured(name, loss, cut(output, target, points))
        assert found == pytest.approx(np.mean(expected or [np.nan]), nan_ok=True, **ROUNDING)


@given(classified())
@settings(max_examples=40, deadline=None)
def test_calibration_and_perplexity(case):
    output, target, points = case
    counted = target != -100
    parts = cut(output, target, points)
    found = measured("perplexity", CROSS, parts)
    if not counted.any():
        assert math.isnan(found)
        assert math.isnan(measured("calibration_error", CROSS, parts))
        return
    loss = torch.nn.functional.cross_entropy(output.double(), target)
    assert found == pytest.approx(float(loss.exp()), rel=1e-9)
    confidence, said = output[counted].double().softmax(1).max(1)
    right = (said == target[counted]).double()
    inner = confidence[confidence < 14.5 / 15] * 15
    assume(bool(((inner - inner.round()).abs() > 1e-4).all()))  # at an edge rounding decides
    bins = (confidence * 15).ceil().long().clamp(1, 15)
    gaps = [
        abs(float((right - confidence)[bins == k].sum())) for k in range(1, 16)
    ]  # of each bin, times its share of samples
    expected = sum(gaps) / len(said)
    assert measured("calibration_error", CROSS, parts) == pytest.approx(expected, abs=1e-6)


@given(st.integers(2, 40), st.integers(2, 5), st.integers(0, 2**32), st.booleans())
@settings(max_examples=100, deadline=None)
def test_metrics_of_labels_are_scikit_learns(samples, labels, seed, between):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(samples, labels, generator=generator)
    output = output.sigmoid() if between else output
    target = torch.randint(0, 2, (samples, labels), generator=generator)
    for loss in (LOGITS, "binary_cross_entropy"):
        given = output if loss == LOGITS else output.sigmoid()
        said = (output > 0).long().numpy()
        parts = cut(given, target.float(), [samples // 2])
        expected = {
            "accuracy": (said == target.numpy()).mean(),
            "hamming_distance": sk.hamming_loss(target, said),
            "exact_match": sk.accuracy_score(target, said),
            "f1_score": sk.f1_score(target, said, average="macro", zero_division=0),
            "precision": sk.precision_score(target, said, average="macro", zero_division=0),
            "recall": sk.recall_score(target, said, average="macro", zero_division=0),
            "jaccard_index": sk.jaccard_score(target, said, average="macro", zero_division=0),
        }
        for name, value in expected.items():
            assert measured(name, loss, parts) == pytest.approx(float(value), **ROUNDING), name
        known = [k for k in range(labels) if 0 < target[:, k].sum() < samples]
        areas = [sk.roc_auc_score(target[:, k], output[:, k].double().sigmoid()) for k in known]
        found = measured("auroc", LOGITS, cut(output, target.float(), [samples // 2]))
        assert found == pytest.approx(np.mean(areas or [np.nan]), nan_ok=True, **ROUNDING)


@pytest.mark.parametrize("shape", [(60,), (60, 1), (10, 1, 2, 3)])
@pytest.mark.parametrize("name", [row.name for row in ROWS if "labels" in row.kinds])
def test_one_label_is_two_classes(name, shape):
    torch.manual_seed(1)
    output, target = torch.randn(shape), torch.randint(0, 2, shape)
    found = measured(name, LOGITS, [(output, target.float())])
    two = torch.stack([torch.zeros(60), output.reshape(-1)], 1)
    expected = measured(name, CROSS, [(two, target.reshape(-1))])
    if name == "exact_match" and len(shape) == 4:
        right = ((output > 0) == target.bool()).reshape(10, -1).all(1)
        expected = float(right.float().mean())
    assert found == pytest.approx(expected, **ROUNDING)


@pytest.mark.parametrize(
    "name", [row.name for row in ROWS if row.kinds != ("numbers",)], ids=str
)  # fmt: skip
def test_ignored_targets_change_nothing_and_may_fill_a_batch(name):
    torch.manual_seed(2)
    output, target = torch.randn(30, 4), torch.randint(0, 4, (30,))
    alone = measured(name, CROSS, [(output, target)])
    nothing = (torch.randn(5, 4), torch.full((5,), -100))
    mixed = (torch.cat([output, nothing[0]]), torch.cat([target, nothing[1]]))
    assert measured(name, CROSS, [mixed]) == alone
    assert measured(name, CROSS, [nothing, (output, target), nothing]) == alone
    assert math.isnan(measured(name, CROSS, [nothing]))
    assert math.isnan(measured(name, CROSS, []))


def test_a_sample_without_counted_targets_is_no_match_and_no_miss():
    target = torch.tensor([[0, 1], [-100, -100], [1, -100]])
    output = torch.nn.functional.one_hot(target.clamp(min=0), 2).movedim(-1, 1).float()
    assert measured("exact_match", CROSS, [(output, target)]) == 1
    output[2] = output[2].flip(0)
    assert measured("exact_match", CROSS, [(output, target)]) == 0.5


def test_batches_must_have_equally_many_classes():
    measure = build_metric("accuracy", CROSS, CPU)
    measure.update(torch.rand(4, 3), torch.zeros(4).long())
    with pytest.raises(SpecError, match="batches have 3 and 5 classes or labels"):
        measure.update(torch.rand(4, 5), torch.zeros(4).long())


def test_one_hot_classes_are_refused_at_the_first_batch_only():
    one, two = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 1], [1, 0]])
    measure = build_metric("f1_score", "support.losses:smoothed", CPU)
    with pytest.raises(SpecError, match="they could be classes, one-hot"):
        measure.update(torch.rand(2, 2), one)
    measure = build_metric("f1_score", "support.losses:smoothed", CPU)
    measure.update(torch.rand(2, 2), two)
    measure.update(torch.rand(2, 2), one)


def test_a_metric_by_import_path_is_handed_what_there_is():
    output, target = torch.rand(8, 4), torch.randint(0, 4, (8,))
    target[:3] = -100  # counted as wrong: its own matter
    expected = float((output.argmax(1) == target).float().mean())
    parts = [(output[:5], target[:5]), (output[5:], target[5:])]
    assert measured("support.own_metrics:hits", CROSS, parts) == pytest.approx(expected)


def test_a_metric_by_import_path_must_give_one_number():
    given = [(torch.rand(8, 3), torch.randint(0, 3, (8,)))]
    with pytest.raises(SpecError, match=r"'support\.own_metrics:matrix' gave shape \(3, 3\)"):
        measured("support.own_metrics:matrix", CROSS, given)
