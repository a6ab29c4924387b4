"""Small modules, each the situation of one public bug report.

`REPORTS[name]` is a dict: `factory` (build it right after `torch.manual_seed(seed)`), `input_shape`
of a sample, `thread` (repository and number), `note` (what is right), `classes` or `target_shape`,
`loss`, `targets` (None, or "some -100").
`data` is a source for `cgo.DataSpec`, with `kwargs={"name": NAME, "samples": 44}`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset


class _Recurrent(nn.Module):
    def __init__(self, cell: nn.RNNBase, features: int, classes: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def gru_bidirectional(hidden: int = 8) -> nn.Module:
    """pytorch/pytorch#134606: no batching rule for aten::gru.input; here with dropout."""
    cell = nn.GRU(6, hidden, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
    return _Recurrent(cell, 2 * hidden, 3)


def batch_norm_mlp(momentum: float | None = 0.1, eps: float = 1e-5) -> nn.Module:
    """pytorch/functorch#273, #384: running statistics are written in place, which vmap refuses."""
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16, eps=eps, momentum=momentum),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def batch_norm_cumulative() -> nn.Module:
    """pytorch/pytorch#194504: BatchNorm1d(momentum=None) cannot be captured for training."""
    return batch_norm_mlp(momentum=None)


class FrozenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.train()

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()  # stays in evaluation mode while the rest trains
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.norm.running_mean.zero_()
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def batch_norm_frozen() -> nn.Module:
    """pytorch/pytorch#156167: export raises KeyError where running_mean is written in forward."""
    return FrozenNorm()


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1  # augmented assignment of a buffer
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)  # and a plain one
        return self.body(x - self.centre)


def buffer_assigned() -> nn.Module:
    """pytorch/pytorch#111676: `self.buffer += x` in forward is refused by export."""
    return Centred()


class Clipped(Centred):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out / out.norm() if out.norm() > 1 else out  # data-dependent: cannot be exported


def failed_export_buffer() -> nn.Module:
    """pytorch/pytorch#172213: after an export that fails, the module itself no longer runs."""
    return Clipped()


def spectral_norm_critic() -> nn.Module:
    """pytorch/pytorch#49643: tracing spectral normalization, whose vectors move at each step."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, stride=2)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(8 * 3 * 3, 1)),
    )


def lazy_mlp() -> nn.Module:
    """pytorch/pytorch#53366: lazy layers draw their weights at the first call, not when built."""
    return nn.Sequential(
        nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.LazyLinear(3)
    )


class GumbelChoice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.choices = nn.ModuleList(
            [nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.Identity()]
        )
        self.logits, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = F.gumbel_softmax(self.logits, tau=1.0, hard=True)
        x = sum(w * choice(x) for w, choice in zip(weights, self.choices))
        return self.head(x.relu().mean((2, 3)))


def gumbel_choice() -> nn.Module:
    """D-X-Y/AutoDL-Projects#14: one hard Gumbel sample a step picks the operator of a supernet."""
    return GumbelChoice()


class InPlaceScan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        out[:, 0] = x[:, 0]
        for t in range(1, x.shape[1]):  # writes into a tensor that began as zeros
            out[:, t] += self.gain * out[:, t - 1].clone() + x[:, t]
        return self.head(out[:, -1])


def in_place_scan() -> nn.Module:
    """pytorch/pytorch#103329: writing into torch.zeros(...) inside vmap raises."""
    return InPlaceScan()


class Reservoir(nn.Module):
    def __init__(self, units: int, radius: float) -> None:
        super().__init__()
        recurrent = torch.randn(units, units) / math.sqrt(units)
        self.register_buffer("recurrent", radius * recurrent)
        self.register_buffer("inward", torch.randn(units, 3))
        self.readout = nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = x.new_empty(*x.shape[:2], len(self.recurrent))
        state = x.new_zeros(len(x), len(self.recurrent))
        for t in range(x.shape[1]):
            state = torch.tanh(x[:, t] @ self.inward.T + state @ self.recurrent.T)
            states[:, t] = state
        return self.readout(states)


def reservoir(units: int = 20, radius: float = 0.9) -> nn.Module:
    """El3ssar/ResDAG#261: many reservoirs (seeds, radii) at once; in-place writes forbid it."""
    return Reservoir(units, radius)


def ignored_targets() -> nn.Module:
    """pytorch/pytorch#90916: targets of -100 (ignore_index) are out of bounds under vmap."""
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


_C, _R = "cross_entropy", "mse_loss"


def _report(factory, input_shape, loss, thread, note, classes=3, target_shape=(1,), targets=None):
    return {
        "factory": factory, "input_shape": input_shape, "loss": loss, "thread": thread,
        "note": note, "classes": classes, "target_shape": target_shape, "targets": targets,
    }  # fmt: skip


REPORTS = {
    "gru_bidirectional": _report(
        gru_bidirectional, (5, 6), _C, "pytorch/pytorch#134606",
        "dropout between layers: own masks, equals solo",
    ),
    "batch_norm_cumulative": _report(
        batch_norm_cumulative, (6,), _C, "pytorch/pytorch#194504",
        "cumulative average: statistics after n steps are plain means",
    ),
    "batch_norm_frozen": _report(
        batch_norm_frozen, (3, 6, 6), _C, "pytorch/pytorch#156167",
        "frozen norm stays in eval, running_mean zero", classes=4,
    ),
    "buffer_assigned": _report(
        buffer_assigned, (6,), _C, "pytorch/pytorch#111676",
        "seen == steps, centre equals solo, evaluation does not move them", classes=2,
    ),
    "failed_export_buffer": _report(
        failed_export_buffer, (6,), _C, "pytorch/pytorch#172213",
        "capture fails; the opaque lane must still run and update buffers", classes=2,
    ),
    "spectral_norm_critic": _report(
        spectral_norm_critic, (3, 8, 8), _R, "pytorch/pytorch#49643",
        "power iteration in training only; _u and _v equal solo",
    ),
    "lazy_mlp": _report(
        lazy_mlp, (6,), _C, "pytorch/pytorch#53366",
        "weights drawn at the first call, before the optimizer is made",
    ),
    "gumbel_choice": _report(
        gumbel_choice, (3, 6, 6), _C, "D-X-Y/AutoDL-Projects#14",
        "one hard sample a step and model; straight-through gradient", classes=4,
    ),
    "in_place_scan": _report(
        in_place_scan, (6, 5), _C, "pytorch/pytorch#103329",
        "in-place writes become functional; equals solo", classes=2,
    ),
    "reservoir": _report(
        reservoir, (6, 3), _R, "El3ssar/ResDAG#261",
        "readouts over equal reservoirs share them; other radii fuse", target_shape=(6, 1),
    ),
    "ignored_targets": _report(
        ignored_targets, (6,), _C, "pytorch/pytorch#90916",
        "mean over the targets that count", classes=4, targets="some -100",
    ),
}  # fmt: skip


def batch(name: str, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of inputs and targets for `REPORTS[name]`."""
    report, draw = REPORTS[name], torch.Generator().manual_seed(seed)
    x = torch.randn((size, *report["input_shape"]), generator=draw)
    if report["loss"] == _R:
        return x, torch.randn((size, *report["target_shape"]), generator=draw)
    y = torch.randint(0, report["classes"], (size,), generator=draw)
    if report["targets"] == "some -100":
        y[torch.randperm(size, generator=draw)[: size // 4]] = -100
    return x, y


def data(name: str, samples: int = 64, seed: int = 0):
    """`(train, validation)` data sets for a `cgo.DataSpec`."""
    splits = batch(name, samples, seed), batch(name, samples // 2, seed + 1)
    return tuple(TensorDataset(*split) for split in splits)
