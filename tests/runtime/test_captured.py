"""Captured steps, on a CPU by writing their calls down: nothing stale is baked in.

What holds here holds for a CUDA graph as well: both keep Python's numbers and tensors' places, and
refuse whoever looks at a value.
"""

import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from host_work import NoReplay
from support.families import FAMILIES
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo.errors import DataError
from cgo.planner import Planner
from cgo.runtime import accelerator
from cgo.runtime.accelerator import CaptureRefused, accelerator_for
from cgo.runtime.device_lanes import DeviceLanes
from cgo.runtime.member import Member
from cgo.runtime.tape import interpreted
from cgo.runtime.taped import Later
from cgo.runtime.triton_kernels import usable
from cgo.runtime.tuning import Tuner, make_tuner

CPU = torch.device("cpu")

CAPTURED = cgo.Tuning(measure=False, capture=True)
OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "eps": 1e-3},
    "AdamW": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.02},
    "RMSprop": {"lr": 0.002, "eps": 1e-3, "momentum": 0.5},
    "Adagrad": {"lr": 0.02, "lr_decay": 0.01, "eps": 1e-3},
}


def check(cases, folder, tuning=CAPTURED):
    merged = Merged(cases, folder, tuning=tuning)
    for case in cases:
        assert_equal_float64(merged, case)
    return merged


def training(optimizer="SGD", epochs=4, **more):
    kwargs = {"optimizer": optimizer, "optimizer_kwargs": OPTIMIZERS[optimizer]}
    return {"precision": "float64", "epochs": epochs, **kwargs, **more}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedules_and_counts_of_steps_are_read_anew(optimizer, tmp_path):
    """Rates change at each step, and differ between models."""
    schedule = {"scheduler": "ExponentialLR", "scheduler_interval": "step"}
    cases = []
    for number, gamma in enumerate((0.9, 0.97)):
        given = training(optimizer, scheduler_kwargs={"gamma": gamma}, **schedule)
        given["optimizer_kwargs"] = {**OPTIMIZERS[optimizer], "lr": 0.01 * (number + 1)}
        given["grad_clip_norm"] = 0.3 if number else None
        cases.append(Case(f"m{number}", "mlp", {"dropout": 0.2}, seed=number, training=given))
    merged = check(cases, tmp_path)
    assert "train/32" in {value["program"] for value in merged.told("captured")}
    assert merged.told("eager") == []


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_schedule_of_momentum_needs_no_new_capture(precision, tmp_path):
    cycle = {"scheduler": "OneCycleLR", "scheduler_interval": "step",
             "scheduler_kwargs": {"max_lr": 0.05, "total_steps": 20}}  # fmt: skip
    given = training(precision=precision, **cycle)
    case = Case("m", "mlp", training=given)
    merged = Merged([case], tmp_path, tuning=CAPTURED)
    assert [value["program"] for value in merged.told("captured")].count("train/32") == 1
    alone = torch.tensor(case.alone().losses)
    close = 1e-9 if precision == "float64" else 1e-4
    torch.testing.assert_close(torch.tensor(merged.losses["m"]), alone, rtol=close, atol=close)


def test_numbers_that_keep_changing_end_in_eager_steps(tmp_path):
    """Weight decay is a number of Python's in the kernels: each change is a new capture."""
    schedule = {"scheduler": "support.losses:Decaying", "scheduler_interval": "step"}
    given = training(precision="float32", epochs=3, **schedule)
    given["optimizer_kwargs"] = {"lr": 0.05, "weight_decay": 0.01}
    case = Case("m", "mlp", training=given)
    merged = Merged([case], tmp_path, tuning=CAPTURED)
    assert len(merged.told("captured")) >= 2
    assert "keep changing" in merged.told("eager")[0]["reason"]


@pytest.mark.skipif(not usable(CPU, True), reason="no interpreter of Triton")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernels_of_our_own_take_the_step(optimizer, tmp_path):
    """All numbers lie on the device: changing weight decay needs no new capture."""
    schedule = {"scheduler": "support.losses:Decaying", "scheduler_interval": "step"}
    cases = []
    for number in range(2):
        given = training(optimizer, epochs=3, **(schedule if number else {}))
        rate = OPTIMIZERS[optimizer]["lr"] / (number + 1)
        decaying = {"lr": rate, "weight_decay": 0.02}
        given["optimizer_kwargs"] = {**OPTIMIZERS[optimizer], **decaying}
        given["grad_clip_norm"] = 0.3 if number else None
        cases.append(Case(f"m{number}", "mlp", {"dropout": 0.2}, seed=number, training=given))
    merged = check(cases, tmp_path, cgo.Tuning(measure=False, capture=True, kernels=True))
    captured = [value["program"] for value in merged.told("captured")]
    assert captured.count("train/32") == 1
    assert merged.told("eager") == []


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    kwargs = {**FAMILIES[family], "dropout": 0.2}
    given = training("Adam", epochs=3)
    check([Case(f"m{i}", family, kwargs, seed=i, training=given) for i in range(2)], tmp_path)


def test_float32_steps_by_kernels_that_read_rates_and_counts_from_the_device(tmp_path):
    cases = []
    for number, optimizer in enumerate(("SGD", "Adam", "AdamW")):
        given = training(optimizer, epochs=3, precision="float32", scheduler="ExponentialLR")
        given |= {"scheduler_kwargs": {"gamma": 0.7}, "scheduler_interval": "step"}
        cases.append(Case(f"m{number}", "mlp", seed=number, training=given))
    merged = Merged(cases, tmp_path, tuning=CAPTURED)
    assert merged.told("captured")
    for case in cases:
        alone = case.alone()
        torch.testing.assert_close(
            torch.tensor(merged.losses[case.id]), torch.tensor(alone.losses), rtol=2e-5, atol=1e-6
        )


def test_float16_scales_live_on_the_device(tmp_path):
    """Overflows, growth and left out steps happen inside the captured step."""
    half = {"precision": "float16", "loss_scale": 2.0**20, "loss_scale_growth_interval": 2}
    cases = []
    for number, optimizer in enumerate(("SGD", "Adam", "RMSprop")):
        given = {**training(optimizer, epochs=3), **half, "grad_clip_norm": 1.0}
        given["optimizer_kwargs"] = {**OPTIMIZERS[optimizer], "lr": 0.003}
        cases.append(Case(f"m{number}", "mlp", seed=number, training=given))
    merged = Merged(cases, tmp_path, tuning=CAPTURED)
    assert merged.told("captured")
    for case in cases:
        alone = case.alone()
        assert min(alone.scales) < half["loss_scale"]
        assert any(after > before for before, after in pairwise(alone.scales))
        found, expected = (
            torch.tensor(losses) for losses in (merged.losses[case.id], alone.losses)
        )
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_checkpointed_steps_are_captured_as_they_are(tmp_path):
    """Computed twice in each replay, batch norms counted once."""
    tuning = cgo.Tuning(measure=False, capture=True, checkpoint=True)
    cases = [Case(f"m{n}", "residual", {"dropout": 0.2}, seed=n, training=training(epochs=2))
             for n in range(2)]  # fmt: skip
    assert check(cases, tmp_path, tuning).told("captured")


@pytest.mark.long
def test_compiled_steps_are_not_written_down(tmp_path):
    """On a CPU: their kernels are no calls; CUDA captures whatever runs on its streams."""
    tuning = cgo.Tuning(measure=False, capture=True, compile="inductor")
    cases = [Case(f"m{n}", "mlp", seed=n, training=training()) for n in range(2)]
    merged = check(cases, tmp_path, tuning)
    if any(value["after_s"] < value["before_s"] for value in merged.told("compiled")):
        assert "compiled code" in merged.told("eager")[0]["reason"]


class Swapped(Later):
    """A form that takes the replay's place after a run: the same calls, from Python."""

    def __init__(self, tape, at):
        self.tape, self.at, self.ran = tape, at, 0

    def due(self, run):
        return run >= self.at

    def finish(self, run, inputs, current):
        replay = interpreted(self.tape)

        def form(*values):
            self.ran += 1
            return replay(*values)

        return form


def test_a_form_that_comes_later_is_captured_anew(tmp_path, monkeypatch):
    """With the sums of losses, and the counts of its optimizer, as if nothing had happened."""
    made = []

    def chosen(self, graph, models):
        choice = choose(self, graph, models)

        def improve(name, tape, replay, inputs):
            made.append(Swapped(tape, 11))
            return made[-1]

        return replace(choice, improve=improve)

    choose = Tuner.__call__
    monkeypatch.setattr(Tuner, "__call__", chosen)
    schedule = {"scheduler": "ExponentialLR", "scheduler_interval": "step"}
    given = training("Adam", scheduler_kwargs={"gamma": 0.97}, **schedule)
    cases = [Case(f"m{n}", "mlp", {"dropout": 0.2}, seed=n, training=given) for n in range(2)]
    merged = check(cases, tmp_path)
    programs = [value["program"] for value in merged.told("captured")]
    assert programs.count("train/32") == 2
    assert merged.told("eager") == []
    assert made[0].ran > 0


def test_evaluation_is_captured_once_it_was_run(tmp_path):
    merged = check([Case("m", "cnn", training=training(epochs=6))], tmp_path)
    programs = [value["program"] for value in merged.told("captured")]
    assert any(program.startswith("validation/") for program in programs)
    assert len(programs) == len(set(programs))


def test_a_smaller_last_batch_is_captured_as_a_program_of_its_own(tmp_path):
    case = Case("m", "mlp", {"dropout": 0.1}, source_kwargs={"samples": 140}, batch_size=48,
                training=training(epochs=6))  # fmt: skip
    merged = check([case], tmp_path)
    programs = {value["program"] for value in merged.told("captured")}
    assert {"train/48", "train/44"} <= programs


def test_models_that_end_early_leave_a_step_that_is_captured_anew(tmp_path):
    cases = [
        Case("short", "mlp", seed=1, training=training(epochs=2)),
        Case("long", "mlp", seed=2, training=training(epochs=5)),
    ]
    merged = check(cases, tmp_path)
    counts = [v["models"] for v in merged.told("captured") if v["program"] == "train/32"]
    assert counts == [2, 1]


def test_opaque_lanes_and_other_optimizers_step_beside_the_captured_step(tmp_path):
    given = training()
    other = {"precision": "float64", "epochs": 4, "optimizer": "NAdam",
             "optimizer_kwargs": {"lr": 0.01, "eps": 1e-3}}  # fmt: skip
    cases = [
        Case("opaque", "trap", {"kind": "control_flow"}, training=given),
        Case("merged", "mlp", {"dropout": 0.2}, seed=3, training=given),
        Case("own", "mlp", seed=4, training=other),
    ]
    merged = check(cases, tmp_path)
    assert set(merged.plan.report.opaque) == {"opaque"}
    assert {value["models"] for value in merged.told("captured")} == {2}


def test_a_diverging_model_fails_alone_and_changes_no_bit_of_its_neighbour(tmp_path):
    def run(name, lr):
        given = training(precision="float32", epochs=3)
        bad = {**given, "optimizer_kwargs": {"lr": lr}}
        cases = [Case("good", "mlp", seed=1, training={**given, "optimizer_kwargs": {"lr": 0.05}}),
                 Case("bad", "mlp", seed=2, training=bad)]  # fmt: skip
        return Merged(cases, tmp_path / name, tuning=CAPTURED)

    whole, broken = run("whole", 0.05), run("broken", 1e30)
    assert "became" in broken.ended("bad")["error"]
    first = len(broken.losses["bad"])  # while the same program runs
    assert 0 < first < len(whole.losses["good"])
    assert broken.losses["good"][:first] == whole.losses["good"][:first]


def test_replaying_twice_from_the_same_state_gives_the_same_bits():
    host = accelerator_for(torch.device("cpu"))
    weights, batch = torch.randn(4, 4), torch.randn(8, 4)
    generator = torch.Generator().manual_seed(3)

    def body():
        noise = torch.empty(8, 4).normal_(generator=generator)
        found = (batch + noise) @ weights
        weights.sub_(found.mean(0) * 0.1)
        return [found]

    before = weights.clone(), generator.get_state()
    captured = host.capture(body, [generator])
    assert torch.equal(weights, before[0])  # what was captured has not happened yet
    assert torch.equal(generator.get_state(), before[1])
    seen = []
    for _ in range(2):
        weights.copy_(before[0])
        generator.set_state(before[1])
        captured.replay()
        seen.append((captured.results[0].clone(), weights.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    captured.replay()
    assert not torch.equal(captured.results[0], seen[0][0])  # streams and state go on


def test_a_body_that_looks_at_a_value_is_refused_and_leaves_no_trace():
    values = torch.ones(3)

    def body():
        values.add_(1)
        return [values * 2] if float(values.sum()) > 0 else []

    with pytest.raises(CaptureRefused, match="depends on values"):
        accelerator_for(torch.device("cpu")).capture(body)
    assert torch.equal(values, torch.ones(3))


def test_numbers_of_python_are_baked_in_as_a_graph_would():
    """What makes the other tests mean something."""
    rate, values = [1.0], torch.zeros(2)
    captured = accelerator_for(torch.device("cpu")).capture(lambda: [values + rate[0]])
    rate[0] = 5.0
    captured.replay()
    assert captured.results[0].tolist() == [1.0, 1.0]


def lanes_of(cases, folder, steps=6):
    """Captured lanes after some eager steps, and a batch."""
    plan = Planner().plan([case.model() for case in cases], folder).graph_data
    members = [Member(entry, plan, CPU, folder, lambda event: None) for entry in plan.models]
    lanes = DeviceLanes(plan.graph, members, {}, CPU, choose=make_tuner(CAPTURED, CPU, 1000))
    leaves = {"input": torch.rand(32, 1, 8, 8), "target": torch.randint(0, 10, (32,))}
    for step in range(steps):
        assert not lanes.train([case.id for case in cases], leaves, 32, step)
    return lanes, leaves


def calls_of_a_step(cases, folder):
    lanes, leaves = lanes_of(cases, folder, steps=12)
    ids, calls = [case.id for case in cases], []
    sys.setprofile(lambda frame, event, what: calls.append(event) if "call" in event else None)
    try:
        lanes.train(ids, leaves, 32, 12)
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_host_works_no_more_for_more_models(optimizer, monkeypatch, tmp_path):
    """Beside the replay, where no scheduler has moved anything."""
    monkeypatch.setitem(accelerator._known, CPU, NoReplay(CPU))
    counts = []
    for count in (2, 5):
        given = training(optimizer, precision="float32")
        cases = [Case(f"m{n}", "mlp", seed=n, training=given) for n in range(count)]
        counts.append(calls_of_a_step(cases, tmp_path / str(count)))
    assert counts[0] == counts[1] < 100


@pytest.mark.parametrize("scheduler", ["Decaying", "Halting"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_settings_that_a_scheduler_moves_are_read_again(scheduler, interval, tmp_path):
    """Weight decay; and momentum that ends, which is another kind of step."""
    schedule = {"scheduler": f"support.losses:{scheduler}", "scheduler_interval": interval}
    given = training(epochs=6)
    given["optimizer_kwargs"] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    cases = [Case("moved", "mlp", training={**given, **schedule}),
             Case("constant", "mlp", seed=1, training=given)]  # fmt: skip
    assert check(cases, tmp_path).told("captured")


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x[:1], lambda x: x.unsqueeze(1)],
    ids=["dtype", "one sample", "shape"],
)
def test_a_batch_of_another_type_is_refused_as_without_capture(change, tmp_path):
    """A copy into the captured batch would cast and broadcast it."""
    lanes, leaves = lanes_of([Case("m", "mlp")], tmp_path)
    bad = {**leaves, "input": change(leaves["input"])}
    with pytest.raises(DataError, match="the first batch's was"):
        lanes.train(["m"], bad, 32, 6)
