"""Models that fail, each in its own way and at its own time."""

import ctypes
import os
from dataclasses import dataclass, field

import torch
import torchmetrics
from support import data
from torch import nn

import cgo


@dataclass(frozen=True)
class Kind:
    """How a model is made, and what its error says."""

    error: str
    module: str = "support.nets:mlp"
    kwargs: dict = field(default_factory=dict)
    source: str = "support.data:digits"
    training: dict = field(default_factory=dict)
    ends: bool = False  # its process, or by a signal of it


# --- when it is built -----------------------------------------------------------------------------


def raising_factory():
    raise ValueError("no such network")


def exiting_factory():
    raise SystemExit("the factory leaves")


def no_module():
    return [nn.Linear(2, 2)]


def recursing_factory():
    return recursing_factory()


class Unreadable(nn.Module):
    """Its parameters cannot be listed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 10)

    def named_parameters(self, *args, **kwargs):
        raise RuntimeError("parameters are a secret")

    def forward(self, x):
        return self.body(x.flatten(1))


# --- when it runs ---------------------------------------------------------------------------------


class Failing(nn.Module):
    """Does something in its forward from a certain training step on.

    It counts in Python and looks at values, so that it is never captured.
    """

    def __init__(self, what, at=0):
        super().__init__()
        self.body, self.what, self.at, self.steps = nn.Linear(64, 10), what, at, 0

    def forward(self, x):
        out = self.body(x.flatten(1))
        if self.training:
            self.steps += 1
            if self.steps > self.at and float(out.detach().sum()) == float(out.detach().sum()):
                return getattr(self, self.what)(out)
        return out

    def raises(self, out):
        raise ValueError("a bad step")

    def leaves(self, out):
        raise SystemExit("a step that leaves")

    def interrupts(self, out):
        raise KeyboardInterrupt

    def recurses(self, out):
        return self.recurses(out)

    def no_numbers(self, out):
        return out * float("nan")

    def ends_well(self, out):
        os._exit(0)

    def ends_badly(self, out):
        os._exit(3)

    def aborts(self, out):
        os.abort()

    def reads_nothing(self, out):
        return ctypes.string_at(0)


def failing(what, at=0):
    """Builds it without a trace of failing in the process that captures it."""
    return Failing(what, at)


# --- around it ------------------------------------------------------------------------------------


def leaving_loss(output, target):
    if torch.is_grad_enabled() and not isinstance(output, torch.Tensor):
        return output
    raise SystemExit("the loss leaves")


def raising_metric():
    class Raising(torchmetrics.Metric):
        higher_is_better = True

        def update(self, prediction, target):
            raise SystemExit("the metric leaves")

        def compute(self):
            return 0.0

    return Raising()


class LeavingOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        raise SystemExit("the optimizer leaves")


def leaving_source():
    raise SystemExit("the source leaves")


def leaving_samples():
    train, validation = data.digits(samples=96)

    class Leaving(torch.utils.data.Dataset):
        def __len__(self):
            return len(train)

        def __getitem__(self, index):
            if index == 95:
                raise SystemExit("the sample leaves")
            return train[index]

    return Leaving(), validation


def at(step, what):
    return {"module": "support.bad:failing", "kwargs": {"what": what, "at": step}}


KINDS = {
    "factory raises": Kind("ValueError: no such network", "support.bad:raising_factory"),
    "factory leaves": Kind("the factory leaves", "support.bad:exiting_factory"),
    "factory recurses": Kind("RecursionError", "support.bad:recursing_factory"),
    "no module": Kind("returned a list", "support.bad:no_module"),
    "unreadable": Kind("parameters are a secret", "support.bad:Unreadable"),
    "wrong shape": Kind("mat1 and mat2 shapes", "torch.nn:Linear",
                        {"in_features": 3, "out_features": 3}),
    "raises at once": Kind("a bad step", **at(0, "raises")),
    "leaves at once": Kind("a step that leaves", **at(0, "leaves")),
    "recurses": Kind("RecursionError", **at(0, "recurses")),
    # A model is called some twenty times when it is captured, on copies that count for themselves.
    "raises later": Kind("a bad step", **at(5, "raises")),
    "leaves later": Kind("a step that leaves", **at(5, "leaves")),
    "interrupts later": Kind("KeyboardInterrupt", ends=True, **at(5, "interrupts")),
    "recurses later": Kind("RecursionError", **at(5, "recurses")),
    "becomes no number": Kind("the training loss became nan", **at(4, "no_numbers")),
    "diverges": Kind("the training loss became", training={
        "optimizer_kwargs": {"lr": 1e200}, "optimizer": "SGD"}),
    "loss leaves": Kind("the loss leaves", training={"loss": "support.bad:leaving_loss"}),
    "metric leaves": Kind("the metric leaves", training={
        "metrics": ("support.bad:raising_metric",)}),
    "optimizer leaves": Kind("the optimizer leaves", training={
        "optimizer": "support.bad:LeavingOptimizer", "optimizer_kwargs": {"lr": 0.1}}),
    "source leaves": Kind("the source leaves", source="support.bad:leaving_source"),
    "sample leaves": Kind("the sample leaves", source="support.bad:leaving_samples"),
    "ends well": Kind("exit code 0", ends=True, **at(5, "ends_well")),
    "ends badly": Kind("exit code 3", ends=True, **at(5, "ends_badly")),
    "aborts": Kind("SIGABRT", ends=True, **at(5, "aborts")),
    "reads nothing": Kind("SIGSEGV", ends=True, **at(5, "reads_nothing")),
}  # fmt: skip


def model(kind, id_):
    """A model of one of `KINDS`."""
    found = KINDS[kind]
    kwargs = {"samples": 96} if found.source == "support.data:digits" else {}
    spec = cgo.DataSpec(found.source, kwargs, batch_size=32)
    training = cgo.TrainingSpec(**{"epochs": 3, "precision": "float64", **found.training})
    return cgo.Model(found.module, found.kwargs, data=spec, training=training, model_id=id_)
