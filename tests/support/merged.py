"""Runs a merged trial in this process and compares it with the oracle."""

from dataclasses import dataclass, field

import oracle
import torch
from support import data as sources
from support import losses, nets

import cgo
from cgo import trial, weights
from cgo.passes.batch_operators import BatchOperators
from cgo.planner import Planner

ALL = BatchOperators()
#: Nothing is measured, so that two runs choose alike; steps are replayed, however few there are.
KNOWN = cgo.Tuning(measure=False, tape=True)


@dataclass
class Case:
    """One model, said in plain values for both sides."""

    id: str
    factory: str  # name in support.nets
    kwargs: dict = field(default_factory=dict)
    source: str = "digits"
    source_kwargs: dict = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 32
    data_seed: int = 0
    drop_last: bool = False
    loss: str = "cross_entropy"
    metric: str = "accuracy"
    measure: object = None  # what it computes, for the oracle
    training: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)  # further fields of the DataSpec
    augment: object = None  # what they do to a batch, for the oracle

    def model(self):
        data = cgo.DataSpec(
            f"support.data:{self.source}",
            self.source_kwargs,
            batch_size=self.batch_size,
            seed=self.data_seed,
            drop_last=self.drop_last,
            **self.data,
        )
        training = cgo.TrainingSpec(loss=self.loss, metrics=(self.metric,), **self.training)
        return cgo.Model(
            f"support.nets:{self.factory}",
            self.kwargs,
            data=data,
            training=training,
            seed=self.seed,
            model_id=self.id,
        )

    def alone(self, streams=None):
        whole = {"digits": "arrays"}.get(self.source, f"{self.source}_arrays")
        return oracle.train_alone(
            getattr(nets, self.factory),
            self.kwargs,
            getattr(sources, whole)(**self.source_kwargs),
            seed=self.seed,
            batch_size=self.batch_size,
            data_seed=self.data_seed,
            drop_last=self.drop_last,
            loss=getattr(losses, self.loss.partition(":")[2], None)
            or getattr(torch.nn.functional, self.loss),
            metric=self.metric,
            measure=self.measure,
            augment=self.augment,
            streams=streams,
            **self.training,
        )


class Merged:
    """A merged trial of several cases, with every loss and first gradient."""

    def __init__(self, cases, folder, merge=True, batch_operators=ALL, tuning=KNOWN):
        self.folder = folder
        self.losses, self.gradients, self.events = {}, {}, []
        planner = Planner(merge, batch_operators)
        settings = {"tuning": tuning.as_json()}
        self.plan = planner.plan([case.model() for case in cases], folder, settings)
        assert not self.plan.failures, self.plan.failures
        self.metrics = self.run(self.plan.graph_data, folder=folder, report=self.events.append)

    def run(self, data, **given):
        return trial.execute(data, observer=self, **given)

    def on_loss(self, model, step, loss):
        self.losses.setdefault(model, []).append(float(loss))

    def on_gradients(self, model, step, gradients):
        if step == 0:
            self.gradients[model] = {
                name: None if value is None else value.clone() for name, value in gradients.items()
            }

    def told(self, what):
        return [e.value for e in self.events if e.kind == "trial" and e.value["what"] == what]

    def history(self, id_):
        return [e.value for e in self.events if e.model == id_ and e.kind == "epoch"]

    def ended(self, id_):
        return next(e.value for e in self.events if e.model == id_ and e.kind == "ended")

    def state(self, id_):
        return weights.load(self.folder / self.ended(id_)["weights"])


def relative(found, expected):
    return abs(found - expected) / max(abs(expected), 1e-300)


def assert_equal_float64(merged, case, alone=None):
    """Losses within 1e-9 of training alone, in every step; history, metric and weights as well."""
    alone = alone or case.alone()
    found = merged.losses[case.id]
    assert len(found) == len(alone.losses)
    worst = max(map(relative, found, alone.losses))
    assert worst <= 1e-9, f"{case.id}: a loss differs by {worst:.1e} relative"
    for row, expected in zip(merged.history(case.id), alone.history, strict=True):
        assert set(row) == {*expected, "seconds"}
        for key, value in expected.items():
            # torchmetrics computes its figures in float32
            allowed = 1e-9 if key in ("train_loss", "val_loss", "lr") else 1e-6
            assert relative(row[key], value) <= allowed, (case.id, key, row[key], value)
    state = merged.state(case.id)
    assert set(state) == set(alone.state)
    idle = {
        name
        for name, gradient in alone.gradients.items()
        if gradient is not None and float(gradient.abs().max()) < 1e-12
    }
    for name, value in alone.state.items():
        # The true gradient of a bias before batch norm is zero: it walks on rounding errors, which
        # adaptive optimizers blow up, and the norm's running mean follows. No loss sees either.
        if name not in idle:
            walks = idle and name.endswith("running_mean")
            # Adaptive optimizers also blow up the rounding of gradients that are small, not zero.
            adaptive = case.training.get("optimizer", "SGD") != "SGD"
            close = {"rtol": 1e-8, "atol": 1e-8 if adaptive else 1e-10}
            if walks:
                close = {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(state[name], value, **close)


def assert_same_bits(before, after, cases):
    """All losses, first gradients and weights of two merged trials."""
    assert before.losses == after.losses
    for case in cases:
        for path, gradient in before.gradients[case.id].items():
            assert torch.equal(gradient, after.gradients[case.id][path])
        for path, value in before.state(case.id).items():
            assert torch.equal(value, after.state(case.id)[path])


def assert_first_step_float32(merged, case, alone=None):
    """First loss within 1e-5, first gradients within 1e-5 of the model's gradient norm."""
    alone = alone or case.alone()
    assert relative(merged.losses[case.id][0], alone.losses[0]) <= 1e-5
    known = {name: g for name, g in alone.gradients.items() if g is not None}
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in known.values()))
    found = merged.gradients[case.id]
    assert set(found) == set(alone.gradients)
    for name, expected in alone.gradients.items():
        if expected is None:
            assert found[name] is None
        else:
            assert float((found[name] - expected).double().norm() / norm) <= 1e-5, name
