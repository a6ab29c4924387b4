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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cgo.graph import Node, inputs_of
from cgo.runtime.device_profile import DeviceProfile
from cgo.runtime.emitter import Types
from cgo.runtime.estimates import is_convolution, work_of

#: The form that searching is for, and what marks its cost with the kernels that were found.
SEARCHED = "grouped convolution"
FOUND = "/found"

#: Times the least time of grouped 1x1 convolutions that the kernels which were found took, and
#: single ones without a search; seconds of each of their three kernels at least (H200).
_FOUND, _ALONE = 4.0, 3.5
_ALONE_S = 9e-6


@dataclass(frozen=True)
class Candidate:
    """A group that cuDNN might be asked to search kernels for.

    Args:
        name: Of the group.
        seconds: Of a step, as it is executed without.
        found_s: With the kernels that are found: known, or expected.
        shapes: Of convolutions that differ: one a format of images in memory.
    """

    name: str
    seconds: float
    found_s: float
    shapes: int = 1

    @property
    def gain_s(self) -> float:
        """Seconds of a step that are to be expected of it."""
        return max(0.0, self.seconds - self.found_s)


def candidate(
    name: str,
    nodes: Sequence[Node],
    types: Types,
    profile: DeviceProfile,
    *,
    shapes: int,
    found_s: float | None = None,
) -> Candidate | None:
    """A group of 1x1 convolutions as a candidate; of other kernels first guesses are good.

    Args:
        name: Of the group.
        nodes: Its members.
        types: Of all references.
        profile: What the device can do.
        shapes: Convolutions that differ, each to be searched for.
        found_s: Seconds with the kernels that an earlier search found.
    """
    if not is_pixelwise(nodes[0], types):
        return None
    work = work_of(nodes[0], types)
    alone = len(nodes) * max(_ALONE * work.seconds(1, profile, fused=True), 3 * _ALONE_S)
    expected = _FOUND * work.seconds(len(nodes), profile, fused=True)
    return Candidate(name, alone, expected if found_s is None else found_s, shapes)


def is_pixelwise(node: Node, types: Types) -> bool:
    """Whether a node is a convolution over one pixel."""
    inputs = tuple(inputs_of(node))
    weight = types[inputs[1]] if is_convolution(node) and len(inputs) > 1 else None
    return weight is not None and set(weight.shape[2:]) == {1}


def worth_searching(
    candidates: Sequence[Candidate], profile: DeviceProfile, steps: int, budget_s: float
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
