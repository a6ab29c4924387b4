"""float16 with a loss scale a model: as `torch.amp.GradScaler`, and no model moves another's."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nets
from support.merged import ALL, KNOWN, Case, Merged, relative

from cgo.errors import ModelError
from cgo.model import TrainingSpec
from cgo.planner import Planner
from cgo.runtime.optimizers import Updater
from cgo.runtime.scaling import LossScale, Scaling, seeds
from cgo.runtime.training import _Trial

CPU = torch.device("cpu")
SGD = {"optimizer": "SGD", "optimizer_kwargs": {"lr": 0.01, "momentum": 0.9}}
ADAM = {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.003}}
#: Overflows in the first steps, and grows and overflows again later.
HALF = {
    "precision": "float16",
    "epochs": 3,
    "loss_scale": 2.0**22,
    "loss_scale_growth_interval": 3,
}


def scale(first=2.0**16, interval=2000):
    training = TrainingSpec(
        precision="float16", loss_scale=first, loss_scale_growth_interval=interval
    )
    return LossScale(training, CPU)


def scaling(**firsts):
    return Scaling({name: scale(first) for name, first in firsts.items()})


def test_only_float16_has_a_scale():
    assert LossScale.of(TrainingSpec(), CPU) is None
    assert Scaling.of({"a": None}) is None
    one = LossScale.of(TrainingSpec(precision="float16"), CPU)
    assert one.dump() == {"scale": torch.amp.GradScaler("cpu")._init_scale, "growth_tracker": 0}


@settings(deadline=None, max_examples=60)
@given(
    starts=st.lists(st.tuples(st.integers(-149, 127), st.integers(1, 4)), min_size=1, max_size=4),
    found=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=12),
)
def test_scales_move_as_gradscalers_do(starts, found):
    """Each step: which overflow (the first four flags), and which take the step at all."""
    theirs = [(torch.tensor(2.0**e), torch.tensor(0, dtype=torch.int32)) for e, _ in starts]
    names = [f"m{index}" for index in range(len(starts))]
    ours = Scaling({n: scale(2.0**e, i) for n, (e, i) in zip(names, starts)})
    for flags in found:
        bad = torch.tensor(flags[: len(starts)]).float()
        ours.found_inf.copy_(bad)
        running = [name for name, runs in zip(names, flags[4:]) if runs]
        ours.update(running)
        for name, (value, tracker), one, (_, interval) in zip(names, theirs, bad, starts):
            if name in running:
                torch._amp_update_scale_(value, tracker, one, 2.0, 0.5, interval)
        assert ours.scale.tolist() == [float(value) for value, _ in theirs]
        assert ours.growth_tracker.tolist() == [int(tracker) for _, tracker in theirs]


@settings(deadline=None, max_examples=60)
@given(
    exponents=st.lists(st.integers(-20, 30), min_size=3, max_size=3),
    bad=st.lists(st.sampled_from([None, math.inf, -math.inf, math.nan]), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_gradients_are_unscaled_lane_by_lane(exponents, bad, dtype, seed):
    """To the bit as torch does for one model, whatever lies in the lanes beside it."""
    names = ["a", "b", "c"]
    ours = scaling(**{name: 3.0 * 2.0**e for name, e in zip(names, exponents)})
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 2, 3, 4, 5, generator=generator, dtype=dtype)
    image = image.transpose(1, 4)  # gradients need not be contiguous
    vector, empty = torch.randn(3, generator=generator, dtype=dtype), torch.zeros(3, 0)
    alone = [torch.randn(4, generator=generator, dtype=dtype) for _ in names]
    for lane, value in enumerate(bad):
        if value is not None:
            target = image[lane] if seed % 2 else alone[lane]
            target[(0,) * target.ndim] = value
    expected = []
    for lane, parts in enumerate(zip(image.clone(), vector.clone(), alone)):
        found, inverse = torch.zeros(()), (1 / ours.scale[lane].double()).float()
        copies = [part.clone() for part in parts]
        torch._amp_foreach_non_finite_check_and_unscale_(copies, found, inverse)
        expected.append((copies, float(found)))
    packed = [(names, image), (names[::-1], vector.flip(0).clone()), (names, empty)]
    ours.unscale(packed, {name: [part] for name, part in zip(names, alone)})
    for lane, (copies, found) in enumerate(expected):
        assert float(ours.found_inf[lane]) == found
        left = image[lane], packed[1][1][2 - lane], alone[lane]
        for ours_, theirs in zip(left, copies):
            torch.testing.assert_close(ours_, theirs, rtol=0, atol=0, equal_nan=True)


def test_models_without_a_scale_stay_as_they_are():
    ours = scaling(a=4.0)
    gradient, alone = torch.full((2, 3), math.inf), torch.ones(3)
    ours.unscale([(["x", "y"], gradient)], {"x": [alone]})
    assert ours.found_inf.tolist() == [0.0]
    assert gradient.isinf().all()
    assert torch.equal(alone, torch.ones(3))
    assert ours.overflow(["x", "a"]).tolist() == [False, False]


def test_sparse_gradients_are_unscaled():
    ours = scaling(a=4.0)
    gradient = torch.sparse_coo_tensor([[1, 3]], [8.0, 2.0], (5,))
    ours.unscale((), {"a": [gradient]})
    assert gradient._values().tolist() == [2.0, 0.5]


def test_a_seed_is_the_scale_in_the_losses_own_type():
    ours = scaling(a=2.0, b=2.0**17)
    lanes = ours.lanes(["b", "a"])
    assert seeds(ours.scale, lanes, torch.zeros(2)).tolist() == [2.0**17, 2.0]
    assert seeds(ours.scale, lanes, torch.zeros(2, 1).half()).tolist() == [[math.inf], [2.0]]
    assert seeds(ours.scale, lanes[:1], torch.zeros(())).shape == ()


def test_a_model_of_float16_parameters_is_refused():
    """GradScaler refuses its gradients."""
    parameters = [torch.nn.Parameter(torch.zeros(2).half())]
    with pytest.raises(ModelError, match="build the module in float32"):
        Updater(TrainingSpec(precision="float16"), parameters)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(cuda):
    def step(device):
        training = TrainingSpec(precision="float16", loss_scale_growth_interval=1)
        ours = Scaling({name: LossScale(training, device) for name in "ab"})
        gradient = torch.tensor([[1.0, 2.0], [3.0, math.inf]]).repeat(2, 1).to(device)
        packed, own = [(["a", "b"], gradient[:2])], {"a": [gradient[2]]}
        loss = torch.zeros(2, device=device)
        for strict in (False, True):  # the first step makes tables
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if strict else "default")
            seed = seeds(ours.scale, ours.lanes(["a", "b"]), loss)
            ours.unscale(packed, own)
            stays = ours.overflow(["a", "b"])
            ours.update(["a", "b"])
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        return [t.cpu() for t in (seed, gradient, stays, ours.scale, ours.growth_tracker)]

    for left, right in zip(step(cuda), step(CPU)):
        assert torch.equal(left, right)


# --- trials ---------------------------------------------------------------------------------------


class Trial(Merged):
    """A merged trial in which every model's scale is seen in every step."""

    def __init__(self, cases, folder):
        self.folder, self.losses, self.gradients, self.scales, self.events = folder, {}, {}, {}, []
        models = [case.model() for case in cases]
        self.plan = Planner(True, ALL).plan(models, folder, {"tuning": KNOWN.as_json()})
        assert not self.plan.failures, self.plan.failures
        self.trial = _Trial(
            self.plan.graph_data, {}, folder, self.events.append, self, [CPU], KNOWN
        )

    def run(self):
        self.trial.run()
        return self

    def on_loss(self, model, step, loss):
        super().on_loss(model, step, loss)
        self.scales.setdefault(model, []).append(self.scale(model))

    def replays(self):
        programs = next(iter(self.trial.cohorts.values())).companies[0].lanes[0].merged._programs
        return all(b._step.replaying for (name, *_), b in programs.items() if "train" in name)

    def scale(self, model):
        found = self.trial.members[model].scale
        return 1.0 if found is None else float(found.scale)


def assert_as_alone(run, case, rtol=2e-3):
    """The same scales in every step; losses within what float16 rounds."""
    alone = case.alone()
    first = case.training.get("loss_scale", 1.0)
    assert [*run.scales[case.id], run.scale(case.id)] == [first, *alone.scales]
    assert max(map(relative, run.losses[case.id], alone.losses)) < rtol
    if all(g is None or g.isfinite().all() for g in alone.gradients.values()):
        for name, gradient in alone.gradients.items():
            found = run.gradients[case.id][name]
            torch.testing.assert_close(found, gradient, rtol=0.02, atol=0.002)
    for row, expected in zip(run.history(case.id), alone.history, strict=True):
        assert relative(row["val_loss"], expected["val_loss"]) < rtol
    return alone


def moves(scales):
    pairs = list(pairwise(scales))
    return sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "optimizer", "clip"),
    [("mlp", SGD, None), ("mlp", ADAM, 0.5), ("cnn", SGD, 0.5), ("cnn", ADAM, None)],
)
def test_trials_equal_a_plain_loop_with_a_gradscaler(tmp_path, family, optimizer, clip):
    training = {**HALF, **optimizer, "grad_clip_norm": clip}
    given = [
        Case("a", family, training=training),
        Case("b", family, seed=1, training={**training, "loss_scale": 2.0**17}),
        Case("c", family, seed=2, training={**training, "loss_scale_growth_interval": 2}),
    ]
    run = Trial(given, tmp_path).run()
    assert run.plan.report.opaque == {}
    assert run.replays()  # a tape must not hold the scales of the step that it was recorded from
    for case in given:
        alone = assert_as_alone(run, case)
        grown, shrunk = moves(alone.scales)
        assert grown
        assert shrunk


def test_every_way_to_take_a_step(tmp_path):
    """Flat tensors, the optimizer's own step, a module that is not captured, other precisions."""
    rms = {"optimizer": "RMSprop", "optimizer_kwargs": {"lr": 0.001, "momentum": 0.5}}
    other = {"optimizer": "NAdam", "optimizer_kwargs": {"lr": 0.003}}
    schedule = {"scheduler": "ExponentialLR", "scheduler_kwargs": {"gamma": 0.9},
                "scheduler_interval": "step"}  # fmt: skip
    given = [
        Case("flat", "mlp", training={**HALF, **rms}),
        Case("flat2", "mlp", seed=1, training={**HALF, **rms, "loss_scale": 2.0**10}),
        Case("own", "mlp", seed=2, training={**HALF, **other, **schedule}),
        Case("opaque", "trap", {"kind": "control_flow"}, training={**HALF, **ADAM}),
        Case("single", "mlp", training={**ADAM, "epochs": 3}),
        Case("brain", "mlp", training={**ADAM, "epochs": 3, "precision": "bfloat16"}),
    ]
    run = Trial(given, tmp_path).run()
    assert set(run.plan.report.opaque) == {"opaque"}
    for case in given:
        assert_as_alone(run, case, rtol=2e-2 if case.id == "brain" else 2e-3)


def test_an_overflow_changes_no_bit_of_the_neighbours(tmp_path):
    def state_and_losses(first, name):
        def training(first):
            return {**HALF, **ADAM, "loss_scale": first, "grad_clip_norm": 1.0}

        given = [
            Case("a", "cnn", training=training(2.0**10)),
            Case("b", "cnn", seed=1, training=training(first)),
            Case("c", "cnn", seed=2, training=training(2.0**10)),
        ]
        run = Trial(given, tmp_path / name).run()
        return run, {id_: (run.losses[id_], run.state(id_)) for id_ in "ac"}

    _, calm = state_and_losses(2.0**10, "calm")
    wild, disturbed = state_and_losses(2.0**40, "wild")
    assert wild.scale("b") == 2.0**25  # every step overflowed
    torch.manual_seed(1)
    for name, parameter in nets.cnn().named_parameters():
        assert torch.equal(wild.state("b")[name], parameter)
    for id_, (losses, state) in calm.items():
        assert losses == disturbed[id_][0]
        assert all(torch.equal(value, disturbed[id_][1][name]) for name, value in state.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_scales_go_on_from_a_checkpoint(tmp_path, optimizer):
    training = {**HALF, **optimizer, "loss_scale_growth_interval": 4}  # an epoch has 5 steps
    given = [
        Case("a", "mlp", training=training),
        Case("b", "mlp", seed=1, training={**training, "loss_scale": 2.0**16}),
        Case("opaque", "trap", {"kind": "control_flow"}, training=training),
    ]
    whole = Trial(given, tmp_path / "whole").run()
    halved = Trial(given, tmp_path / "halved")

    def die(event):
        if event.kind == "epoch" and event.epoch == 1:
            raise Killed

    halved.trial.report = die
    for member in halved.trial.members.values():
        member._report = die
    with pytest.raises(Killed):
        halved.run()
    resumed = Trial(given, tmp_path / "halved").run()
    for case in given:
        assert resumed.scales[case.id] == whole.scales[case.id][5:]
        assert resumed.losses[case.id] == whole.losses[case.id][5:]
        for name, value in whole.state(case.id).items():
            assert torch.equal(value, resumed.state(case.id)[name])


def test_a_nan_loss_still_ends_a_model(tmp_path):
    given = [
        Case("good", "mlp", training={**HALF, **SGD}),
        Case("bad", "mlp", seed=1, training={**HALF, **SGD, "optimizer_kwargs": {"lr": 1e30}}),
    ]
    run = Trial(given, tmp_path).run()
    assert run.ended("good")["success"]
    assert "the training loss became" in run.ended("bad")["error"]
