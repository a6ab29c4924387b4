"""Random networks of random operators, merged and fused: each equal to training alone.

Forward, backward, 20 optimizer steps, evaluation and `state_dict`, in float64.
"""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.merged import Case, Merged, assert_equal_float64
from support.random_nets import draw_steps

import cgo

#: What a true gradient of zero leaves of rounding errors must not be blown up: a large eps.
OPTIMIZERS = (
    {"optimizer": "SGD", "optimizer_kwargs": {"lr": 0.01, "momentum": 0.9, "nesterov": True}},
    {"optimizer": "SGD", "optimizer_kwargs": {"lr": 0.02, "weight_decay": 0.01}},
    {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.002, "eps": 1e-3}},
    {"optimizer": "AdamW", "optimizer_kwargs": {"lr": 0.001, "eps": 1e-3}},
    {"optimizer": "RMSprop", "optimizer_kwargs": {"lr": 0.001, "eps": 1e-3}},
    {"optimizer": "Adagrad", "optimizer_kwargs": {"lr": 0.005, "eps": 1e-3}},
)


def cases(seed):
    """Networks that are equal, that begin or end alike, and that have nothing in common.

    All from one seed: hypothesis likes few and small numbers, and would draw the same operators
    again and again.
    """
    dice = random.Random(seed)
    pool = [draw_steps(dice) for _ in range(dice.randint(1, 3))]
    found = []
    for number in range(dice.randint(2, 4)):
        before, after = dice.choice([(0, 0), (0, 0), (2, 0), (0, 2)])
        steps = [*draw_steps(dice, before, before), *dice.choice(pool)]
        steps += draw_steps(dice, after, after)
        training = {"epochs": 4, "precision": "float64", **dice.choice(OPTIMIZERS)}
        training["grad_clip_norm"] = dice.choice([None, 0.5])
        kwargs = {"steps": steps, "dropout": dice.choice([0.0, 0.2, 0.5])}
        found.append(
            Case(f"m{number}", "drawn", kwargs, source_kwargs={"samples": 140, "validation": 40},
                 seed=number, training=training)
        )  # fmt: skip
    return found


SEEDS = st.integers(0, 10**6)


def forced(seed):
    """How groups are executed, drawn as well: by known costs, or all in one layout and width."""
    dice = random.Random(seed)
    layout = dice.choice([None, None, "lanes", "stacked", "channels"])
    return cgo.Tuning(
        measure=False, layout=layout, width=dice.choice([None, None, 2]), tape=dice.random() < 0.8
    )


def check(given_cases, folder, tuning):
    merged = Merged(given_cases, folder, tuning=tuning)
    assert merged.plan.report.opaque == {}
    for case in given_cases:
        assert len(merged.losses[case.id]) == 20
        assert_equal_float64(merged, case)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory


SETTINGS = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}


@settings(max_examples=15, derandomize=True, **SETTINGS)
@given(seed=SEEDS)
def test_some_random_networks_equal_training_alone(seed, folders):
    check(cases(seed), folders.mktemp("random"), forced(seed))


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=200, **SETTINGS)
@given(seed=SEEDS)
def test_random_networks_equal_training_alone(seed, folders):
    check(cases(seed), folders.mktemp("random"), forced(seed))
