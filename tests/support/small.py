"""Tiny modules and data sets for the tests of capture and runtime."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset


def lazy():
    return nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))


def points(samples=40, features=6, classes=3, validation=12):
    """Classification of random points; (samples, features) float32 and int64 classes."""
    generator = torch.Generator().manual_seed(5)
    total = samples + validation
    x = torch.randn(total, features, generator=generator)
    y = torch.randint(0, classes, (total,), generator=generator)
    return (
        TensorDataset(x[:samples], y[:samples]),
        TensorDataset(x[samples:], y[samples:]),
    )


class Listed(Dataset):
    """A plain map-style data set over tensors, one sample at a time."""

    def __init__(self, tensors, change=None):
        self.tensors, self.change = tensors, change

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        x, y = (tensor[index] for tensor in self.tensors)
        return (self.change(x) if self.change else x), y


def noisy_points(**kwargs):
    """The same points with noise that torch, numpy and random draw for each sample."""
    import random

    import numpy as np

    def noise(x):
        return x + torch.randn(()) + float(np.random.rand()) + random.random()

    train, validation = points(**kwargs)
    return Listed(train.tensors, noise), Listed(validation.tensors)


def broken_points(bad=17, **kwargs):
    """Points whose training sample number `bad` raises."""
    train, validation = points(**kwargs)

    class Broken(Listed):
        def __getitem__(self, index):
            if index == bad:
                raise OSError("disk on fire")
            return super().__getitem__(index)

    return Broken(train.tensors), validation


def named_points(**kwargs):
    """Points whose input is a dict."""

    class Named(Listed):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return {"x": x, "scale": torch.tensor(2.0)}, y

    train, validation = points(**kwargs)
    return Named(train.tensors), Named(validation.tensors)


def mlp(hidden=8, features=6, classes=3, dropout=0.0):
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


def narrow(features=6):
    """Has fewer classes than the data: fails on the first target that is out of range."""
    return nn.Linear(features, 2)


class Stemmed(nn.Module):
    """A frozen stem with batch norm, the same in every model, under a head of its own."""

    def __init__(self, hidden=5, stem_training=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(99)
            self.stem = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh())
        self.stem.requires_grad_(False)
        self.stem.train(stem_training)
        self.head = nn.Sequential(nn.Linear(7, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, x):
        return self.head(self.stem(x))


class RaisesLater(nn.Module):
    """Cannot be captured, and raises in its `after`-th training step."""

    def __init__(self, after=4):
        super().__init__()
        self.body, self.after, self.calls = nn.Linear(6, 3), after, 0

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls > self.after:
                raise RuntimeError("gave up")
        out = self.body(x)
        return out * 2 if float(out.sum()) > 0 else out


class Explodes(nn.Module):
    """Its loss becomes NaN in the first epoch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        return torch.log(self.body(x) - 1e6)


class Keyword(nn.Module):
    """Takes the leaves of a dict input by name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, *, x, scale):
        return self.body(x) * scale[:, None]


class Rewrites(nn.Module):
    """One module a way of writing in place, drawing or switching gradients off."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return getattr(self, f"_{self.kind}")(x)

    def _no_grad(self, x):
        with torch.no_grad():
            gate = self.body(x).sigmoid()
        return self.body(x) * gate

    def _write_input(self, x):
        x.mul_(2)
        return self.body(x)

    def _write_view(self, x):
        x[:, :2].add_(1)
        return self.body(x)

    def _write_strided(self, x):
        x.as_strided((3,), (7,)).add_(1)
        return self.body(x)

    def _write_weight(self, x):
        with torch.no_grad():
            self.body.weight.clamp_(-0.1, 0.1)
        return self.body(x)

    def _count(self, x):
        self.count += 1
        return self.body(x) / self.count

    def _dropout(self, x):
        return F.dropout(self.body(x), 0.5, self.training)

    def _noise(self, x):
        return self.body(x) + torch.randn_like(x)[:, :3]

    def _multinomial(self, x):
        out = self.body(x)
        return out * torch.multinomial(out.softmax(1), 1)

    def _enable_grad(self, x):
        with torch.no_grad(), torch.enable_grad():
            out = self.body(x)
        return out


def rewrites(kind):
    return Rewrites(kind)


def stemmed(**kwargs):
    return Stemmed(**kwargs)


def raises_later(**kwargs):
    return RaisesLater(**kwargs)


def explodes():
    return Explodes()


def keyword():
    return Keyword()


def seeded_structure():
    """Draws its structure from the seed."""
    return mlp(hidden=int(torch.randint(4, 9, ())))


def hidden_scale():
    """Draws a number that its printed form does not show."""
    net = Rewrites("dropout")
    scale = float(torch.rand(()))
    net.forward = lambda x: net.body(x) * scale
    return net


class Tempered(nn.Module):
    """Evaluation reads what the seed drew, and nothing else does."""

    def __init__(self, temperature):
        super().__init__()
        self.body, self.temperature = nn.Linear(6, 3), temperature

    def forward(self, x):
        return self.body(x) if self.training else self.body(x) * self.temperature


def tempered(kind):
    drawn = torch.rand(3)
    return Tempered({"number": float(drawn[0]), "tensor": drawn}[kind])


class Uncopied(nn.Module):
    """No copy can be made of it, and its forward looks at values."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def __deepcopy__(self, memo):
        raise TypeError("there is but one of me")

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else -self.body(x)


def uncopied():
    return Uncopied()


def unseeded():
    """Builds another shape each time it is called, whatever the seed."""
    import os

    return nn.Sequential(nn.Linear(6, 4 + os.getpid() % 1000), nn.LazyLinear(3))


def late_class(**kwargs):
    """Points whose third class appears after the first sixteen samples."""
    train, validation = points(**kwargs)
    x, y = train.tensors
    order = torch.argsort(y, stable=True)
    known = validation.tensors[1] < 2
    return TensorDataset(x[order], y[order]), TensorDataset(*(t[known] for t in validation.tensors))


def slow_points(delay_s=0.002, **kwargs):
    """Points that take a while to load, so that a test can act in the middle of an epoch."""
    import time

    def wait(x):
        time.sleep(delay_s)
        return x

    train, validation = points(**kwargs)
    return Listed(train.tensors, wait), validation


class Crashes(nn.Module):
    """Takes its process down in training step `after`, but only outside the engine."""

    def __init__(self, after=3):
        super().__init__()
        self.body, self.after, self.calls = nn.Linear(6, 3), after, 0

    def forward(self, x):
        import os
        import signal

        self.calls += self.training
        if self.calls > self.after and "CGO_IN_TRIAL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        out = self.body(x)
        return out * 2 if bool(out.sum() > 0) else out


def crashes(**kwargs):
    return Crashes(**kwargs)


def configured():
    """Reads the experiment's settings, which are there in a trial alone."""
    import os

    from cgo.trial import experiment_config

    if "CGO_IN_TRIAL" in os.environ:
        assert experiment_config()["max_models"] == 7
        assert experiment_config()["trial_id"] == "t0000"
    return mlp()


class Moody(nn.Module):
    """Computes something else in evaluation mode, in a way that is no operator's argument."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)
        )

    def forward(self, x):
        """Logits; in training, three times as large."""
        return self.layers(x) * (3.0 if self.training else 1.0)


def moody():
    """See `Moody`."""
    return Moody()


def usual():
    """Batch norm and dropout, whose evaluation mode is known."""
    return Moody().layers


class Counting(nn.Module):
    """Decides by data, so it is opaque; counts in an attribute and binds a buffer anew."""

    def __init__(self):
        super().__init__()
        self.body, self.steps = nn.Linear(6, 3), 0
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.centre = 0.9 * self.centre + 0.1 * x.mean(0)
        x = x - self.centre
        return self.body(x if x.sum() > 0 else -x) * (1 + self.steps / 50)


def counting():
    return Counting()


class frozen_stem(nn.Module):
    """A frozen stem, whose norm counts in training mode, and a buffer that nobody writes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).requires_grad_(False)
        self.stem[1].requires_grad_(True)
        self.head = nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.head(self.stem(x)) * self.scale


class Shrinking(torch.optim.SGD):
    """Shrinks what is frozen, too."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99)
