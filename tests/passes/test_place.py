from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.crowd import Candidate, crowd, mixed

from cgo.errors import PlacementError
from cgo.graph import STATE, Output, Ref, bytes_of, inputs_of, verify
from cgo.passes.merge import merge
from cgo.passes.place import Feed, Need, Placement, Target, estimate_needs, place
from cgo.passes.work import estimate_work, training_step

PLENTY = 80 * 2**30


def targets(count, memory=PLENTY, speeds=(1.0,)):
    return [Target(f"gpu{i}", memory, speeds[i % len(speeds)]) for i in range(count)]


def load(graph, needs, placement, target, rate):
    """The seconds of one target, node by node: back from what its models give to what is fed."""
    work, step = estimate_work(graph), training_step(graph)
    mine = {model for model, name in placement.targets.items() if name == target.name}
    fed = {name for name, feed in placement.feeds.items() if target.name in feed.receivers}
    needed = {output.ref.name for output in step.outputs if output.model in mine}
    needed |= {name for name, feed in placement.feeds.items() if feed.home == target.name}
    seconds = 0.0
    for node in reversed(step.nodes):
        if node.name in needed and node.name not in fed:
            needed |= {ref.name for ref in inputs_of(node)}
            seconds += work[node.name] / target.speed
    return seconds + sum(placement.feeds[name].bytes / rate for name in fed & needed)


def held(graph, needs, placement, target):
    """The bytes of one target: what several of its models share is there once."""
    mine = {model for model, name in placement.targets.items() if name == target.name}
    total = sum(needs[model].state_bytes for model in mine)
    for node in graph.nodes:
        here = len(node.owners & mine)
        if node.op in STATE and len(node.owners) > 1 and here > 1:
            total -= (here - 1) * sum(map(bytes_of, node.types))
    total += sum(f.bytes for f in placement.feeds.values() if target.name in f.receivers)
    return total + max((needs[model].step_bytes for model in mine), default=0)


def check(graph, needs, where, placement, rate):
    assert set(placement.targets) | set(placement.unplaced) == set(needs)
    assert not set(placement.targets) & set(placement.unplaced)
    assert all(placement.unplaced.values())
    for target in where:
        assert held(graph, needs, placement, target) <= target.memory_bytes or (
            target.name not in placement.targets.values()
        )
    ends = [load(graph, needs, placement, target, rate) for target in where]
    assert placement.makespan_s == pytest.approx(max(ends), rel=1e-9)
    assert placement.bound_s <= placement.makespan_s * (1 + 1e-9)
    for feed in placement.feeds.values():
        assert feed.home in placement.targets.values()
        assert feed.home not in feed.receivers
        assert feed.receivers


CHAINS = {"a": (64, 512, 32), "b": (256, 8)}
STEMS = st.sampled_from(
    [
        (),
        *[
            tuple((f"{n}{i}", w) for i, w in enumerate(c[:k]))
            for n, c in CHAINS.items()
            for k in (1, 2, 3)
        ],
    ]
)
CROWDS = st.lists(
    st.tuples(STEMS, st.lists(st.sampled_from([4, 64, 512]), min_size=1, max_size=3)),
    min_size=1,
    max_size=8,
).map(lambda rows: [Candidate(f"m{i}", stems, tuple(own)) for i, (stems, own) in enumerate(rows)])
TARGETS = st.lists(
    st.tuples(st.sampled_from([1.0, 1.5, 3.0]), st.sampled_from([10**5, 10**6, 10**7, 10**9])),
    min_size=1,
    max_size=4,
).map(lambda rows: [Target(f"t{i}", memory, speed) for i, (speed, memory) in enumerate(rows)])


@settings(max_examples=80, deadline=None, print_blob=True)
@given(CROWDS, TARGETS, st.sampled_from([1e6, 1e9, 1e10, 1e12]), st.randoms())
def test_every_placement_keeps_its_word(candidates, where, rate, dice):
    graph = crowd(candidates)
    verify(graph)
    needs = estimate_needs(graph)
    placement = place(graph, needs, where, transfer_bytes_per_s=rate)
    check(graph, needs, where, placement, rate)
    shuffled = list(needs.items())
    dice.shuffle(shuffled)
    again = place(graph, dict(shuffled), where[::-1], transfer_bytes_per_s=rate)
    assert again == placement


def test_a_thousand_models_on_eight_devices_are_within_a_tenth_of_the_bound(record_property):
    graph = crowd(mixed(1000))
    dice = random.Random(3)
    needs = {
        model: replace(need, work_s=need.work_s * dice.uniform(1.0, 1.2))
        for model, need in estimate_needs(graph).items()
    }
    work = [need.work_s for need in needs.values()]
    assert max(work) > 100 * min(work)
    placement = place(graph, needs, targets(8))
    assert not placement.unplaced
    assert len(set(placement.targets.values())) == 8
    assert placement.makespan_s <= 1.1 * placement.bound_s
    apart = pieces(graph, placement.targets)
    scattered = {model: f"gpu{index % 8}" for index, model in enumerate(needs)}
    assert apart < pieces(graph, scattered) / 4
    record_property("groups", len({node.group for node in graph.nodes}) - 1)
    record_property("parts of groups", apart)


def pieces(graph, where):
    """On how many devices the groups stand, added up."""
    found = defaultdict(set)
    for node in graph.nodes:
        if node.group is not None:
            found[node.group] |= {where[model] for model in node.owners}
    return sum(map(len, found.values()))


def stemmed(models=2, widths=(2048, 2048, 16), own=(512, 512)):
    """Heads behind one costly stem that gives little."""
    stems = tuple((f"stem{i}", width) for i, width in enumerate(widths))
    return crowd([Candidate(f"m{i}", stems, own) for i in range(models)])


def test_one_device_takes_everything_and_each_shared_node_once():
    graph = stemmed(models=3)
    needs = estimate_needs(graph)
    placement = place(graph, needs, targets(1))
    assert placement.targets == dict.fromkeys(needs, "gpu0")
    assert (placement.feeds, placement.unplaced) == ({}, {})
    assert placement.makespan_s == pytest.approx(sum(estimate_work(graph).values()))
    assert placement.makespan_s == pytest.approx(placement.bound_s)


def wide():
    """Heads so large that their models have to stand apart."""
    return stemmed(own=(2048, 2048, 2048))


def test_a_costly_stem_feeds_the_other_device():
    graph = wide()
    placement = place(graph, estimate_needs(graph), targets(2))
    assert sorted(placement.targets.values()) == ["gpu0", "gpu1"]
    boundary = "stem2/train/32/linear_2"
    assert placement.feeds == {boundary: Feed("gpu0", ("gpu1",), (0,), 32 * 16 * 4)}


def test_a_stem_is_computed_twice_where_copies_are_slow():
    graph = wide()
    needs = estimate_needs(graph)
    placement = place(graph, needs, targets(2), transfer_bytes_per_s=1e6)
    assert sorted(placement.targets.values()) == ["gpu0", "gpu1"]
    assert placement.feeds == {}
    assert placement.makespan_s == pytest.approx(needs["m0"].work_s)


def with_buffer(graph, updated):
    """The same with a buffer that the stem's first layer reads, updated in each step or not."""
    kwargs = {"content": "b", "model": "m0", "path": "b", "twins": (("m1", "b"),)}
    first = next(node for node in graph.nodes if node.name.startswith("stem0/"))
    buffer = replace(
        first, name="b", op="cgo.buffer", args=(), kwargs=tuple(sorted(kwargs.items()))
    )
    count = replace(first, name="b/train/32/add", op="aten.add.Tensor", args=(Ref("b"), 1))
    read = replace(first, args=(*first.args, Ref("b")))
    outputs = [Output(m, "train/32", "update", "b", Ref(count.name)) for m in ("m0", "m1")]
    nodes = [read if node is first else node for node in graph.nodes]
    more = (buffer, count) if updated else (buffer,)
    return replace(graph, nodes=(*more, *nodes), outputs=(*graph.outputs, *outputs * updated))


@pytest.mark.parametrize("updated", [False, True])
def test_what_reads_a_changing_buffer_is_not_fed(updated):
    graph = with_buffer(wide(), updated)
    verify(graph)
    placement = place(graph, estimate_needs(graph), targets(2))
    assert bool(placement.feeds) is not updated


def test_what_reads_a_trained_parameter_or_random_numbers_is_not_fed():
    graph = wide()
    for kwargs in ({"trainable": True}, {"op": "cgo.random"}):
        nodes = tuple(
            _changed(node, kwargs) if node.name == "stem0.weight" else node for node in graph.nodes
        )
        changed = replace(graph, nodes=nodes)
        assert not place(changed, estimate_needs(changed), targets(2)).feeds


def _changed(node, change):
    if "op" in change:
        return replace(node, op=change["op"], kwargs=())
    kwargs = dict(node.kwargs) | change
    return replace(node, kwargs=tuple(sorted(kwargs.items())))


def test_models_of_one_stem_stay_together():
    rows = [Candidate(f"m{i}", ((f"stem{i % 2}", 4096),), (64, 4)) for i in range(8)]
    placement = place(crowd(rows), estimate_needs(crowd(rows)), targets(2))
    homes = [{placement.targets[f"m{i}"] for i in range(8) if i % 2 == odd} for odd in (0, 1)]
    assert sorted(map(sorted, homes)) == [["gpu0"], ["gpu1"]]


def test_models_of_one_architecture_stay_together():
    rows = [Candidate(f"m{i}", (), (64, 64) if i % 2 else (60, 60, 60)) for i in range(12)]
    placement = place(
        crowd(rows), dict.fromkeys((r.model for r in rows), Need(1, 1, 1.0)), targets(2)
    )
    homes = [{placement.targets[f"m{i}"] for i in range(12) if i % 2 == odd} for odd in (0, 1)]
    assert sorted(map(sorted, homes)) == [["gpu0"], ["gpu1"]]


def test_a_fast_device_takes_more():
    needs = {f"m{i:02}": Need(1, 1, 1.0) for i in range(12)}
    placement = place(merge([]), needs, targets(2, speeds=(1.0, 3.0)))
    count = [list(placement.targets.values()).count(name) for name in ("gpu0", "gpu1")]
    assert count == [3, 9]
    assert placement.makespan_s == placement.bound_s == 3.0


def test_what_fits_nowhere_is_left_out_with_the_reason():
    needs = {"big": Need(90, 20, 1.0), "a": Need(50, 40, 1.0), "b": Need(50, 40, 1.0)}
    placement = place(merge([]), needs, [Target("gpu0", 100)])
    assert placement.targets == {"a": "gpu0"}
    assert placement.unplaced == {
        "big": "needs 110 bytes alone; the largest target, 'gpu0', has 100",
        "b": "fits on an empty target, but on none beside the others: on 'gpu0' 40 bytes are "
        "missing; train it in another trial",
    }
    assert placement.makespan_s == placement.bound_s == 1.0


def test_step_memory_counts_once_a_device():
    needs = {f"m{i}": Need(10, 60, 1.0) for i in range(4)}
    assert not place(merge([]), needs, [Target("gpu0", 100)]).unplaced


def test_nothing_to_place():
    assert place(merge([]), {}, targets(2)) == Placement({}, 0.0, 0.0, {}, {})


def test_estimated_needs_count_gradients_and_moments_of_what_learns():
    graph = stemmed(models=1, widths=(10,), own=(4,))
    frozen, trained = 16 * 10 * 4, 10 * 4 * 4
    values = 4 * 32 * (16 + 10 + 4)
    assert estimate_needs(graph)["m0"].state_bytes == frozen + 4 * trained
    needs = estimate_needs(graph, moments={"m0": 0})["m0"]
    assert (needs.state_bytes, needs.step_bytes) == (frozen + 2 * trained, values)
    assert needs.work_s == pytest.approx(sum(estimate_work(graph).values()))


@pytest.mark.parametrize(
    ("needs", "where", "rate", "message"),
    [
        ({}, [], 1.0, "there is no target"),
        ({}, targets(1) * 2, 1.0, "two targets are called 'gpu0'"),
        ({}, [Target("a", 1, 0.0)], 1.0, "target 'a': speed 0.0"),
        ({"m": Need(1, 1, float("nan"))}, targets(1), 1.0, "model 'm' needs"),
        ({}, targets(1), 0.0, "transfer_bytes_per_s is 0.0"),
    ],
)
def test_bad_input_is_refused(needs, where, rate, message):
    with pytest.raises(PlacementError, match=message):
        place(merge([]), needs, where, transfer_bytes_per_s=rate)


def test_a_model_without_a_need_is_refused():
    with pytest.raises(PlacementError, match=r"models \['m0', 'm1'\] of the graph have no need"):
        place(stemmed(), {}, targets(1))
