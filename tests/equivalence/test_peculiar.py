"""Modules whose forwards do what captures used to refuse, or to get wrong without a word."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import torch
from support import peculiar, reports
from support.merged import ALL, KNOWN, Merged, relative

import cgo
from cgo.planner import Planner

TRAINING = {"epochs": 3, "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9}}


@dataclass
class Peculiar:
    """A model of one of the modules, said for both sides."""

    id: str
    factory: str
    kwargs: dict
    source: str
    source_kwargs: dict
    arrays: tuple
    build: object
    loss: str = "cross_entropy"
    seed: int = 0

    def model(self):
        data = cgo.DataSpec(self.source, self.source_kwargs, batch_size=8)
        training = cgo.TrainingSpec(loss=self.loss, precision="float64", **TRAINING)
        return cgo.Model(
            self.factory, self.kwargs, data=data, training=training, seed=self.seed,
            model_id=self.id,
        )  # fmt: skip

    def alone(self):
        loss = getattr(torch.nn.functional, self.loss)
        given = {"seed": self.seed, "batch_size": 8, "precision": "float64", "metric": None}
        return oracle.train_alone(self.build, {}, self.arrays, loss=loss, **given, **TRAINING)


def of_module(name, seed=0, kept=False):
    factory = "build_kept" if kept else "build"
    return Peculiar(
        f"{name.replace(' ', '-').replace(',', '')}.{seed}", f"support.peculiar:{factory}",
        {"name": name}, "support.peculiar:data", {}, peculiar.arrays(),
        lambda: getattr(peculiar, factory)(name), seed=seed,
    )  # fmt: skip


def of_report(name, seed=0):
    given = reports.REPORTS[name]
    splits = tuple(split.tensors for split in reports.data(name, 44))
    return Peculiar(
        f"{name}.{seed}", f"support.reports:{given['factory'].__name__}", {},
        "support.reports:data", {"name": name, "samples": 44}, splits, given["factory"],
        loss=given["loss"], seed=seed,
    )  # fmt: skip


def assert_equal(merged, case):
    alone = case.alone()
    found = merged.losses[case.id]
    assert len(found) == len(alone.losses)
    assert max(map(relative, found, alone.losses)) <= 1e-9
    for row, expected in zip(merged.history(case.id), alone.history, strict=True):
        assert relative(row["val_loss"], expected["val_loss"]) <= 1e-9
    state = merged.state(case.id)
    assert set(state) == set(alone.state)
    for name, value in alone.state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", peculiar.MODULES)
def test_peculiar_modules_are_captured_fused_and_equal_the_plain_loop(name, tmp_path):
    cases = [of_module(name, seed) for seed in (1, 2)]
    merged = Merged(cases, tmp_path)
    assert not merged.plan.report.opaque
    assert merged.plan.report.groups > 3
    for case in cases:
        assert_equal(merged, case)


#: Forwards that decide by the values of data.
READ_DATA = {"failed_export_buffer"}


def test_the_situations_of_public_reports_all_in_one_engine(tmp_path):
    cases = [of_report(name, seed) for name in reports.REPORTS for seed in (1, 2)]
    models = [case.model() for case in cases]
    with cgo.CGOEngine(tmp_path, tuning=KNOWN, batch_operators=ALL) as engine:
        engine.submit_models(*models)
        engine.wait_models()
        (report,) = engine.reports
    assert {id_.partition(".")[0] for id_ in report.opaque} == READ_DATA
    for case, model in zip(cases, models):
        assert model.error is None
        alone = case.alone()
        for row, expected in zip(model.history, alone.history, strict=True):
            for key in ("train_loss", "val_loss"):
                assert relative(row[key], expected[key]) <= 1e-9, case.id
        state = model.state_dict()
        for name, value in alone.state.items():
            torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", reports.REPORTS)
def test_the_situation_of_a_public_report_step_by_step(name, tmp_path):
    case = of_report(name, seed=3)
    assert_equal(Merged([case], tmp_path), case)


def test_reservoirs_that_are_equal_are_computed_once(tmp_path):
    cases = [of_report("reservoir", 1), of_report("reservoir", 1)]
    cases[1].id = "reservoir.other"
    cases[1].loss = "l1_loss"  # another readout over the same reservoir
    merged = Merged(cases, tmp_path)
    assert merged.plan.report.stems_shared > 10
    for case in cases:
        assert_equal(merged, case)


@pytest.mark.parametrize("name", [n for n in peculiar.KEPT if n != "raises at five"])
def test_what_python_keeps_makes_an_opaque_lane_that_names_it(name, tmp_path):
    case = of_module(name, seed=1, kept=True)
    with tempfile.TemporaryDirectory() as folder:
        plan = Planner().plan([case.model()], Path(folder))
        reason = plan.report.opaque[case.id]
    assert any(part in reason for part in peculiar.KEPT[name][1].split("|")), reason
    if peculiar.KEPT[name][1].startswith(("global", "class", "defaults")):
        return  # counts of this process, which the plain loop would share
    assert_equal(Merged([case], tmp_path), case)


def test_a_forward_that_raises_late_raises_as_alone(tmp_path):
    case = of_module("raises at five", kept=True)
    merged = Merged([case], tmp_path)
    assert "ValueError: the fifth call" in merged.ended(case.id)["error"]
    assert len(merged.losses[case.id]) == 4


def test_capturing_leaves_what_python_keeps_as_it_was():
    before = peculiar.CALLS, peculiar.CountingInClass.calls
    names = ("counting globally", "counting in its class")
    planner = Planner()
    planner.capture([of_module(name, kept=True).model() for name in names])
    assert (peculiar.CALLS, peculiar.CountingInClass.calls) == before


def test_what_is_kept_for_whoever_looks_is_no_state(tmp_path):
    case = of_module("alibi")
    case.factory, case.kwargs = "support.peculiar:KeepsWhatNobodyReads", {}
    case.build = peculiar.KeepsWhatNobodyReads
    merged = Merged([case], tmp_path)
    assert not merged.plan.report.opaque
    assert_equal(merged, case)
