"""What optimizers keep: the table says what a true step shows."""

import json

import pytest

import cgo
from cgo.runtime.optimizers import moments_of, moments_seen


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("Adam", {}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"weight_decay": 0.1}),
        ("AdamW", {"amsgrad": True}),
        ("RMSprop", {}),
        ("RMSprop", {"momentum": 0.9}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("Adagrad", {}),
        ("Adadelta", {}),
    ],
)
def test_what_is_kept_of_a_parameter_is_what_a_step_shows(optimizer, kwargs):
    training = cgo.TrainingSpec(optimizer=optimizer, optimizer_kwargs={"lr": 0.1} | kwargs)
    assert moments_of(training) == moments_seen(optimizer, json.dumps({"lr": 0.1} | kwargs))


def test_one_that_refuses_its_parameter_is_taken_to_keep_as_much_as_adam():
    assert moments_seen("Muon", json.dumps({"lr": "fast"})) == 2.0
