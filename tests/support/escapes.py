"""User code that raises what ends processes, at every place where a trial calls user code.

Nothing raises until it is armed: a test plans, arms and then trains.
"""

import torch
import torchmetrics
from support import small
from torch import nn

#: What the next call of armed code does; None: what it should.
ARMED = None


class Vanish(BaseException):
    """No `Exception`, and none that Python knows."""


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit("not even its message")


def recurse():
    return recurse() + 1


def leave():
    """Raise what is armed."""
    if ARMED == "recursion":
        recurse()
    elif ARMED is not None:
        raise ARMED


def armed(place, here):
    if place == here:
        leave()


class Guarded(torch.autograd.Function):
    """The identity, whose backward leaves."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        leave()
        return gradient


class Leaver(nn.Module):
    """A model that is called as it is, as it looks at its data."""

    def __init__(self, place):
        super().__init__()
        self.body, self.place = nn.Linear(6, 3), place

    def forward(self, x):
        armed(self.place, "forward" if self.training else "evaluation")
        out = Guarded.apply(self.body(x)) if self.place == "backward" else self.body(x)
        return out * 2 if bool(out.sum() > 0) else out

    def named_parameters(self, *args, **kwargs):
        armed(self.place, "named_parameters")
        return super().named_parameters(*args, **kwargs)

    def train(self, mode=True):
        armed(self.place, "train")
        return super().train(mode)


def leaver(place="nowhere"):
    armed(place, "factory")
    return Leaver(place)


def loss(output, target):
    leave()
    return nn.functional.cross_entropy(output, target)


class Data(small.Listed):
    def __init__(self, tensors, place):
        super().__init__(tensors)
        self.place = place

    def __len__(self):
        armed(self.place, "length")
        return super().__len__()

    def __getitem__(self, index):
        armed(self.place, "sample")
        return super().__getitem__(index)


def points(place):
    armed(place, "source")
    train, validation = small.points()
    return Data(train.tensors, place), Data(validation.tensors, place.removeprefix("validation "))


class Augment(nn.Module):
    def forward(self, x):
        leave()
        return x


def augment():
    return Augment()


def unbuildable_augment():
    leave()
    return nn.Identity()


class Metric(torchmetrics.MeanMetric):
    def __init__(self, place):
        armed(place, "metric")
        super().__init__()
        self.place = place

    def update(self, prediction, target):
        armed(self.place, "metric.update")
        super().update(prediction.mean())

    def compute(self):
        armed(self.place, "metric.compute")
        return super().compute()


def metric():
    return Metric("metric")


def metric_update():
    return Metric("metric.update")


def metric_compute():
    return Metric("metric.compute")


class Optimizer(torch.optim.SGD):
    def __init__(self, parameters, place, **kwargs):
        armed(place, "optimizer")
        super().__init__(parameters, **kwargs)
        self.place = place

    def step(self, closure=None):
        armed(self.place, "optimizer.step")
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        armed(self.place, "optimizer.zero_grad")
        super().zero_grad(set_to_none)


class Scheduler(torch.optim.lr_scheduler.StepLR):
    def __init__(self, optimizer, place):
        armed(place, "scheduler")
        self.place = "nowhere"
        super().__init__(optimizer, 1)
        self.place = place

    def step(self, epoch=None):
        armed(self.place, "scheduler.step")
        super().step(epoch)
