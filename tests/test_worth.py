"""The decision to merge: right where the two sides are far apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgo.worth import Costs, Sample, estimate, gain

DIGITS = (23, 6)  # batches of training and evaluation
PERCEPTRON, NETWORK, LARGE = Sample(0.0004, 5), Sample(0.006, 20), Sample(0.5, 60)


@pytest.mark.parametrize(
    ("sample", "models", "epochs", "merged"),
    [
        (PERCEPTRON, 1, 1, False),
        (PERCEPTRON, 64, 1, False),
        (PERCEPTRON, 64, 50, True),
        (NETWORK, 1, 2, False),
        (NETWORK, 24, 1, False),
        (NETWORK, 24, 8, True),
        (LARGE, 1, 1, False),
        (LARGE, 8, 50, True),
    ],
)
def test_few_steps_do_not_repay_merging(sample, models, epochs, merged):
    assert estimate([sample], [epochs] * models, DIGITS).merge is merged


@given(
    st.floats(1e-4, 1.0), st.integers(1, 80), st.integers(1, 100), st.integers(1, 60),
    st.sampled_from(["cpu", "cuda:0"]),
)  # fmt: skip
def test_more_epochs_never_speak_against_merging(step_s, layers, models, epochs, device):
    sample = Sample(step_s, layers)
    fewer = estimate([sample], [epochs] * models, DIGITS, device=device)
    more = estimate([sample], [epochs + 1] * models, DIGITS, device=device)
    assert more.merge or not fewer.merge


@given(st.floats(1e-5, 10.0), st.integers(1, 1000), st.sampled_from(["cpu", "cuda:1"]))
def test_a_gain_is_never_a_loss_and_grows_with_company(step_s, models, device):
    assert 1 < gain(models, step_s, device) <= gain(models + 1, step_s, device)


def test_what_comes_before_is_counted_for_each_model():
    sample = Sample(0.01, 10)
    costs = Costs(model_s=1.0, calls=0, layer_s=0, lowered_layer_s=0.01, trial_s=0.2)
    found = estimate([sample], [1, 1, 1], (10, 0), costs=costs)
    assert found.plain_s == pytest.approx(0.375)  # with the optimizer's part
    trained = 0.375 / gain(3, 0.0125, "cpu")
    assert found.merged_s == pytest.approx(3.0 + 0.5 + trained)
    assert "3 model(s): 0.38 s one after another, 3.8 s merged" in str(found)
    waiting = estimate([sample], [1, 1, 1], (10, 0), spare_s=10.0, costs=costs)
    assert waiting.merged_s == pytest.approx(0.5 + trained)  # captured while workers start


def test_the_mean_of_the_samples_stands_for_all():
    mixed = estimate([Sample(0.001, 4), Sample(0.003, 8)], [5] * 10, DIGITS)
    assert mixed == estimate([Sample(0.002, 6)], [5] * 10, DIGITS)
