"""Which groups are measured on a GPU, in which order, and what stands in for the others."""

from collections import Counter
from dataclasses import replace

import pytest
from support.merged import Case
from support.simulated_gpu import GPU, H100, Clock, simulated

from cgo.graph import is_training
from cgo.planner import Planner
from cgo.runtime.choice import LOOP, LOOPED, Rules
from cgo.runtime.cost_table import CostTable
from cgo.runtime.device_profile import prior
from cgo.runtime.emitter import operator_of
from cgo.runtime.estimates import is_product, is_view
from cgo.tuning import Tuning


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    families = ("cnn", "cnn", "cells", "cells", "mlp", "mlp")
    cases = [Case(f"m{n}", family, seed=n) for n, family in enumerate(families)]
    folder = tmp_path_factory.mktemp("plan")
    graph = Planner().plan([case.model() for case in cases], folder).graph_data.graph
    return graph, [case.id for case in cases]


def sizes(graph):
    return Counter(node.group for node in graph.nodes if node.group and is_training(node))


def test_groups_have_their_full_width_on_a_gpu(planned):
    graph, models = planned
    choice = simulated(Clock())(graph, models)
    before = sizes(graph)
    fused = {name: size for name, size in sizes(choice.graph).items() if name in choice.ways}
    assert len(fused) > 10
    assert {name: before[name] for name in fused} == fused
    by_cache = simulated(Clock(), rules=Rules(chunked_bytes=2**10, large_bytes=2**11))
    assert any("/" in name for name in by_cache(graph, models).ways)


def test_a_budget_is_kept_but_for_the_group_that_was_begun(planned):
    graph, models = planned
    clock = Clock(price_s=0.05)
    tuner = simulated(clock, Tuning(most_s=1.0))
    tuner(graph, models)
    ways_of_one = 2 * max(Counter(str(node.group) for node, *_ in clock.asked).values())
    assert tuner.budget.seconds == 1.0
    assert 1.0 <= tuner.budget.spent == clock.now <= 1.0 + 0.05 * ways_of_one


def test_what_there_is_no_time_for_is_what_has_least_to_lose(planned):
    graph, models = planned
    everything, some = Clock(), Clock(price_s=0.05)
    simulated(everything)(graph, models)
    simulated(some, Tuning(most_s=1.0))(graph, models)
    assert 0 < len(some.groups) < len(everything.groups)
    assert some.groups == everything.groups[: len(some.groups)]
    first = next(node for node, *_ in some.asked)
    assert is_product(first)


def test_both_formats_of_a_group_are_measured_before_the_next_group(planned):
    graph, models = planned
    clock = Clock(price_s=0.05)
    choice = simulated(clock, Tuning(most_s=1.0), factors={"last": 0.5})(graph, models)
    assert {last for *_, last in clock.asked} == {False, True}
    assert choice.images_last is True
    other = simulated(Clock(), factors={"last": 2.0})(graph, models)
    assert other.images_last is None


def test_views_are_not_measured_and_may_be_fused(planned):
    graph, models = planned
    clock = Clock()
    choice = simulated(clock)(graph, models)
    assert not any(is_view(node) for node, *_ in clock.asked)
    views = [n for n in choice.graph.nodes if n.group and is_training(n) and is_view(n)]
    assert any(not node.group.endswith(LOOP) for node in views)


def test_what_planned_steps_do_not_repay_is_not_measured(planned):
    graph, models = planned
    long, short = Clock(), Clock()
    simulated(long, Tuning(share=1.0))(graph, models)
    simulated(short, Tuning(share=1.0), steps=2000, profile=replace(H100, measure_s=0.1))(
        graph, models
    )
    assert len(short.groups) < len(long.groups)
    never = Clock()
    choice = simulated(never, steps=0)(graph, models)
    assert never.asked == []
    assert choice.ways  # by estimates


def test_operators_that_only_move_values_are_measured_at_some_sizes(planned):
    graph, models = planned
    clock = Clock()
    simulated(clock)(graph, models)
    relus = Counter(
        (way, size, last) for node, way, size, last in clock.asked
        if operator_of(node) == "aten.relu"
    )  # fmt: skip
    groups = {n.group for n in graph.nodes if operator_of(n) == "aten.relu" and is_training(n)}
    assert len(groups - {None}) > max(relus.values())


def test_nothing_is_measured_twice(planned):
    graph, models = planned
    table = CostTable(None, GPU, key="simulated")
    first, second = Clock(), Clock()
    simulated(first, table=table)(graph, models)
    simulated(second, Tuning(anew=True), table=table)(graph, models)
    assert first.asked
    assert second.asked == []


def test_estimates_are_corrected_by_what_was_measured(planned):
    """Where fused convolutions took ten times their estimate, those not measured will, too."""
    graph, models = planned
    slow = {"grouped convolution": 50.0, "wide convolution": 50.0, "last": 100.0}
    tuner = simulated(Clock(), Tuning(most_s=0.3), factors=slow)
    tuner(graph, models)
    corrections = tuner.measuring
    assert corrections.corrected("unheard of", 2.0) == 2.0
    corrections.note("one", 3.0, 1.0)
    corrections.note("one", 5.0, 1.0)
    assert corrections.corrected("one", 2.0) == 8.0
    corrections.note("one", float("inf"), 1.0)
    assert corrections.corrected("one", 2.0) == 8.0
    chosen = tuner.assignment.options
    convolutions = {n.group for n in graph.nodes if operator_of(n) == "aten.conv2d"}
    assert {o.form for name, o in chosen.items() if name in convolutions} == {LOOPED}


def test_a_device_that_is_in_no_table_is_tuned_as_well(planned):
    graph, models = planned
    unknown = replace(prior("Some GPU", (12, 1), 70), source="measured")
    clock = Clock()
    choice = simulated(clock, profile=unknown)(graph, models)
    assert clock.asked
    assert choice.ways


def test_kernels_are_searched_for_where_that_is_repaid_and_again_by_the_next_process(planned):
    graph, models = planned
    quick = replace(H100, search_s=1e-3)
    table = CostTable(None, GPU, key="simulated")
    slow = {LOOPED: 100.0, "last": 200.0}  # so that what is fused is chosen
    first, second, off, short, fast = (Clock() for _ in range(5))
    choice = simulated(first, profile=quick, table=table, factors=slow)(graph, models)
    assert {form for _, form in first.searched} == {"grouped convolution"}
    simulated(second, profile=quick, table=table, factors=slow)(graph, models)  # remembers
    again = [name for name, _ in second.searched]
    assert again == [str(node.group) for node, *_ in second.asked]
    assert again
    assert {choice.ways[name].form for name in again} == {"grouped convolution"}
    simulated(off, Tuning(search=False), profile=quick, factors=slow)(graph, models)
    simulated(short, Tuning(share=1.0), steps=100, factors=slow)(graph, models)
    loops = {LOOPED: 0.01, "last": 0.01}  # nothing that is found can be faster
    simulated(fast, profile=quick, factors=loops)(graph, models)
    assert off.searched == short.searched == fast.searched == []
