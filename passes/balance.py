"""Items to bins of unlike speed and memory: balanced, and what shares something kept together.

Pure arithmetic: `cgo.passes.place` says what items, shares and bins stand for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: How much longer than the bound a plan may take if it keeps more together.
SLACK = 0.10


@dataclass(frozen=True)
class Item:
    """What stands in one bin.

    Args:
        work_s: Seconds of its own at speed 1.
        held_bytes: Its own memory, held all the time.
        step_bytes: Memory while it runs; the largest of a bin's items counts once.
        shares: Numbers of the shares it needs.
        groups: What it would run together with others, by any hashable names.
    """

    work_s: float
    held_bytes: int
    step_bytes: int
    shares: tuple[int, ...] = ()
    groups: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Share:
    """What items of one bin need once: a bin computes it, or receives it from one that does."""

    work_s: float  # at speed 1, where it is computed
    held_bytes: int
    received_s: float = math.inf  # where it is received; infinite: it has to be computed


@dataclass(frozen=True)
class Bin:
    """A device: relative speed, and memory."""

    speed: float
    memory_bytes: int


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Sizes:
    """A problem as arrays: n items, S shares, k bins."""

    def __init__(self, items: Sequence[Item], shares: Sequence[Share], bins: Sequence[Bin]) -> None:
        self.work = np.array([item.work_s for item in items], dtype=np.float64)
        self.held = np.array([item.held_bytes for item in items], dtype=np.int64)
        self.step = np.array([item.step_bytes for item in items], dtype=np.int64)
        self.needs = np.zeros((len(items), len(shares)), dtype=np.float64)
        for row, item in enumerate(items):
            self.needs[row, list(item.shares)] = 1.0
        numbers: dict[str, int] = {}
        for group in sorted({group for item in items for group in item.groups}):
            numbers[group] = len(numbers)
        self.groups = [np.array(sorted(numbers[g] for g in i.groups), dtype=int) for i in items]
        self.group_count = len(numbers)
        self.speed = np.array([bin_.speed for bin_ in bins], dtype=np.float64)
        self.memory = np.array([bin_.memory_bytes for bin_ in bins], dtype=np.int64)
        share_work = np.array([share.work_s for share in shares], dtype=np.float64)
        received = np.array([share.received_s for share in shares], dtype=np.float64)
        self.share_held = np.array([share.held_bytes for share in shares], dtype=np.int64)
        self.computed = share_work[:, None] / self.speed  # seconds, (S, k)
        self.further = np.minimum(self.computed, received[:, None])  # in a bin that is not the home


class Plan:
    """An assignment in the making, and what it costs."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        bins = len(sizes.speed)
        self.members: list[set[int]] = [set() for _ in range(bins)]
        self.work = np.zeros(bins)  # seconds at speed 1, of items alone
        self.held = np.zeros(bins, dtype=np.int64)
        self.step = np.zeros(bins, dtype=np.int64)
        self.hosts = np.zeros((len(sizes.share_held), bins))  # items that need the share
        self.grouped = np.zeros((sizes.group_count, bins), dtype=np.int64)

    def put(self, item: int, to: int, times: int = 1) -> None:
        """Add an item to a bin; with `times` -1 take it out."""
        sizes = self.sizes
        (self.members[to].add if times > 0 else self.members[to].remove)(item)
        before = self.hosts[:, to] > 0
        self.hosts[:, to] += times * sizes.needs[item]
        changed = times * int(sizes.share_held[before != (self.hosts[:, to] > 0)].sum())
        self.held[to] += times * sizes.held[item] + changed
        self.work[to] += times * sizes.work[item]
        self.grouped[sizes.groups[item], to] += times
        if times > 0:
            self.step[to] = max(self.step[to], sizes.step[item])
        else:
            self.step[to] = max((sizes.step[other] for other in self.members[to]), default=0)

    def loads(self) -> Floats:
        """Seconds of each bin, every share's home where it disturbs least."""
        loads = self.work / self.sizes.speed
        for share in np.flatnonzero(self.hosts.any(axis=1)):
            hosts = np.flatnonzero(self.hosts[share])
            computed, further = self.sizes.computed[share], self.sizes.further[share]
            home = hosts[np.argmin(loads[hosts] + computed[hosts])]
            loads[hosts] += further[hosts]
            loads[home] += computed[home] - further[home]
        return loads

    def _sharing(self) -> Floats:
        """Seconds of each share in each bin that does not have it yet, (S, k)."""
        somewhere = self.hosts.any(axis=1, keepdims=True)
        cost = np.where(somewhere, self.sizes.further, self.sizes.computed)
        return np.where(self.hosts == 0, cost, 0.0)

    def added(self, items: Ints) -> Floats:
        """Seconds that each of these items alone would add to each bin, (items, k)."""
        own: Floats = self.sizes.work[items, None] / self.sizes.speed
        return own + self.sizes.needs[items] @ self._sharing()

    def added_together(self, items: Ints) -> Floats:
        """Seconds that all of these items would add to each bin, (k,)."""
        own: Floats = self.sizes.work[items].sum() / self.sizes.speed
        return own + self.sizes.needs[items].max(axis=0) @ self._sharing()

    def released(self, items: Ints, from_: int) -> Floats:
        """Seconds that each of these items alone would take off its bin, (items,)."""
        last = (self.hosts[:, from_] == 1) * self.sizes.further[:, from_]
        own: Floats = self.sizes.work[items] / self.sizes.speed[from_]
        return own + self.sizes.needs[items] @ last

    def fits(self, items: Ints) -> NDArray[np.bool_]:
        """Whether all of these items together fit into the memory of each bin, (k,)."""
        sizes = self.sizes
        needed = sizes.needs[items].max(axis=0) > 0
        shared = sizes.share_held @ ((self.hosts == 0) * needed[:, None])
        step = np.maximum(self.step, sizes.step[items].max())
        fitting: NDArray[np.bool_] = (
            self.held + sizes.held[items].sum() + shared + step <= sizes.memory
        )
        return fitting

    def apart(self, items: Ints) -> Floats:
        """Groups and shares of these items that each bin does not have yet, (k,)."""
        groups = _union([self.sizes.groups[item] for item in items])
        shares = self.sizes.needs[items].any(axis=0)
        new: Floats = (self.grouped[groups] == 0).sum(axis=0) + shares @ (self.hosts == 0)
        return new

    def pieces(self) -> int:
        """How many bins all groups and shares stand in, added up: the fewer, the better kept."""
        return int((self.grouped > 0).sum() + (self.hosts > 0).sum())

    def where(self) -> list[int | None]:
        """The bin of each item; None: it has no place."""
        found: list[int | None] = [None] * len(self.sizes.work)
        for bin_, members in enumerate(self.members):
            for item in members:
                found[item] = bin_
        return found

    def left_out(self) -> int:
        """How many items have no place."""
        return len(self.sizes.work) - sum(map(len, self.members))


def _union(arrays: Sequence[Ints]) -> Ints:
    return arrays[0] if len(arrays) == 1 else np.unique(np.concatenate(arrays))


def pack(
    items: Sequence[Item], shares: Sequence[Share], bins: Sequence[Bin], bound_s: float
) -> list[int | None]:
    """The bin of each item.

    Among the plans tried, those that leave the fewest items out; among them, if any is within
    `SLACK` of the bound, the one that keeps the most together; else the one that ends first.

    Args:
        items: At any order; equal ones are told apart by their place.
        shares: What `Item.shares` counts.
        bins: At least one.
        bound_s: Seconds in which nothing can end earlier.

    Source: clusters by longest processing time first, under a limit that bisection lowers:
    MULTIFIT, Coffman, Garey and Johnson, SIAM J. Comput. 1978; then moves and exchanges.
    """
    sizes = Sizes(items, shares, bins)
    plans = []
    for order in _orders(items, shares):
        plans += _bisect(sizes, order, bound_s)
    return min(plans, key=lambda plan: _score(plan, bound_s)).where()


def _score(plan: Plan, bound_s: float) -> tuple[float, ...]:
    makespan = float(plan.loads().max())
    late = makespan if makespan > bound_s * (1 + SLACK) else 0.0
    return plan.left_out(), late, plan.pieces(), makespan


#: Limits tried for each order of the clusters, and the ratio of limits at which trying ends.
_LIMITS = 4
_CLOSE = 1.005


def _bisect(sizes: Sizes, order: Sequence[Ints], bound_s: float) -> list[Plan]:
    plans: list[Plan] = []
    low, high = bound_s, math.inf
    limit = bound_s * (1 + SLACK)
    while len(plans) < _LIMITS and high > low * _CLOSE:
        plan = _filled(sizes, order, limit)
        _even_out(plan, bound_s)
        _take_in(plan)
        plans.append(plan)
        makespan = float(plan.loads().max())
        high = min(high, makespan)
        if makespan > limit:
            low = limit
        limit = (low + high) / 2
    return plans


def _orders(items: Sequence[Item], shares: Sequence[Share]) -> list[list[Ints]]:
    """Clusters of items with equal shares and groups, in several orders, none of them twice."""
    clusters: dict[object, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        clusters[item.shares, item.groups].append(index)
    found = [sorted(cluster, key=lambda i: (-items[i].work_s, i)) for cluster in clusters.values()]
    work = {cluster[0]: math.fsum(items[i].work_s for i in cluster) for cluster in found}
    family = {
        cluster[0]: max(items[cluster[0]].shares, key=lambda s: shares[s].work_s, default=-1)
        for cluster in found
    }
    total: dict[int, float] = defaultdict(float)
    for cluster in found:
        total[family[cluster[0]]] += work[cluster[0]]
    held = {cluster[0]: max(items[i].held_bytes for i in cluster) for cluster in found}
    keys = (
        lambda c: (-work[c[0]], c[0]),
        lambda c: (-total[family[c[0]]], family[c[0]], -work[c[0]], c[0]),
        lambda c: (-held[c[0]], -work[c[0]], c[0]),
    )
    orders: dict[tuple[int, ...], list[Ints]] = {}
    for key in keys:
        ordered = sorted(found, key=key)
        orders[tuple(c[0] for c in ordered)] = [np.array(c) for c in ordered]
    return list(orders.values())


def _filled(sizes: Sizes, order: Iterable[Ints], limit_s: float) -> Plan:
    """Put each cluster where the most of it is already; one that fits nowhere, item by item."""
    plan = Plan(sizes)
    loads = np.zeros(len(sizes.speed))
    for cluster in order:
        whole = _put(plan, loads, cluster, limit_s)
        for index in range(0 if whole or len(cluster) == 1 else len(cluster)):
            _put(plan, loads, cluster[index : index + 1], limit_s)
    return plan


def _put(plan: Plan, loads: Floats, items: Ints, limit_s: float) -> bool:
    """Give a piece of a cluster its bin; False: not as one piece, or not at all."""
    fits = plan.fits(items)
    added = plan.added_together(items)
    ends = loads + added
    within = np.flatnonzero(fits & (ends <= limit_s))
    if len(within):
        apart = plan.apart(items)
        to = min(within, key=lambda bin_: (apart[bin_], ends[bin_], bin_))
    elif len(items) == 1 and fits.any():
        to = min(np.flatnonzero(fits), key=lambda bin_: (ends[bin_], bin_))
    else:
        return False
    loads[to] += added[to]
    for item in items:
        plan.put(int(item), int(to))
    return True


def _take_in(plan: Plan) -> None:
    """Place what found no room while the plan was filled, where moves have made some since."""
    if plan.left_out():
        loads = plan.loads()
        for item, bin_ in enumerate(plan.where()):
            if bin_ is None:
                _put(plan, loads, np.array([item]), math.inf)


#: Moves and exchanges made in one plan, and candidates looked at for each.
_MOVES = 200
_CANDIDATES = 32

Move = tuple[int, int, int]  # item, from, to


def _even_out(plan: Plan, bound_s: float) -> None:
    """Move items off the bin that ends last; in a plan that is good enough, split nothing more."""
    for _ in range(_MOVES):
        loads = plan.loads()
        pieces = plan.pieces() if loads.max() <= bound_s * (1 + SLACK) else None
        worst = int(np.argmax(loads))
        if loads[worst] <= bound_s or not any(
            _better(plan, moves, loads, pieces) for moves in _candidates(plan, loads, worst)
        ):
            return


def _better(plan: Plan, moves: Sequence[Move], loads: Floats, pieces: int | None) -> bool:
    """Make moves if they fit, the last bins end earlier and there are no more than `pieces`."""
    done: list[Move] = []
    for item, source, _ in moves:
        plan.put(item, source, -1)
    for item, source, to in moves:
        if not plan.fits(np.array([item]))[to]:
            break
        plan.put(item, to)
        done.append((item, source, to))
    if (
        len(done) == len(moves)
        and (pieces is None or plan.pieces() <= pieces)
        and _earlier(plan.loads(), loads)
    ):
        return True
    for item, _, to in done:
        plan.put(item, to, -1)
    for item, source, _ in moves:
        plan.put(item, source)
    return False


def _earlier(loads: Floats, before: Floats) -> bool:
    """Whether the last bin to end ends earlier, or among equals the one before it."""
    for new, old in zip(sorted(loads, reverse=True), sorted(before, reverse=True)):
        if abs(new - old) > 1e-9 * old:
            return bool(new < old)
    return False


def _candidates(plan: Plan, loads: Floats, worst: int) -> Iterator[list[Move]]:
    """Moves off a bin, then exchanges with the bins that end first; promising ones first."""
    members = np.array(sorted(plan.members[worst]))
    ends = np.maximum(
        loads + plan.added(members), loads[worst] - plan.released(members, worst)[:, None]
    )
    ends[:, worst] = math.inf
    for row, to in _smallest(ends, loads[worst]):
        yield [(int(members[row]), worst, to)]
    work, speed = plan.sizes.work, plan.sizes.speed
    for other in map(int, np.argsort(loads, kind="stable")[:_PARTNERS]):
        if other == worst or not plan.members[other]:
            continue
        theirs = np.array(sorted(plan.members[other]))
        gain = work[members, None] - work[theirs]
        ends = np.maximum(loads[worst] - gain / speed[worst], loads[other] + gain / speed[other])
        for row, column in _smallest(ends, loads[worst]):
            yield [(int(members[row]), worst, other), (int(theirs[column]), other, worst)]


#: Bins with which the last one exchanges items.
_PARTNERS = 3


def _smallest(ends: Floats, below: float) -> list[tuple[int, int]]:
    """Places of the smallest values under a limit, smallest first."""
    flat = ends.ravel()
    order = np.argsort(flat, kind="stable")[:_CANDIDATES]
    columns = ends.shape[1]
    return [divmod(int(place), columns) for place in order if flat[place] < below]
