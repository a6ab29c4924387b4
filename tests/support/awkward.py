"""Modules and data that cannot be planned, each for a reason of its own."""

import threading
import time

import torch
from support import small
from torch import nn


class Awkward(nn.Module):
    """`how` says what goes wrong, in planning."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = nn.Linear(6, 3), how
        if how == "unhashable":
            self.register_buffer("mask", torch.eye(3).to_sparse())
        if how == "uncopyable":
            self.lock = threading.Lock()
        if how == "lazy":
            self.head = nn.LazyLinear(3)

    def forward(self, x):
        if self.how == "exits":
            raise SystemExit(5)
        out = self.body(x)
        if self.how == "unhashable":
            out = out @ self.mask.to_dense()
        return self.head(out) if self.how == "lazy" else out

    def _fails(self, what):
        if self.how == what:
            raise RuntimeError(f"no {what}")

    def __repr__(self):
        self._fails("repr")
        return super().__repr__()

    def named_parameters(self, *args, **kwargs):
        self._fails("named_parameters")
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args, **kwargs):
        self._fails("named_buffers")
        return super().named_buffers(*args, **kwargs)

    def state_dict(self, *args, **kwargs):
        self._fails("state_dict")
        return super().state_dict(*args, **kwargs)

    def modules(self):
        self._fails("modules")
        return super().modules()


#: What goes wrong; a module that cannot be printed is trained nevertheless.
WAYS = (
    "unhashable", "uncopyable", "lazy", "exits", "repr", "named_parameters", "named_buffers",
    "state_dict", "modules",
)  # fmt: skip


def awkward(how):
    """See `Awkward`."""
    return Awkward(how)


def interrupts():
    raise KeyboardInterrupt


#: How often the slow source was called.
OPENED = []


def bad_points():
    """A source that fails each time it is called."""
    OPENED.append(1)
    raise OSError("no such table")


def endless(seconds=600.0):
    """A factory that does not return."""
    time.sleep(seconds)
    return small.mlp()


class Optimizer(torch.optim.SGD):
    """Refuses the small parameter that others are estimated by."""

    def __init__(self, parameters, **kwargs):
        parameters = list(parameters)
        if tuple(parameters[0].shape) == (16, 16):
            raise ValueError("too small")
        super().__init__(parameters, **kwargs)
