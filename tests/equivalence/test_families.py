"""Seven families, four optimizers, schedules and clipping: merged equals alone."""

from dataclasses import replace

import pytest
import torch
from support import nets
from support.families import FAMILIES
from support.merged import Case, Merged, assert_equal_float64, assert_first_step_float32

import cgo

OPTIMIZERS = {
    "sgd": {"optimizer": "SGD", "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9}},
    "adam": {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.003}},
    "adamw": {"optimizer": "AdamW", "optimizer_kwargs": {"lr": 0.003, "weight_decay": 0.1}},
    # The bias of a cell's last norm, before another norm, has a true gradient of zero: it walks on
    # rounding errors, over eps, and validation sees it through the running mean that lags.
    "rmsprop": {
        "optimizer": "RMSprop",
        "optimizer_kwargs": {"lr": 0.001, "momentum": 0.5, "eps": 1e-6},
    },
}
SCHEDULES = (
    {"scheduler": "StepLR", "scheduler_kwargs": {"step_size": 3, "gamma": 0.5}},
    {"scheduler": "CosineAnnealingLR", "scheduler_kwargs": {"T_max": 20}},
    {
        "scheduler": "ExponentialLR",
        "scheduler_kwargs": {"gamma": 0.99},
        "scheduler_interval": "step",
    },
    {
        "scheduler": "OneCycleLR",
        "scheduler_kwargs": {"max_lr": 0.01, "total_steps": 200},
        "scheduler_interval": "step",
    },
    {},
)
EPOCHS = 20  # of 5 steps: 100 steps


def cases(optimizer, *, dropout=0.0, **training):
    """One case a family, each with another schedule, seed and clipping."""
    found = []
    for number, (family, kwargs) in enumerate(FAMILIES.items()):
        given = {**OPTIMIZERS[optimizer], **SCHEDULES[number % len(SCHEDULES)], **training}
        if number % 2:
            given["grad_clip_norm"] = 0.5 + number / 10
        if dropout:
            kwargs = kwargs | {"dropout": dropout + number / 50}
        found.append(Case(family, family, kwargs, seed=number, training=given))
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float64_losses_of_100_steps_equal_training_alone(optimizer, tmp_path):
    given = cases(optimizer, precision="float64", epochs=EPOCHS)
    merged = Merged(given, tmp_path)
    assert merged.plan.report.opaque == {}
    for case in given:
        assert len(merged.losses[case.id]) == 100
        assert_equal_float64(merged, case)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["lanes", "stacked", "channels"])
@pytest.mark.parametrize("width", [None, 2, 4, 8])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float64_in_every_layout_and_width(optimizer, width, layout, tmp_path):
    # Two of each family, so that every group has company.
    given = cases(optimizer, precision="float64", epochs=EPOCHS)
    given += [replace(case, id=f"{case.id}-2", seed=case.seed + 50) for case in given]
    merged = Merged(given, tmp_path, tuning=cgo.Tuning(layout=layout, width=width, tape=True))
    for case in given:
        assert_equal_float64(merged, case)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float32_first_step_equals_training_alone(optimizer, tmp_path):
    given = cases(optimizer, epochs=1)
    merged = Merged(given, tmp_path)
    for case in given:
        assert_first_step_float32(merged, case)


def test_dropout_draws_what_the_plain_loop_draws(tmp_path):
    given = cases("adam", dropout=0.1, precision="float64", epochs=EPOCHS)
    merged = Merged(given, tmp_path)
    assert merged.plan.report.opaque == {}
    for case in given:
        assert_equal_float64(merged, case)


def test_unfused_company_changes_no_bit(tmp_path):
    given = cases("sgd", dropout=0.2, epochs=2)
    merged = Merged(given, tmp_path / "merged", batch_operators=None)
    for case in given:
        alone = Merged([case], tmp_path / case.id, batch_operators=None)
        assert alone.losses[case.id] == merged.losses[case.id]


def test_trained_weights_reproduce_the_metric_in_a_fresh_module(tmp_path):
    given = cases("adam", epochs=4)
    merged = Merged(given, tmp_path)
    from support.data import arrays

    _, (inputs, targets) = arrays()
    for case in given:
        net = getattr(nets, case.factory)(**case.kwargs)
        net.load_state_dict(merged.state(case.id))
        net.eval()
        with torch.no_grad():
            accuracy = float((net(inputs).argmax(1) == targets).float().mean())
        assert accuracy == pytest.approx(merged.metrics[case.id], abs=1e-6)
