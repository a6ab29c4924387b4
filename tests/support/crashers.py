"""Models that take their trial's process down, in every way, and never the engine's."""

import ctypes
import os
import signal
import threading

import torch
from torch import nn

#: The ways, and how the engine tells them.
WAYS = {
    "exit 0": "exit code 0, before its models had ended",
    "exit 3": "exit code 3",
    "segfault": "signal SIGSEGV",
    "abort": "signal SIGABRT",
    "kill": "signal SIGKILL",
}


def crash(how):
    """End this process, without a word to Python."""
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(how.partition(" ")[2]))


def company():
    """How many models this trial has; 0 in the engine's process."""
    if "CGO_IN_TRIAL" not in os.environ:
        return 0
    from cgo import trial

    return len(trial._current.models) if trial._current is not None else 1


class Crasher(nn.Module):
    """Crashes in its `after`-th step of a trial of at least `least` models."""

    def __init__(self, how, after=3, least=1):
        super().__init__()
        self.body, self.how, self.after, self.least = nn.Linear(6, 3), how, after, least
        # In its state, so that a trial that goes on crashes at the same step.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.steps.add_(int(self.training))
        if int(self.steps) > self.after and company() >= self.least:
            crash(self.how)
        out = self.body(x)
        return out * 2 if bool(out.sum() > 0) else out


def crasher(how="kill", **kwargs):
    """See `Crasher`."""
    return Crasher(how, **kwargs)


def crashes_while_built(how="segfault"):
    """A factory that crashes in a trial."""
    if company():
        crash(how)
    return nn.Linear(6, 3)


def leaves_a_child():
    """A factory whose trial leaves a process behind that holds all its files."""
    if company() and os.fork() == 0:
        signal.pause()
    if company():
        os._exit(0)
    return nn.Linear(6, 3)


def never_ends():
    """A factory that leaves a thread running in its trial, which Python waits for."""
    if company():
        threading.Thread(target=threading.Event().wait).start()
    return nn.Linear(6, 3)


def plain(hidden=4):
    """Trains like any other."""
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Dropout(0.2), nn.Linear(hidden, 3))


def stemmed(hidden=4):
    """Has a frozen stem that is the same in all of its kind."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        stem = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
    stem.requires_grad_(False)
    return nn.Sequential(stem, nn.Linear(7, hidden), nn.ReLU(), nn.Linear(hidden, 3))
