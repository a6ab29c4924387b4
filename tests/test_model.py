"""Specs and models."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import small

import cgo
from cgo.model import as_json, loss_function, optimizer_class, scheduler_class

POINTS = cgo.DataSpec("support.small:points", batch_size=16)


def test_specs_are_frozen_and_equal_by_value():
    assert cgo.DataSpec("support.small:points", batch_size=16) == POINTS
    with pytest.raises(AttributeError):
        POINTS.batch_size = 3


def test_tuples_in_kwargs_become_the_lists_that_json_makes_of_them():
    training = cgo.TrainingSpec(optimizer="Adam", optimizer_kwargs={"betas": (0.9, 0.99)})
    assert training.optimizer_kwargs == {"betas": [0.9, 0.99]}


@given(st.integers(1, 100), st.booleans(), st.booleans(), st.integers(0, 2**40), st.integers(0, 8))
def test_the_digest_is_equal_exactly_for_equal_specs(batch, shuffle, drop, seed, workers):
    spec = cgo.DataSpec(
        "support.small:points",
        batch_size=batch,
        shuffle=shuffle,
        drop_last=drop,
        seed=seed,
        num_workers=workers,
    )
    assert cgo.DataSpec(**as_json(spec)) == spec
    assert (spec.digest == POINTS.digest) == (spec == POINTS)


def test_fields_that_came_later_leave_the_digests_of_older_specs_alone():
    assert POINTS.digest == "1f3b909002727e84"  # as journals have it
    assert set(as_json(POINTS)) == {
        "source", "kwargs", "batch_size", "shuffle", "drop_last", "seed", "num_workers",
    }  # fmt: skip
    jitter = {"augment": "support.augments:Jitter"}
    later = [
        cgo.DataSpec("support.small:points", batch_size=16, **fields)
        for fields in (
            {"resident": True}, {"resident": False}, jitter,
            {**jitter, "augment_kwargs": {"scale": 2}},
        )
    ]  # fmt: skip
    assert len({spec.digest for spec in (POINTS, *later)}) == 5
    assert [cgo.DataSpec(**as_json(spec)) for spec in later] == later


def test_names_resolve_to_torch_or_to_import_paths():
    assert loss_function("mse_loss") is torch.nn.functional.mse_loss
    assert loss_function("support.losses:smoothed").__name__ == "smoothed"
    assert optimizer_class("AdamW") is torch.optim.AdamW
    assert optimizer_class("torch.optim:SGD") is torch.optim.SGD
    assert scheduler_class("StepLR") is torch.optim.lr_scheduler.StepLR


@pytest.mark.parametrize(
    ("fields", "name", "mode"),
    [
        ({}, "val_loss", "min"),
        ({"metrics": ("accuracy",)}, "val_accuracy", "max"),
        (
            {"loss": "mse_loss", "metrics": ("mean_absolute_error", "r2_score")},
            "val_mean_absolute_error",
            "min",
        ),
        ({"metrics": ("accuracy",), "metric_mode": "min"}, "val_accuracy", "min"),
    ],
)
def test_the_first_metric_decides_name_and_mode(fields, name, mode):
    training = cgo.TrainingSpec(**fields)
    assert (training.metric_name, training.mode) == (name, mode)


def test_models_get_ids_of_their_own():
    first, second = (
        cgo.Model("support.small:mlp", data=POINTS, training=cgo.TrainingSpec()) for _ in range(2)
    )
    assert first.model_id != second.model_id
    assert first.status is cgo.ModelStatus.SUBMITTED


def test_an_instance_takes_no_kwargs():
    with pytest.raises(cgo.CgoError, match=r"kwargs: an nn\.Module instance takes none"):
        cgo.Model(small.mlp(), {"hidden": 3}, data=POINTS, training=cgo.TrainingSpec())


def test_a_copy_does_not_follow_its_model():
    model = cgo.Model("support.small:mlp", data=POINTS, training=cgo.TrainingSpec())
    copied = model.copy()
    model.history.append({"val_loss": 1.0})
    assert copied.history == []


@pytest.mark.parametrize(("mode", "expected"), [("max", 0.9), ("min", 0.1)])
def test_best_follows_the_mode_and_skips_nan(mode, expected):
    training = cgo.TrainingSpec(metrics=("accuracy",), metric_mode=mode)
    models = [cgo.Model("support.small:mlp", data=POINTS, training=training) for _ in range(4)]
    for model, value in zip(models, (0.5, 0.9, 0.1, float("nan"))):
        model.metric = value
    assert cgo.best(models).metric == expected


def test_ids_follow_from_content_and_order_in_every_process():
    code = (
        "import cgo; d = cgo.DataSpec('cgo.zoo:digits'); t = cgo.TrainingSpec()\n"
        "make = lambda **k: cgo.Model('cgo.zoo:mlp', data=d, training=t, **k).model_id\n"
        "print(make(), make(), make(seed=1))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout
    one, again, other = first.stdout.split()
    assert again == f"{one}-2"
    assert other not in (one, again)


def test_ids_of_instances_are_new():
    data, training = cgo.DataSpec("cgo.zoo:digits"), cgo.TrainingSpec()
    net = torch.nn.Linear(2, 2)
    ids = {cgo.Model(net, data=data, training=training).model_id for _ in range(2)}
    assert len(ids) == 2
