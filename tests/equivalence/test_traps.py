"""Each trap of capture: captured and equal to the plain loop, or an opaque lane that is equal."""

import re

import pytest
from support.merged import Case, Merged, assert_equal_float64

TRAINING = {
    "optimizer": "SGD",
    "optimizer_kwargs": {"lr": 0.05, "weight_decay": 0.01, "momentum": 0.5},
    "epochs": 3,
    "precision": "float64",
}
CAPTURED = (
    "no_grad",
    "in_place",
    "write_input",
    "unused_parameters",
    "frozen_norm_training",
    "frozen_norm_evaluation",
    "training_flag",
    "constant",
    "alpha_dropout",
    "noise",
    "idle_noise",
    "strided_norm",
    "lasting_dropout",
    "momentum_none",
    "write_view",
    "autocast",
)
OPAQUE = {
    "straight_through": r"the backward of a custom autograd.Function \(Sign\)",
    "python_random": r"the loss by|draws random numbers of Python's",
    "numpy_random": r"the loss by|draws random numbers of Python's",
    "python_counter": "attribute `calls` of the module",
    "control_flow": r"looks at a value that depends on data \(aten.",
    "multinomial": "draws random numbers",
    "unread_dropout": "the loss by",  # export drops it, and the next mask is another
}


@pytest.fixture(autouse=True, params=["recording", "export"])
def way(request, monkeypatch):
    """Each trap is laid to both ways of capturing, alone."""
    monkeypatch.setattr("cgo.capture.WAYS", (request.param,))
    return request.param


def cases(kind):
    """The trap in company, so that a write to the shared batch would show."""
    return [
        Case("before", "mlp", training=TRAINING),
        Case("trap", "trap", {"kind": kind}, seed=2, training=TRAINING),
        Case("after", "cnn", training=TRAINING),
    ]


@pytest.mark.parametrize("kind", CAPTURED)
def test_captured_and_equal(kind, tmp_path):
    given = cases(kind)
    merged = Merged(given, tmp_path)
    assert merged.plan.report.opaque == {}
    for case in given:
        assert_equal_float64(merged, case)


@pytest.mark.parametrize("kind", OPAQUE)
def test_opaque_with_its_reason_and_equal(kind, tmp_path):
    given = cases(kind)
    merged = Merged(given, tmp_path)
    assert set(merged.plan.report.opaque) == {"trap"}
    assert re.search(OPAQUE[kind], merged.plan.report.opaque["trap"])
    for case in given:
        assert_equal_float64(merged, case)


def test_tied_weights_are_saved_once_and_loaded_twice(tmp_path):
    case = Case("tied", "tied", training=TRAINING)
    merged = Merged([case], tmp_path)
    state = merged.state("tied")
    assert state["first.weight"] is state["second.weight"]
    assert_equal_float64(merged, case)
