"""Whether a group keeps its members apart: a NaN of one must reach no other.

A kernel that fills blocks of other members with zeros, and multiplies all of them, does not: zero
times NaN is NaN. cuDNN chooses among hundreds of kernels, so on a GPU each way of executing a group
is tried before it is used: some members' values are made NaN, and all that comes of the others,
forward and backward, has to stay finite. A way that fails is none; the group is a loop then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count, islice
from math import comb

import torch
from torch import Tensor

from cgo.graph import Graph, Node
from cgo.passes.assign_layouts import Option
from cgo.runtime.accelerator import without_frames
from cgo.runtime.choice import LOOPED, Way
from cgo.runtime.cost_table import CostTable
from cgo.runtime.costs import Built, Timer
from cgo.runtime.emitter import operator_of, runs
from cgo.runtime.estimates import is_product
from cgo.runtime.measuring import ways_of
from cgo.tuning import CHANNELS, LANES, STACKED

log = logging.getLogger(__name__)

#: Beside products, operators whose fused forms call kernels that work on several members at once.
#: All others read for each element what belongs to it.
_MIXING = {
    *("cgo.batch_norm", "aten.batch_norm", "aten.group_norm", "aten.instance_norm"),
    *("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm"),
    *("aten.bilinear", "aten.addbmm"),
}


def mixes(node: Node) -> bool:
    """Whether forms of a node's operator have to be tried."""
    return is_product(node) or operator_of(node) in _MIXING


def separating_sets(size: int) -> list[frozenset[int]]:
    """Sets of members such that for each two, in either order, one has the first alone.

    Each member gets half of the sets, and no two the same ones: so there are few more than the
    logarithm of their number. (Sperner's families: none of them contains another.)
    """
    sets = next(n for n in count(1) if comb(n, n // 2) >= size)
    codes = list(islice(combinations(range(sets), sets // 2), size))
    found = (frozenset(i for i, code in enumerate(codes) if one in code) for one in range(sets))
    return [members for members in found if members]


def keeps_apart(timer: Timer, nodes: Sequence[Node], way: Way) -> bool | None:
    """Try a way of executing a group; None where it cannot be tried, because it cannot be gone.

    Args:
        timer: Of the graph that the group is of.
        nodes: The group.
        way: No loop.
    """
    built = timer.built(nodes, way)
    if built is None:
        return None
    try:
        return _keeps_apart(built, timer.values(built.given), len(nodes))
    except Exception as error:
        log.debug("%s as %s cannot be tried: %s", nodes[0].op, way, without_frames(error))
        return None


def _keeps_apart(built: Built, values: Sequence[Tensor], size: int) -> bool:
    device = values[0].device
    clean = _computed(built, values, torch.zeros(size, dtype=torch.bool, device=device))
    for members in separating_sets(size):
        bad = torch.tensor([i in members for i in range(size)], device=device)
        for (before, layout), (after, _) in zip(clean, _computed(built, values, bad)):
            whole, found = (_by_member(value, layout, size) for value in (before, after))
            spoilt = (whole.isfinite() & ~found.isfinite()).flatten(1).any(1)
            if bool((spoilt & ~bad).any()):
                return False
    return True


def _computed(built: Built, values: Sequence[Tensor], bad: Tensor) -> list[tuple[Tensor, str]]:
    """Results and gradients that have lanes, each with its layout; some members are all NaN."""
    own = [_poisoned(value, given.layout, bad) for value, given in zip(values, built.given)]
    results = built.function(*own)
    ends = [(r, layout) for r, layout in zip(results, built.layouts) if r.requires_grad]
    if ends:  # what comes back to a member that is NaN is NaN
        seeds = [_poisoned(torch.ones_like(end), layout, bad) for end, layout in ends]
        with torch.autograd.set_multithreading_enabled(False):  # kernels are chosen for each thread
            torch.autograd.backward([end for end, _ in ends], seeds)
    found = [(result.detach(), layout) for result, layout in zip(results, built.layouts)]
    for value, given in zip(own, built.given):
        found.append((value.detach(), given.layout))  # statistics are written in place
        if value.grad is not None:
            found.append((value.grad, given.layout))
    floats = [(value, layout) for value, layout in found if value.is_floating_point()]
    return [(value, layout) for value, layout in floats if layout != LANES]


def _by_member(value: Tensor, layout: str, size: int) -> Tensor:
    """The members' lanes along the first axis, as a view."""
    if layout == STACKED:
        return value.view(size, *value.shape[1:])
    assert layout == CHANNELS
    return value.unflatten(1, (size, -1)).movedim(1, 0)


def _poisoned(value: Tensor, layout: str, bad: Tensor) -> Tensor:
    """A copy in which the lanes of bad members are NaN."""
    copy = value.detach().clone()
    if layout != LANES and copy.is_floating_point():
        _by_member(copy, layout, len(bad))[bad] = float("nan")
    return copy.requires_grad_(value.requires_grad)


@dataclass(frozen=True)
class Separation:
    """Makes loops of groups whose way lets a NaN of one member reach others.

    Args:
        table: Knows what was tried before; trials are added.
        tell: Hears of each way that fails, as JSON values.
    """

    table: CostTable
    tell: Callable[..., None]

    def options(
        self, graph: Graph, options: Mapping[str, Option], timer: Timer
    ) -> Mapping[str, Option]:
        """The options of a graph's groups, with loops where they have to be."""
        found = dict(options)
        for members in runs(graph.nodes):
            name = members[0].group
            if name is None or len(members) < 2 or not mixes(members[0]):
                continue
            option = options.get(name)  # evaluation has none: it takes what applies first
            width = len(members) if option is None else min(option.width, len(members))
            ways = ways_of(members[0])[1:] if option is None else [(option.form, option.layout)]
            sizes = {width, len(members) % width or width} - {1}
            if not all(self._separates(members[:size], ways, timer) for size in sizes):
                found[name] = Option(LOOPED, LANES, 1, 0.0)
        return found

    def _separates(
        self, nodes: Sequence[Node], ways: Sequence[tuple[str, str]], timer: Timer
    ) -> bool:
        """Whether the first way that can be gone keeps members apart: known, or tried now."""
        signature = timer.signature(nodes)
        for form, layout in ways:
            if form == LOOPED:
                return True
            key = f"apart/{form}/{layout}" + ("/last" if timer.marked_last else "")
            known = self.table.get(signature, key, len(nodes))
            if known is None:
                apart = keeps_apart(timer, nodes, Way(form, layout))
                if apart is None:
                    continue
                known = 0.0 if apart else math.inf
                self.table.put(signature, key, len(nodes), known)
                if not apart:
                    operator, own = operator_of(nodes[0]), {"form": form, "layout": layout}
                    self.tell("leaks", operator=operator, members=len(nodes), **own)
            return math.isfinite(known)
        return False
