"""Metrics of numbers against scikit-learn's and scipy's functions, over random batches."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from cgo.metrics import ROWS
from cgo.runtime.accumulators import NUMBERS
from cgo.runtime.measures import build_metric


def measured(name, batches):
    measure = build_metric(name, "mse_loss", torch.device("cpu"))
    for output, target in batches:
        measure.update(output, target)
    return measure.compute()


def halves(output, target, cut_at):
    return [(output[:cut_at], target[:cut_at]), (output[cut_at:], target[cut_at:])]


def quiet(function, *given):
    with warnings.catch_warnings():  # of what is not defined
        warnings.simplefilter("ignore")
        return function(*given)


@st.composite
def regressed(draw):
    columns, samples = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale, mean = draw(st.sampled_from([1e-4, 1.0, 1e3])), draw(st.sampled_from([0.0, 1e3]))
    target = mean + scale * torch.randn(samples, columns, generator=generator).double()
    output = target + 0.5 * scale * torch.randn(samples, columns, generator=generator).double()
    return output, target, draw(st.integers(0, samples))


def by_column(function):
    return lambda t, o: np.mean([function(t[:, k], o[:, k]) for k in range(t.shape[1])])


def concordance(target, output):
    covariance = np.cov(target, output)
    gap = (target.mean() - output.mean()) ** 2
    return 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + gap)


OF_NUMBERS = {
    "mean_squared_error": sk.mean_squared_error,
    "mean_absolute_error": sk.mean_absolute_error,
    "r2_score": sk.r2_score,
    "explained_variance": sk.explained_variance_score,
    "relative_squared_error": by_column(lambda t, o: 1 - sk.r2_score(t, o)),
    "weighted_mean_absolute_percentage_error": lambda t, o: np.abs(t - o).sum() / np.abs(t).sum(),
    "symmetric_mean_absolute_percentage_error": lambda t, o: (
        2 * np.abs(t - o) / (np.abs(t) + np.abs(o))
    ).mean(),
    "pearson_corrcoef": by_column(lambda t, o: stats.pearsonr(t, o)[0]),
    "spearman_corrcoef": by_column(lambda t, o: stats.spearmanr(t, o)[0]),
    "concordance_corrcoef": by_column(concordance),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
@given(case=regressed())
@settings(max_examples=30, deadline=None)
def test_values_are_scikit_learns_or_scipys(name, case):
    output, target, cut_at = case
    expected = float(OF_NUMBERS[name](target.numpy(), output.numpy()))
    found = measured(name, halves(output, target, cut_at))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_equal_values_share_their_ranks(values, seed):
    output = torch.tensor(values)
    target = torch.randint(0, 4, output.shape, generator=torch.Generator().manual_seed(seed))
    expected = quiet(stats.spearmanr, output.numpy(), target.numpy())[0]
    found = measured("spearman_corrcoef", halves(output, target, len(values) // 2))
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-9)


@given(regressed())
@settings(max_examples=30, deadline=None)
def test_metrics_of_positive_numbers(case):
    output, target, cut_at = (v.abs() + 0.5 if isinstance(v, torch.Tensor) else v for v in case)
    parts = halves(output, target, cut_at)
    for name, function in (
        ("mean_squared_log_error", sk.mean_squared_log_error),
        ("mean_absolute_percentage_error", sk.mean_absolute_percentage_error),
    ):
        found = measured(name, parts)
        assert found == pytest.approx(function(target.numpy(), output.numpy()), rel=1e-6)


def test_log_cosh_and_cosine():
    torch.manual_seed(0)
    output, target = torch.randn(20, 3), torch.randn(20, 3)
    parts = halves(output, target, 7)
    expected = (output - target).double().cosh().log().mean()
    assert measured("log_cosh_error", parts) == pytest.approx(float(expected), rel=1e-6)
    cosine = torch.cosine_similarity(output.double(), target.double()).mean()
    assert measured("cosine_similarity", parts) == pytest.approx(float(cosine), rel=1e-6)


def test_targets_that_do_not_vary_are_explained_only_by_themselves():
    same = torch.full((6, 1), 0.3)
    assert measured("r2_score", [(same, same)]) == 1
    assert measured("r2_score", [(same + 1, same)]) == 0
    for name in ("pearson_corrcoef", "spearman_corrcoef"):
        assert math.isnan(measured(name, [(torch.rand(6, 1), same)]))


def test_every_metric_of_numbers_has_an_accumulator():
    assert set(NUMBERS) == {row.name for row in ROWS if row.kinds == ("numbers",)}
