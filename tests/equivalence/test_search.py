"""A whole search in one trial: 24 models that differ in everything; and one that misbehaves."""

import math
from dataclasses import replace

import pytest
import torch
from support import families
from support.merged import Case, Merged, assert_equal_float64, relative

import cgo

FAMILIES = {name: kwargs for name, kwargs in families.FAMILIES.items() if name != "tied"}
#: An eps above rounding errors: what has a true gradient of zero must not walk on these.
OPTIMIZERS = (
    {"optimizer": "SGD", "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}},
    {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.003, "eps": 1e-5}},
    {"optimizer": "AdamW", "optimizer_kwargs": {"lr": 0.003, "eps": 1e-5, "weight_decay": 0.1}},
    {"optimizer": "RMSprop", "optimizer_kwargs": {"lr": 0.001, "eps": 1e-5, "momentum": 0.5}},
)
SCHEDULES = (
    {},
    {"scheduler": "StepLR", "scheduler_kwargs": {"step_size": 1, "gamma": 0.5}},
    {"scheduler": "ExponentialLR", "scheduler_kwargs": {"gamma": 0.9},
     "scheduler_interval": "step"},
    {"scheduler": "CosineAnnealingLR", "scheduler_kwargs": {"T_max": 4}},
    {"scheduler": "OneCycleLR", "scheduler_kwargs": {"max_lr": 0.01, "total_steps": 20},
     "scheduler_interval": "step"},
)  # fmt: skip


def search():
    """Every family under every optimizer; no two models alike in rate, seed and dropout."""
    found = []
    for number in range(24):
        family = list(FAMILIES)[number % 6]
        optimizer = OPTIMIZERS[number // 6]
        kwargs = FAMILIES[family] | {"dropout": number / 60}
        rate = optimizer["optimizer_kwargs"]["lr"] * (1 + number / 24)
        training = {
            **optimizer,
            "optimizer_kwargs": optimizer["optimizer_kwargs"] | {"lr": rate},
            **SCHEDULES[number % 5],
            "grad_clip_norm": None if number % 3 else 0.3 + number / 20,
            "precision": "float64",
            "epochs": 4,
        }
        found.append(Case(f"m{number:02}", family, kwargs, seed=number, training=training))
    return found


@pytest.fixture(scope="module")
def alone():
    return {case.id: case.alone() for case in search()}


def test_24_models_of_six_families_equal_training_alone(tmp_path, alone):
    given = search()
    merged = Merged(given, tmp_path)
    report = merged.plan.report
    assert report.opaque == {}
    assert report.loaders == 1
    assert report.grouped / report.groups >= 4
    for case in given:
        assert len(merged.losses[case.id]) == 20
        assert_equal_float64(merged, case, alone[case.id])


#: Every layout, and every width of a chunk, for all groups that can have it.
FORCED = [
    {"layout": "stacked"},
    {"layout": "channels"},
    *(
        pytest.param(forced, marks=pytest.mark.long)
        for forced in ({"layout": "lanes"}, {"width": 2, "layout": None})
    ),
    *(
        pytest.param({"width": width, "layout": layout}, marks=pytest.mark.long)
        for width, layout in (
            (2, "channels"),
            (4, None),
            (4, "channels"),
            (8, None),
            (8, "channels"),
        )
    ),
]


@pytest.mark.parametrize("forced", FORCED, ids=str)
def test_the_same_in_every_layout_and_width(forced, tmp_path, alone):
    given = search()
    merged = Merged(given, tmp_path, tuning=cgo.Tuning(**forced, tape=True))
    for case in given:
        assert_equal_float64(merged, case, alone[case.id])


#: What becomes of the model in the middle; each leaves the others' every bit as it was.
MISBEHAVIOUR = {
    "diverges": {"optimizer_kwargs": {"lr": 1e300}},
    "explodes": {"optimizer_kwargs": {"lr": 1e18}},
    "learns otherwise": {"optimizer_kwargs": {"lr": 0.7}},
}


def three(family, optimizer, **training):
    given = {**OPTIMIZERS[optimizer], "epochs": 3, "stop_on_nan": False, **training}
    return [Case(f"m{seed}", family, FAMILIES[family] | {"dropout": 0.1}, seed=seed,
                 training=given) for seed in range(3)]  # fmt: skip


@pytest.mark.parametrize("what", MISBEHAVIOUR)
@pytest.mark.parametrize(
    ("family", "optimizer"), [("cnn", 0), ("cells", 1), ("encoder", 2), ("lstm", 3), ("mlp", 0)]
)
def test_what_one_model_does_changes_no_bit_of_the_others(family, optimizer, what, tmp_path):
    """The same program runs on: parameters, statistics, losses and metrics are equal to the bit."""
    good = three(family, optimizer)
    kwargs = {**good[1].training["optimizer_kwargs"], **MISBEHAVIOUR[what]["optimizer_kwargs"]}
    bad = replace(good[1], training=good[1].training | {"optimizer_kwargs": kwargs})
    clean = Merged(good, tmp_path / "clean")
    dirty = Merged([good[0], bad, good[2]], tmp_path / "dirty")
    assert clean.losses["m1"] != dirty.losses["m1"]
    if what == "diverges":
        assert not math.isfinite(dirty.losses["m1"][-1])
    for case in (good[0], good[2]):
        assert clean.losses[case.id] == dirty.losses[case.id]
        assert clean.metrics[case.id] == dirty.metrics[case.id]
        left, right = clean.state(case.id), dirty.state(case.id)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_model_that_ended_early_leaves_the_others_within_rounding(tmp_path):
    """The program is repacked without it."""
    good = three("cells", 0, precision="float64", stop_on_nan=True)
    bad = replace(good[1], training=good[1].training | {"optimizer_kwargs": {"lr": 1e300}})
    dirty = Merged([good[0], bad, good[2]], tmp_path)
    assert "became" in dirty.ended("m1")["error"]
    assert len(dirty.losses["m1"]) == 5
    for case in (good[0], good[2]):
        alone = replace(case, training={k: v for k, v in case.training.items()
                                        if k != "stop_on_nan"}).alone()  # fmt: skip
        assert max(map(relative, dirty.losses[case.id], alone.losses)) <= 1e-9
