"""Layouts by cost: own costs against conversions and copies."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cgo.graph import Graph, Node, Output, Ref, TensorType
from cgo.passes.assign_layouts import Option, _Problem, assign_layouts
from cgo.tuning import CHANNELS, LANES, STACKED

IMAGE = (TensorType("float32", (2, 4, 3, 3)),)


def chain(*groups):
    """Three models, one node a group; `groups` names who reads whom: "a", "b a", "c a b"."""
    nodes = [Node(f"m{i}/x", "cgo.input", (), (), IMAGE, frozenset({f"m{i}"})) for i in range(3)]
    last = ""
    for text in groups:
        name, *read = text.split()
        for i in range(3):
            refs = tuple(Ref(f"m{i}/{other}") for other in read) or (Ref(f"m{i}/x"),)
            made = Node(
                f"m{i}/{name}", "aten.op", refs, (), IMAGE, frozenset({f"m{i}"}), None, name
            )
            nodes.append(made)
        last = name
    outputs = [Output(f"m{i}", "train/2", "loss", "", Ref(f"m{i}/{last}")) for i in range(3)]
    return Graph(tuple(nodes), tuple(outputs))


def options(**seconds):
    """Options by layout: `options(lanes=3, stacked=1)`."""
    return [Option(layout, layout, 1 if layout == LANES else 3, s) for layout, s in seconds.items()]


def repacking(convert=1.0, to_lanes=1.0, gather=1.0):
    costs = {"convert": convert, "to lanes": to_lanes}
    return lambda kind, lanes, size: costs.get(kind, gather)


def layouts(assignment):
    return {name: option.layout for name, option in assignment.options.items()}


def test_a_layout_that_is_slower_alone_wins_where_it_saves_conversions():
    graph = chain("a", "b a", "c b")
    own = {
        "a": options(channels=1),
        "b": options(channels=1.5, stacked=1),
        "c": options(channels=1),
    }
    found = assign_layouts(graph, own, repacking(convert=2.0))
    assert layouts(found) == {"a": CHANNELS, "b": CHANNELS, "c": CHANNELS}
    cheap = assign_layouts(graph, own, repacking(convert=0.1))
    assert layouts(cheap)["b"] == STACKED
    assert cheap.repacking_s == pytest.approx(0.2 + 1.1)  # two, and the loss's lanes


def test_a_group_that_would_have_to_gather_stays_a_loop():
    """`b` has its own lanes of `a` in another order: fusing it means to take apart and gather."""
    graph = chain("a", "b a")
    turned = [n for n in graph.nodes if n.group != "b"]
    turned += [n for n in graph.nodes if n.group == "b"][::-1]
    graph = Graph(tuple(turned), graph.outputs)
    own = {"a": options(stacked=1), "b": options(lanes=3, stacked=2)}
    assert layouts(assign_layouts(graph, own, repacking(gather=5.0)))["b"] == LANES
    assert layouts(assign_layouts(graph, own, repacking(gather=0.1, to_lanes=0.1)))["b"] == STACKED


def test_chunks_of_equal_width_hang_together():
    graph = chain("a", "b a")
    own = {
        "a": [Option("f", STACKED, 2, 1.0)],
        "b": [Option("f", STACKED, 3, 1.0), Option("f", STACKED, 2, 1.2)],
    }
    found = assign_layouts(graph, own, repacking())
    assert found.options["b"].width == 2


def test_nothing_to_decide_is_no_error():
    assert assign_layouts(chain("a"), {}, repacking()).options == {}


SECONDS = st.floats(0.1, 5)


@settings(deadline=None, max_examples=60)
@given(
    own=st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=4, max_size=4),
    costs=st.tuples(SECONDS, SECONDS, SECONDS),
)
@example(  # a descent that ends at 10, where 6 would be the best
    own=[(1.0, 1.0, 1.0), (3.0, 1.0, 2.0), (3.0, 2.0, 1.0), (3.0, 1.0, 1.0)], costs=(4.0, 1.0, 1.0)
)
def test_the_result_is_a_local_optimum_as_good_as_its_beginnings(own, costs):
    graph = chain("a", "b a", "c a b", "d c")
    given_options = {
        name: options(lanes=a, stacked=b, channels=c) for name, (a, b, c) in zip("abcd", own)
    }
    moving = repacking(*costs)
    found = assign_layouts(graph, given_options, moving)
    assert total(graph, given_options, moving, found.options) == pytest.approx(found.seconds)
    for name, others in given_options.items():  # no single change helps
        for other in others:
            changed = {**found.options, name: other}
            assert total(graph, given_options, moving, changed) >= found.seconds - 1e-9
    for begin in (
        lambda option: option.seconds,
        lambda option: (option.layout != LANES, option.seconds),
        lambda option: (option.layout == LANES, option.seconds),
    ):
        first = {name: min(others, key=begin) for name, others in given_options.items()}
        assert total(graph, given_options, moving, first) >= found.seconds - 1e-9


def total(graph, given_options, moving, chosen):
    problem = _Problem(graph, given_options, moving)
    problem.chosen = dict(chosen)
    moved = sum(problem._gathering(name) + problem._splitting(name) for name in chosen)
    return sum(option.seconds for option in chosen.values()) + moved
