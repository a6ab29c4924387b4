from __future__ import annotations

import math
from itertools import product

import hypothesis.strategies as st
from hypothesis import example, given, settings

from cgo.passes.balance import Bin, Item, Share, pack

PLENTY = 10**9


def item(work_s, *, held=1, step=0, shares=(), groups=()):
    return Item(work_s, held, step, tuple(shares), frozenset(groups))


def loads(items, shares, bins, where):
    """Seconds of each bin by the definition: every share's home is the best of all choices."""
    hosts = [
        sorted({to for it, to in zip(items, where) if to is not None and index in it.shares})
        for index in range(len(shares))
    ]
    best = None
    for homes in product(*[found or [None] for found in hosts]):
        ends = [0.0] * len(bins)
        for it, to in zip(items, where):
            if to is not None:
                ends[to] += it.work_s / bins[to].speed
        for share, found, home in zip(shares, hosts, homes):
            for to in found:
                computed = share.work_s / bins[to].speed
                ends[to] += computed if to == home else min(computed, share.received_s)
        best = ends if best is None or max(ends) < max(best) else best
    return best


def bound(items, shares, bins):
    used = [shares[index] for index in sorted({i for it in items for i in it.shares})]
    total = sum(it.work_s for it in items) + sum(share.work_s for share in used)
    fastest = max(bin_.speed for bin_ in bins)
    largest = max([it.work_s for it in items] + [share.work_s for share in used])
    return max(total / sum(bin_.speed for bin_ in bins), largest / fastest)


WORK = st.integers(1, 100).map(float)
SHARES = st.lists(
    st.builds(Share, WORK, st.integers(0, 50), st.sampled_from([0.5, 5.0, math.inf])), max_size=3
)
BINS = st.lists(
    st.builds(Bin, st.sampled_from([1.0, 2.0]), st.integers(50, 400)), min_size=1, max_size=3
)


@st.composite
def problems(draw, bins=BINS):
    shares = draw(SHARES)
    numbers = st.sets(st.sampled_from(range(len(shares)))) if shares else st.just(set())
    items = draw(
        st.lists(
            st.builds(
                Item,
                WORK,
                st.integers(0, 100),
                st.integers(0, 100),
                numbers.map(sorted).map(tuple),
                st.frozensets(st.sampled_from("abc")),
            ),
            min_size=1,
            max_size=6,
        )
    )
    return items, shares, draw(bins)


ABC = frozenset("abc")
#: The first item finds room only after others have been moved off the second bin.
MADE_ROOM = (
    [Item(1.0, 0, 51), Item(14.0, 1, 0), Item(1.0, 0, 0, (), ABC), Item(1.0, 0, 0, (), ABC),
     Item(11.0, 57, 0, (), ABC), Item(13.0, 0, 0, (), ABC)],
    [],
    [Bin(1.0, 50), Bin(1.0, 51), Bin(2.0, 101)],
)  # fmt: skip


@settings(max_examples=150, deadline=None, print_blob=True)
@given(problems())
@example(MADE_ROOM)
def test_memory_is_never_exceeded_and_only_what_finds_no_room_is_left_out(problem):
    items, shares, bins = problem
    where = pack(items, shares, bins, bound(items, shares, bins))
    for index, bin_ in enumerate(bins):
        mine = [it for it, to in zip(items, where) if to == index]
        assert held(mine, shares) <= bin_.memory_bytes or not mine
        for it, to in zip(items, where):
            if to is None:
                assert held([*mine, it], shares) > bin_.memory_bytes


def held(items, shares):
    needed = {index for it in items for index in it.shares}
    total = sum(it.held_bytes for it in items) + sum(shares[i].held_bytes for i in needed)
    return total + max((it.step_bytes for it in items), default=0)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    problems(
        st.lists(
            st.builds(Bin, st.sampled_from([1.0, 2.0]), st.just(PLENTY)), min_size=2, max_size=3
        )
    )
)
def test_no_plan_ends_much_earlier(problem):
    items, shares, bins = problem
    found = max(loads(items, shares, bins, pack(items, shares, bins, bound(*problem))))
    best = min(
        max(loads(items, shares, bins, where))
        for where in product(range(len(bins)), repeat=len(items))
    )
    assert best >= bound(*problem) * (1 - 1e-9)
    assert found <= best * 3 / 2 + 1e-9, (found, best)


def two_bins(items, shares=(), memory=PLENTY):
    bins = [Bin(1.0, memory)] * 2
    where = pack(items, shares, bins, bound(items, shares, bins))
    return where, max(loads(items, shares, bins, where))


def test_an_exchange_repairs_what_longest_first_gets_wrong():
    _, makespan = two_bins([item(work) for work in (3, 3, 2, 2, 2)])
    assert makespan == 6  # longest first ends at 7, and no single move helps


def test_equal_groups_stay_together():
    items = [item(1 + index % 3, groups="ab"[index % 2]) for index in range(12)]
    where, _ = two_bins(items)
    assert len({to for it, to in zip(items, where) if "a" in it.groups}) == 1
    assert len({to for it, to in zip(items, where) if "b" in it.groups}) == 1


def test_a_group_too_large_for_its_part_is_split():
    where, makespan = two_bins([item(1, groups="a")] * 10)
    assert sorted(where) == [0] * 5 + [1] * 5
    assert makespan == 5


def test_balance_gives_way_to_company_by_a_tenth_only():
    """10.5 against 9.5 is allowed, 12 against 8 is not."""
    near = [item(3.5, groups="a")] * 3 + [item(9.5)]
    where, makespan = two_bins(near)
    assert (len(set(where[:3])), makespan) == (1, 10.5)
    far = [item(4, groups="a")] * 3 + [item(4)] * 1 + [item(2)] * 2
    where, makespan = two_bins(far)
    assert (len(set(where[:3])), makespan) == (2, 10)


def test_a_share_is_held_once_a_bin():
    share = Share(1.0, held_bytes=60)
    items = [item(1.0, held=10, shares=[0])] * 4
    where, _ = two_bins(items, [share], memory=100)
    assert None not in where  # held four times, it would not fit: 4 x 70 bytes


def test_memory_alone_decides_where_work_is_nothing():
    where, _ = two_bins([item(0.0, held=size) for size in (60, 50, 40, 30, 20)], memory=100)
    assert None not in where  # 60 + 40 and 50 + 30 + 20: only the largest first fills both
