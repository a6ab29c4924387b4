"""One step for all models equals `torch.optim`, one optimizer a model."""

import copy
import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgo.model import TrainingSpec
from cgo.runtime.accelerator import accelerator_for
from cgo.runtime.flat import _Layout
from cgo.runtime.optimizers import Updater
from cgo.runtime.scaling import LossScale, Scaling
from cgo.runtime.updates import Updates

SHAPES = ((3, 4), (4,), ())
STEPS = 20

rates = st.floats(1e-4, 0.3)
decays = st.sampled_from([0.0, 0.01, 0.3])
unit = st.floats(0.1, 0.99)

KWARGS = {
    "SGD": st.one_of(
        st.fixed_dictionaries({"lr": rates, "weight_decay": decays}),
        st.fixed_dictionaries(
            {"lr": rates, "weight_decay": decays, "momentum": unit, "nesterov": st.booleans()}
        ),
        st.fixed_dictionaries({"lr": rates, "momentum": unit, "dampening": unit}),
    ),
    "Adam": st.fixed_dictionaries(
        {
            "lr": rates,
            "betas": st.tuples(unit, unit),
            "eps": st.sampled_from([1e-8, 1e-3]),
            "weight_decay": decays,
            "amsgrad": st.booleans(),
        }
    ),
    "RMSprop": st.fixed_dictionaries(
        {
            "lr": rates,
            "alpha": unit,
            "weight_decay": decays,
            "momentum": st.sampled_from([0.0, 0.6]),
            "centered": st.booleans(),
        }
    ),
    "Adagrad": st.fixed_dictionaries(
        {
            "lr": rates,
            "lr_decay": st.sampled_from([0.0, 0.1]),
            "weight_decay": decays,
            "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
        }
    ),
    "Adadelta": st.fixed_dictionaries({"lr": rates}),  # has no rule: stays with torch.optim
}
KWARGS["AdamW"] = KWARGS["Adam"]
SCHEDULES = st.sampled_from(
    [
        {},
        {"scheduler": "StepLR", "scheduler_kwargs": {"step_size": 3, "gamma": 0.5}},
        {"scheduler": "CosineAnnealingLR", "scheduler_kwargs": {"T_max": 9}},
    ]
)


@st.composite
def specs(draw, optimizers=tuple(KWARGS)):
    optimizer = draw(st.sampled_from(optimizers))
    return TrainingSpec(
        optimizer=optimizer,
        optimizer_kwargs=draw(KWARGS[optimizer]),
        grad_clip_norm=draw(st.sampled_from([None, 0.5, 3.0])),
        scheduler_interval="step",
        **draw(SCHEDULES),
    )


class Lanes:
    """Models with packed parameters, one parameter that is not, and one that never learns."""

    def __init__(self, given, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.names = [f"m{index}" for index in range(len(given))]
        own, self.leaves = [[] for _ in given], []
        for shape in SHAPES:
            leaf = torch.randn((len(given), *shape), generator=generator, dtype=dtype)
            lanes = [torch.nn.Parameter(lane) for lane in leaf.unbind(0)]
            self.leaves.append((leaf.requires_grad_(True), lanes))
            for parameters, lane in zip(own, lanes):
                parameters.append(lane)
        for parameters in own:
            alone = torch.randn(5, generator=generator, dtype=dtype)
            parameters += [torch.nn.Parameter(alone), torch.nn.Parameter(torch.ones(2).to(dtype))]
        self.own = own
        self.updaters = {
            name: Updater(spec, parameters)
            for name, spec, parameters in zip(self.names, given, own)
        }
        self.updates = None
        self.left_out = set()

    def give(self, gradients):
        """Gradients as each model's own list; None where there is none."""
        for number, (leaf, _) in enumerate(self.leaves):
            leaf.grad = torch.stack([row[number] for row in gradients])
        for parameters, row in zip(self.own, gradients):
            parameters[-2].grad, parameters[-1].grad = row[-2], row[-1]

    def step(self, gradients, without=frozenset()):
        self.give(gradients)
        if self.updates is None:
            self.updates = Updates(self.updaters, [pair for pair in self.leaves])
        self.updates.step(without)
        for number, (name, parameters) in enumerate(zip(self.names, self.own)):
            if not self.updates.covers(name):
                for parameter, gradient in zip(parameters, gradients[number]):
                    parameter.grad = None if gradient is None else gradient.clone()
                self.updaters[name].step(skip=name in self.left_out)


class Alone:
    def __init__(self, lanes, given):
        self.own = [
            [torch.nn.Parameter(p.detach().clone()) for p in parameters] for parameters in lanes.own
        ]
        self.updaters = [Updater(spec, parameters) for spec, parameters in zip(given, self.own)]

    def step(self, gradients, skip=(False,) * 9):
        for parameters, row, updater, skips in zip(self.own, gradients, self.updaters, skip):
            for parameter, gradient in zip(parameters, row):
                parameter.grad = None if gradient is None else gradient.clone()
            updater.step(skip=skips)


def draw_gradients(lanes, generator):
    return [
        [
            *(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters[:-1]),
            None,
        ]
        for parameters in lanes.own
    ]


def assert_equal(lanes, alone, rtol=1e-12, atol=1e-13):
    for ours, theirs in zip(lanes.own, alone.own):
        for left, right in zip(ours, theirs):
            torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(given=st.lists(specs(), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_random_optimizers_step_as_torch_optim(given, seed):
    lanes = Lanes(given, seed=seed)
    alone = Alone(lanes, given)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        gradients = draw_gradients(lanes, generator)
        lanes.step(gradients)
        alone.step(gradients)
    assert_equal(lanes, alone, rtol=1e-9, atol=1e-11)
    for (leaf, own), number in zip(lanes.leaves, range(len(SHAPES))):
        for lane, parameters in zip(leaf, lanes.own):
            assert torch.equal(lane, own[0]) or torch.equal(lane, parameters[number])


@pytest.mark.parametrize("optimizer", [name for name in KWARGS if name != "Adadelta"])
def test_every_vectorised_optimizer_is_covered(optimizer):
    given = [TrainingSpec(optimizer=optimizer, optimizer_kwargs={"lr": 0.1 * n}) for n in (1, 2)]
    lanes = Lanes(given)
    lanes.step(draw_gradients(lanes, torch.Generator().manual_seed(0)))
    assert all(lanes.updates.covers(name) for name in lanes.names)


def test_others_stay_with_torch_optim():
    given = [
        TrainingSpec(optimizer="Adadelta"),
        TrainingSpec(optimizer_kwargs={"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
        TrainingSpec(optimizer_kwargs={"lr": 0.1, "maximize": True}),
    ]
    lanes = Lanes(given)
    lanes.step(draw_gradients(lanes, torch.Generator().manual_seed(0)))
    assert not any(lanes.updates.covers(name) for name in lanes.names)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(given=st.lists(specs(), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_the_optimizers_own_states_can_be_saved_and_gone_on_from(given, seed):
    """Through `state_dict` into a fresh set of lanes in the middle, and into plain optimizers."""
    lanes = Lanes(given, seed=seed)
    alone = Alone(lanes, given)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        gradients = draw_gradients(lanes, generator)
        lanes.step(gradients)
        alone.step(gradients)
    lanes.updates.sync()
    later = Lanes(given, seed=seed)
    plain = Alone(lanes, given)
    for number, name in enumerate(lanes.names):
        saved = copy.deepcopy(lanes.updaters[name].optimizer.state_dict())
        schedule = lanes.updaters[name].scheduler
        for updater in (later.updaters[name], plain.updaters[number]):
            updater.optimizer.load_state_dict(copy.deepcopy(saved))
            if schedule is not None:
                updater.scheduler.load_state_dict(schedule.state_dict())
        with torch.no_grad():
            for target, source in zip(later.own[number], lanes.own[number]):
                target.copy_(source)
    for _ in range(5):
        gradients = draw_gradients(lanes, generator)
        for each in (later, alone, plain):
            each.step(gradients)
    assert_equal(later, alone, rtol=1e-9, atol=1e-11)
    assert_equal(plain, alone, rtol=1e-9, atol=1e-11)


def test_a_schedule_may_change_what_a_step_needs():
    """Momentum that becomes zero is another kind of step."""
    halting = {"scheduler": "support.losses:Halting", "scheduler_interval": "step"}
    given = [
        TrainingSpec(optimizer_kwargs={"lr": 0.1, "momentum": 0.9}, **(halting if n == 1 else {}))
        for n in range(3)
    ]
    lanes = Lanes(given)
    alone = Alone(lanes, given)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        gradients = draw_gradients(lanes, generator)
        lanes.step(gradients)
        alone.step(gradients)
    assert_equal(lanes, alone)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_a_bad_gradient_changes_no_bit_of_other_lanes(optimizer, clip, poison):
    given = [
        TrainingSpec(optimizer=optimizer, optimizer_kwargs={"lr": 0.1 / n}, grad_clip_norm=clip)
        for n in (1, 2, 3)
    ]
    clean, dirty = Lanes(given), Lanes(given)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        gradients = draw_gradients(clean, generator)
        clean.step(gradients)
        gradients[1] = [None if g is None else torch.full_like(g, poison) for g in gradients[1]]
        dirty.step(gradients)
    for lane in (0, 2):
        for left, right in zip(clean.own[lane], dirty.own[lane]):
            assert torch.equal(left, right)
    assert not dirty.own[1][0].isfinite().all()


def test_a_lane_left_out_stays_as_it_is():
    given = [
        TrainingSpec(optimizer="Adam", optimizer_kwargs={"lr": 0.1}),
        TrainingSpec(optimizer="Adam", optimizer_kwargs={"lr": 0.2}),
        TrainingSpec(optimizer_kwargs={"lr": 0.2}),
    ]
    all_in, left_out = Lanes(given), Lanes(given)
    generator = torch.Generator().manual_seed(3)
    before = [[p.detach().clone() for p in parameters] for parameters in left_out.own]
    for _ in range(3):
        gradients = draw_gradients(all_in, generator)
        all_in.step(gradients)
        gradients[0] = [None if g is None else torch.full_like(g, math.nan) for g in gradients[0]]
        left_out.step(gradients, without=frozenset({"m0"}))
    for parameter, kept in zip(left_out.own[0], before[0]):
        assert torch.equal(parameter, kept)
    for lane in (1, 2):
        for left, right in zip(all_in.own[lane], left_out.own[lane]):
            assert torch.equal(left, right)


OVERFLOWS = {"m0": {0, 3, 4}, "m1": {0, 1}, "m3": {5}}  # in which steps; m2 has no scale


@pytest.mark.parametrize("way", ["kernels", "flat tensors", "device"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_overflown_lanes_leave_out_the_step(optimizer, clip, way):
    """Moments and counts of steps as well; `device` is how a GPU takes the step."""

    def spec(number):
        half = {"precision": "float16"} if f"m{number}" in OVERFLOWS else {}
        kwargs = {"lr": 0.1 / (number + 1)}
        return TrainingSpec(
            optimizer=optimizer, optimizer_kwargs=kwargs, grad_clip_norm=clip, **half
        )

    given = [spec(number) for number in range(4)]
    lanes = Lanes(given, dtype=torch.float32 if way == "device" else torch.float64)
    alone = Alone(lanes, given)
    generator = torch.Generator().manual_seed(6)
    scales = {name: LossScale(given[0], torch.device("cpu")) for name in OVERFLOWS}
    scaling = Scaling(scales)
    lanes.updates = arranged(lanes, generator, way, scaling)
    for step in range(8):
        gradients = draw_gradients(lanes, generator)
        bad = [step in OVERFLOWS.get(name, ()) for name in lanes.names]
        alone.step(gradients, skip=bad)
        for name, scale in scales.items():
            scale.found_inf.fill_(step in OVERFLOWS[name])
        lanes.left_out = {name for name, poison in zip(lanes.names, bad) if poison}
        lanes.step(poisoned(gradients, bad))
    rounding = {"rtol": 1e-5, "atol": 1e-6} if way == "device" else {"rtol": 1e-9, "atol": 1e-11}
    assert_equal(lanes, alone, **rounding)
    lanes.updates.sync()
    for ours, theirs in zip(lanes.updaters.values(), alone.updaters):
        left, right = (updater.optimizer.state_dict()["state"] for updater in (ours, theirs))
        for index, state in right.items():
            assert state.get("step") == left[index].get("step")


def poisoned(gradients, bad):
    return [
        [None if g is None else g * math.inf if poison else g for g in row]
        for row, poison in zip(gradients, bad)
    ]


def arranged(lanes, generator, way, scaling):
    """Updates of lanes, without torch's fused kernels if need be."""
    lanes.give(draw_gradients(lanes, generator))
    accelerator = accelerator_for(torch.device("cpu")) if way == "device" else None
    updates = Updates(lanes.updaters, lanes.leaves, accelerator, scaling)
    for flat in updates._flats if way == "flat tensors" else ():
        flat.kind = replace(flat.kind, fused=None)
    return updates


def test_no_gradient_means_no_step_not_even_weight_decay():
    given = [TrainingSpec(optimizer="AdamW", optimizer_kwargs={"lr": 0.1}) for _ in range(2)]
    lanes = Lanes(given)
    lanes.step(draw_gradients(lanes, torch.Generator().manual_seed(4)))
    for parameters, updater in zip(lanes.own, lanes.updaters.values()):
        assert torch.equal(parameters[-1], torch.ones(2, dtype=torch.float64))
        assert parameters[-1] not in updater.optimizer.state


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop"])  # as a fused kernel, and flat
def test_a_step_lets_go_of_its_gradients(optimizer):
    given = [TrainingSpec(optimizer=optimizer, optimizer_kwargs={"lr": 0.1}) for _ in range(2)]
    lanes = Lanes(given)
    lanes.step(draw_gradients(lanes, torch.Generator().manual_seed(5)))
    held = [weakref.ref(leaf.grad.untyped_storage()) for leaf, _ in lanes.leaves]
    for leaf, _ in lanes.leaves:
        leaf.grad = None
    assert [storage() for storage in held] == [None] * len(held)
    assert not hasattr(lanes.updates._flats[0], "gradient")


def test_on_an_accelerator_leaves_begin_where_vectors_can_be_loaded():
    given = [TrainingSpec(optimizer="Adam", optimizer_kwargs={"lr": 0.1}) for _ in range(3)]
    lanes = Lanes(given, dtype=torch.float32)
    lanes.give(draw_gradients(lanes, torch.Generator().manual_seed(4)))
    updates = Updates(lanes.updaters, lanes.leaves, accelerator_for(torch.device("cpu")))
    (flat,) = updates._flats
    starts = [leaf.data_ptr() - flat.values.data_ptr() for leaf, _ in lanes.leaves]
    assert all(start % 16 == 0 for start in starts)
    assert sum(leaf.numel() for leaf, _ in lanes.leaves) < flat.values.numel()  # gaps there are


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedulers_find_that_the_optimizer_has_stepped(interval):
    schedule = {"scheduler": "StepLR", "scheduler_kwargs": {"step_size": 1}}
    given = [TrainingSpec(**schedule, scheduler_interval=interval), TrainingSpec()]
    lanes = Lanes(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lanes.step(draw_gradients(lanes, torch.Generator().manual_seed(7)))
        lanes.updaters["m0"].end_epoch()
    assert lanes.updaters["m0"].lr == pytest.approx(1e-4)


def test_flat_tensors_are_split_once_however_many_models_there_are(monkeypatch):
    splits = []
    plain = _Layout.split
    monkeypatch.setattr(_Layout, "split", lambda self, flat: splits.append(1) or plain(self, flat))
    updaters, learning = {}, []
    for number in range(8):
        own = [torch.nn.Parameter(torch.rand(3)) for _ in range(2)]
        for parameter in own:
            parameter.grad = torch.ones(3)
        given = {"lr": 0.1 + number, "momentum": 0.9}
        training = TrainingSpec(loss="mse_loss", optimizer="SGD", optimizer_kwargs=given)
        updaters[f"m{number}"] = Updater(training, own)
    updates = Updates(updaters, learning, accelerator_for(torch.device("cpu")))
    splits.clear()
    updates.step()
    assert len(splits) <= 2  # the values, and the momentum
