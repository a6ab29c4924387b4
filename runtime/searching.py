"""Whether cuDNN is to time its kernels for a convolution: where planned steps repay it.

Its first guess for a grouped 1x1 convolution of few channels takes up to nine times as long as its
best kernel, for others hardly longer. Timing them takes half a second a shape, forward and
backward, in each process anew, as what it finds lies in a cache of the thread. What was found is
used by every later call of the same shape on that thread, captured ones too; so the search is a
forward and backward of the group, alone, on the thread that will capture the step, before anything
else has run that shape there.

What is found may differ from run to run, and its bits with it, so `Tuning.search` turns it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cgo.runtime.device_profile import DeviceProfile

#: Times the least time of a convolution that the kernels which were found took (H200: 3 to 7), and
#: the most that searching gained there.
_REACHED = 4.0
_MOST_GAIN = 9.0


@dataclass(frozen=True)
class Candidate:
    """A group that cuDNN might be asked to search kernels for.

    Args:
        name: Of the group.
        seconds: Of a step, by the kernel of cuDNN's first guess.
        least_s: What moving its values and computing takes at least.
        shapes: Of convolutions that differ: a group's last part may be narrower.
        known_s: With the kernels that were found, where they were searched for before.
    """

    name: str
    seconds: float
    least_s: float
    shapes: int = 1
    known_s: float | None = None

    @property
    def gain_s(self) -> float:
        """Seconds of a step that are to be expected of it."""
        expected = max(_REACHED * self.least_s, self.seconds / _MOST_GAIN)
        return max(0.0, self.seconds - (expected if self.known_s is None else self.known_s))


def worth_searching(
    candidates: list[Candidate], profile: DeviceProfile, steps: int, budget_s: float
) -> list[str]:
    """The names of groups to search for, in the order of what they gain for what they take.

    Args:
        candidates: Convolutions.
        profile: What the device can do, and what a search takes.
        steps: Planned; they have to repay each search.
        budget_s: Seconds that all of them may take.
    """
    found: list[str] = []
    for candidate in sorted(candidates, key=lambda c: (-c.gain_s / c.shapes, c.name)):
        price = candidate.shapes * profile.search_s
        if steps * candidate.gain_s > price and price <= budget_s:
            found.append(candidate.name)
            budget_s -= price
    return found


def may_search(wanted: bool | None, device: torch.device) -> bool:
    """Whether kernels may be searched for at all.

    Args:
        wanted: `Tuning.search`. None: on a GPU, but where results are to be the same each time.
        device: Where.
    """
    if device.type != "cuda" or wanted is False:
        return False
    fixed = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    return bool(wanted) or not fixed


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Let cuDNN time its kernels for shapes that this thread has not run yet."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
