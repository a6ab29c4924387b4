"""Keyed streams, as on a GPU, drawn on a CPU: merged training equals the loop that draws from them.

The loop is the oracle's; its random numbers are `support.keyed`'s, which NumPy computes.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
from support import nets, peculiar
from support.data import arrays
from support.keyed import KeyedStreams
from support.merged import Case, Merged, assert_equal_float64
from support.observers import Losses

import cgo
from cgo import trial
from cgo.planner import Planner
from cgo.runtime import keyed_draws
from cgo.runtime.bound import Bound
from cgo.runtime.triton_kernels import installed
from cgo.user_code import Terminated

DOCUMENT = Path(__file__).parents[2] / "docs" / "random.md"
KEYED = cgo.Tuning(measure=False, tape=True, streams="keyed")
TRAINING = {"epochs": 2, "precision": "float64", "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9}}

of = partial(Case, training=TRAINING)

#: Dropout of elements, of channels, of attention and between layers; other draws; other layouts.
CASES = [
    of("mlp", "mlp", {"dropout": 0.3}, seed=1),
    of("mlp-2", "mlp", {"dropout": 0.3}, seed=2),
    of("cnn", "cnn", {"dropout": 0.2}, seed=3),
    of("encoder", "encoder", {"dropout": 0.1, "layers": 1}, seed=4),
    of("alpha", "trap", {"kind": "alpha_dropout"}, seed=5),
    of("noise", "trap", {"kind": "idle_noise"}, seed=6),
    of("strided", "trap", {"kind": "strided_norm"}, seed=7),
    of("lasting", "trap", {"kind": "lasting_dropout"}, seed=8),
]
FEW = [case for case in CASES if case.id in ("mlp", "mlp-2", "lasting", "noise")]


@pytest.fixture(scope="module")
def alone():
    """What the loop gives, by case."""
    return {case.id: case.alone(KeyedStreams) for case in CASES}


def assert_equal(merged, cases, alone):
    assert merged.plan.report.opaque == {}
    for case in cases:
        assert_equal_float64(merged, case, alone[case.id])


def test_merged_training_equals_the_loop_that_draws_from_the_streams(alone, tmp_path):
    assert_equal(Merged(CASES, tmp_path, tuning=KEYED), CASES, alone)
    assert alone["mlp"].losses != CASES[0].alone().losses  # which draws from torch's generator


def test_a_model_alone_and_in_another_order_draws_the_same(alone, tmp_path):
    assert_equal(Merged(FEW[:1], tmp_path / "alone", tuning=KEYED), FEW[:1], alone)
    assert_equal(Merged(FEW[::-1], tmp_path / "turned", tuning=KEYED), FEW, alone)


def captured(folder, **given):
    longer = [replace(case, training=TRAINING | {"epochs": 3}) for case in FEW]
    merged = Merged(longer, folder, tuning=replace(KEYED, tape=None, capture=True, **given))
    assert "train/32" in {value["program"] for value in merged.told("captured")}
    assert not merged.told("eager")
    for case in longer:
        assert_equal_float64(merged, case, case.alone(KeyedStreams))
    return merged


def test_captured_steps_of_divided_programs_count_for_themselves(tmp_path):
    merged = captured(tmp_path, memory_bytes=60_000)
    assert merged.told("memory")[0]["programs"] > 1


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
def test_captured_steps_draw_by_one_kernel(tmp_path, monkeypatch):
    filled = []
    plain = keyed_draws.fill
    monkeypatch.setattr(
        "cgo.runtime.keyed_streams.fill", lambda *given: filled.append(given) or plain(*given)
    )
    captured(tmp_path, kernels=True)
    assert filled == []


DRAWING = (
    "exponential", "uniform", "normal", "log normal", "geometric", "cauchy", "shuffled",
    "whole numbers", "probabilities", "gru", "lstm", "rnn", "word language model",
)  # fmt: skip


@pytest.mark.long
def test_every_kind_of_draw_equals_the_loop(tmp_path):
    data = cgo.DataSpec("support.peculiar:data", batch_size=8)
    models = [
        cgo.Model("support.peculiar:build", {"name": name}, data=data, seed=number,
                  training=cgo.TrainingSpec(**TRAINING), model_id=name.replace(" ", "-"))
        for number, name in enumerate(DRAWING)
    ]  # fmt: skip
    losses = Losses()
    plan = Planner().plan(models, tmp_path, {"tuning": KEYED.as_json()})
    assert plan.report.opaque == {}
    trial.execute(plan.graph_data, folder=tmp_path, observer=losses, report=lambda event: None)
    for model in models:
        alone = oracle.train_alone(
            peculiar.build, model.kwargs, peculiar.arrays(), seed=model.seed, batch_size=8,
            metric=None, streams=KeyedStreams, **TRAINING,
        )  # fmt: skip
        assert losses.seen[model.model_id] == pytest.approx(alone.losses, rel=1e-9)


@pytest.mark.parametrize("streams", ["keyed", "generator"])
def test_models_that_are_run_apart_after_a_failure_keep_their_numbers(
    streams, tmp_path, monkeypatch
):
    """What fails for all is tried model by model, on what was drawn for all."""
    plain = {"train": Bound.train, "evaluate": Bound.evaluate}

    def alone_only(name):
        def run(self, *args, **kwargs):
            if len(self.models) > 1:
                raise RuntimeError("not together")
            return plain[name](self, *args, **kwargs)

        return run

    for name in plain:
        monkeypatch.setattr(Bound, name, alone_only(name))
    merged = Merged(FEW, tmp_path, tuning=replace(KEYED, streams=streams))
    for case in FEW:
        assert_equal_float64(merged, case, case.alone(KeyedStreams if streams == "keyed" else None))


class Ending(Merged):
    """Ended in the midst of its second epoch's evaluation, and gone on with."""

    def run(self, data, *, folder, report):
        def until(event):
            if event.kind == "epoch" and event.epoch == 1:
                raise Terminated(143)

        with pytest.raises(Terminated):
            trial.execute(data, folder=folder, report=until)
        return super().run(data, folder=folder, report=report)


def test_a_resumed_model_goes_on_in_its_streams(alone, tmp_path):
    merged = Ending(FEW, tmp_path, tuning=KEYED)
    for case in FEW:
        assert merged.losses[case.id] == pytest.approx(alone[case.id].losses[5:], rel=1e-9)
        assert len(merged.losses[case.id]) == 5


def test_the_documented_loop_gives_what_the_trial_gives(tmp_path):
    training = TRAINING | {"optimizer_kwargs": {"lr": 0.1}}
    case = replace(FEW[0], training=training)
    merged = Merged([case], tmp_path, tuning=KEYED)
    (source,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    names = {}
    exec(source, names)
    (inputs, targets), _ = arrays()

    def batches(epoch):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(case.batch_size):
            yield inputs[batch].double(), targets[batch]

    torch.manual_seed(case.seed)
    net = nets.mlp(**case.kwargs).double()
    loss = names["train_alone"](net, case.seed, batches, epochs=training["epochs"])
    assert merged.losses[case.id][-1] == pytest.approx(float(loss.detach()), rel=1e-9)
