"""Factories for the equivalence tests: the families that searches train, and traps of capture."""

import random

import numpy as np
import torch
from support.random_nets import drawn  # noqa: F401  (a factory like those below)
from torch import nn
from torch.nn import functional as F


def mlp(width=16, dropout=0.0):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10)
    )


def cnn(width=4, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


class Residual(nn.Module):
    def __init__(self, width=4, blocks=2, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
            for _ in range(blocks)
        )
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu_(x + block(x))
        return self.head(self.drop(x.mean((2, 3))))


OPERATORS = ("none", "skip", "conv1", "conv3", "pool")


class Cell(nn.Module):
    """A NAS-Bench-201 cell: four nodes, an operator on each of the six edges."""

    def __init__(self, width, edges):
        super().__init__()
        self.edges = edges
        self.operators = nn.ModuleList(self._operator(width, name) for name in edges)

    @staticmethod
    def _operator(width, name):
        if name in ("conv1", "conv3"):
            size = int(name[-1])
            return nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(width),
            )
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False) if name == "pool" else nn.Identity()

    def forward(self, x):
        nodes, edge = [x], 0
        for end in range(1, 4):
            total = torch.zeros_like(x)
            for start in range(end):
                if self.edges[edge] != "none":
                    total = total + self.operators[edge](nodes[start])
                edge += 1
            nodes.append(total)
        return nodes[-1]


def cells(edges="conv3 skip conv1 pool none conv3", width=4, count=1, dropout=0.0):
    """Stem, `count` cells a stage in two stages, head."""
    names = edges.split()
    assert len(names) == 6
    assert set(names) <= set(OPERATORS)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        *(Cell(width, names) for _ in range(count)),
        nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        *(Cell(2 * width, names) for _ in range(count)),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, 10),
    )


class Encoder(nn.Module):
    def __init__(self, d=8, layers=2, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(8, d)
        layer = nn.TransformerEncoderLayer(d, 2, 16, dropout, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, 10)

    def forward(self, x):
        return self.head(self.body(self.embed(x.squeeze(1))).mean(1))


class Lstm(nn.Module):
    def __init__(self, hidden=12, dropout=0.0):
        super().__init__()
        self.body = nn.LSTM(8, hidden, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x):
        out, _ = self.body(x.squeeze(1))
        return self.head(self.drop(out[:, -1]))


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self, width=16, dropout=0.0):
        super().__init__()
        self.enter = nn.Linear(64, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.enter(x.flatten(1)).tanh()
        return self.head(self.drop(self.second(self.first(x).tanh())))


class Headed(nn.Module):
    """A head of its own over a trunk that all models share; frozen, in evaluation mode."""

    def __init__(self, width=8, trunk=8, frozen=True, images=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.enter = nn.Sequential(nn.Conv2d(1, trunk, 3, padding=1), nn.BatchNorm2d(trunk))
            self.body = nn.Sequential(
                nn.Conv2d(trunk, trunk, 3, padding=1), nn.BatchNorm2d(trunk), nn.Dropout(0.5)
            )
            for part in (self.enter[1], self.body[1]):
                part.running_mean.uniform_(-0.5, 0.5)
        self.images = images
        if frozen:
            self.enter.requires_grad_(False).eval()
            self.body.requires_grad_(False).eval()
        self.head = nn.Sequential(
            nn.Conv2d(trunk, width, 3) if images else nn.Linear(trunk, width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(width * (4 if images else 1), 10),
        )

    def forward(self, x):
        x = F.relu(self.enter(x))
        x = F.max_pool2d(F.relu(x + self.body(x)), 2)
        return self.head(x if self.images else x.mean((2, 3)))


def headed(**kwargs):
    return Headed(**kwargs)


def residual(**kwargs):
    return Residual(**kwargs)


def encoder(**kwargs):
    return Encoder(**kwargs)


def lstm(**kwargs):
    return Lstm(**kwargs)


def tied(**kwargs):
    return Tied(**kwargs)


class Branches(nn.Module):
    """Wide values of which only a sum is wanted, each by another operator, so in no group."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.head = nn.Linear(3 * width, 10)

    def forward(self, x):
        x = self.stem(x)
        one, two, three = x + 1.0, x + 2.0, x + 3.0
        kept = three.mean((2, 3), keepdim=True).flatten(1)
        return self.head(torch.cat([one.mean((2, 3)), two.sum((2, 3)), kept], 1))


def branches(**kwargs):
    return Branches(**kwargs)


def regressor(width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 2))


class HalfIdle(nn.Module):
    """Its first layer learns, or not: its output is detached."""

    def __init__(self, idle):
        super().__init__()
        self.idle = idle
        self.enter, self.norm, self.head = nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x):
        x = self.norm(self.enter(x.flatten(1)))
        return self.head((x.detach() if self.idle else x).tanh())


def half_idle(idle):
    return HalfIdle(idle)


class Two(nn.Module):
    """Takes two inputs, by position or by name."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 10), nn.Linear(1, 10)

    def forward(self, image, mark):
        return self.left(image.flatten(1)) * self.right(mark).sigmoid()


def two():
    return Two()


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Trap(nn.Module):
    """A small classifier with one of the traps of capture in its middle."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0
        self.norm = nn.BatchNorm1d(64)
        self.enter = nn.Linear(64, 12)
        self.inner = nn.BatchNorm1d(12, momentum=None if kind == "momentum_none" else 0.1)
        self.strided = nn.BatchNorm1d(4)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(12, 10)
        if kind.startswith("frozen_norm"):
            self.norm.requires_grad_(False)
            self.norm.train(kind == "frozen_norm_training")
        # The streams that a forward may read; a trial goes on from them, as alone.
        random.seed(4)
        np.random.seed(4)

    def forward(self, x):
        x = x.flatten(1)
        if self.kind.startswith("frozen_norm"):
            x = self.norm(x)
        if self.kind == "write_input":
            x.mul_(1.5)
        if self.kind == "write_view":
            x[:, :4].add_(1.0)
        x = getattr(self, f"_{self.kind}", lambda value: value)(self.enter(x))
        return self.head(x)

    def _straight_through(self, x):
        return Sign.apply(x)

    def _python_random(self, x):
        return x * (1 + random.random())

    def _numpy_random(self, x):
        return x * (1 + np.random.rand())

    def _python_counter(self, x):
        self.calls += 1
        return x / self.calls

    def _no_grad(self, x):
        with torch.no_grad():
            gate = x.sigmoid()
        return x * gate

    def _in_place(self, x):
        x += 1
        return F.relu_(x)

    def _momentum_none(self, x):
        return self.inner(x)

    def _control_flow(self, x):
        return x * 2 if x.sum() > 0 else x

    def _training_flag(self, x):
        return x * 2 if self.training else x

    def _autocast(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ((x.float() @ x.float().T).softmax(1) @ x.float()).to(x.dtype)

    def _multinomial(self, x):
        return x * torch.multinomial(x.softmax(1), 1)

    def _constant(self, x):
        return x * torch.tensor([0.5]) + torch.arange(12.0)

    def _alpha_dropout(self, x):
        return F.alpha_dropout(x, 0.2, self.training)

    def _strided_norm(self, x):
        """Dropout masks follow the layout that the norm's kernel gives, not its meta function."""
        x = self.strided(x.view(-1, 3, 4).transpose(1, 2))
        return F.dropout(x, 0.3, self.training).flatten(1)

    def _noise(self, x):
        return x + torch.randn_like(x) * 0.1

    def _idle_noise(self, x):
        """Drawn while training only, seen by nobody: only the stream tells it from evaluation."""
        if self.training:
            x = x + torch.randn_like(x) * 0
        return F.dropout(x, 0.3, self.training)

    def _lasting_dropout(self, x):
        """In evaluation as well, as for an estimate of uncertainty."""
        return F.dropout(x, 0.3, True)

    def _unread_dropout(self, x):
        F.dropout(x, 0.2, self.training)
        return F.dropout(x, 0.3, self.training)


def trap(kind):
    return Trap(kind)


class NormCalledTwice(nn.Module):
    """One batch norm, called twice in a forward, as siamese networks and discriminators do."""

    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        z = self.inner(x.flatten(1))
        return self.head(self.norm(z) + self.norm(-z).relu())


def norm_called_twice(**kwargs):
    return NormCalledTwice(**kwargs)


def frozen_norm():
    """A batch norm over a frozen layer, its own weights frozen, too: nothing there learns."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16)).requires_grad_(False)
    return nn.Sequential(stem, nn.ReLU(), nn.Linear(16, 10))


def outputs(count, width=16):
    """Digits to so many numbers."""
    layers = [nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, count)]
    return nn.Sequential(*layers)


def deep(count, width=16):
    """As `outputs`, with a layer between."""
    first, *rest = outputs(count, width)
    between = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(first, *between, rest[-1])


class Recurrent(nn.Module):
    """Wide enough that a step's factors are smaller than the weights' gradient."""

    def __init__(self, kind, hidden=48):
        super().__init__()
        self.body = getattr(nn, kind)(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x):
        return self.head(self.body(x.squeeze(1))[0][:, -1])


def recurrent(kind):
    return Recurrent(kind)


class Attending(nn.Module):
    """Attends to what a layer makes of a table that is learned, or of a buffer that moves."""

    def __init__(self, learned, width=64):
        super().__init__()
        self.first, self.between = nn.Linear(64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)
        self.learned, table = learned, torch.randn(4, width)
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, x):
        x = self.first(x.flatten(1))
        keys = self.between(self.table)
        if self.training and not self.learned:
            self.table = 0.5 * self.table + 0.5 * x.detach().mean(0, keepdim=True)
        return self.head((x @ keys.t()).softmax(-1) @ keys + x)


def attending(learned):
    return Attending(learned)


def language(words=11, width=8):
    """Tokens (N, T) to (N, T, V)."""
    return nn.Sequential(nn.Embedding(words, width), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, words))  # fmt: skip


class Narrow(nn.Module):
    """A residual network of few channels; shortcuts are 1x1 convolutions of stride 2."""

    def __init__(self, width=4, out=8, frozen=False):
        super().__init__()
        self.frozen = frozen
        with torch.random.fork_rng(enabled=frozen):  # frozen stems are shared between models
            torch.manual_seed(1) if frozen else None
            stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
            self.stem = nn.Sequential(stem, nn.BatchNorm2d(width))
        if frozen:
            self.stem.requires_grad_(False).eval()
        self.main = nn.Sequential(
            nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out),
            nn.ReLU(), nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(width, out, 1, stride=2)
        self.head = nn.Linear(out, 10)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0)
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.main(x) + self.shortcut(x)).mean((2, 3)))


def narrow(**kwargs):
    return Narrow(**kwargs)
