from __future__ import annotations

from dataclasses import replace

import pytest

from cgo.errors import GraphError, PassError
from cgo.graph import Graph
from cgo.passes.alias_models import AliasModels
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge
from cgo.passes.pipeline import run_pipeline


def two_models(sketch) -> Graph:
    graphs = []
    for model in "ab":
        build = sketch(model)
        build.out(build.add("relu", "aten.relu.default", build.input()))
        graphs.append(build.graph())
    return merge(graphs)


def test_each_pass_is_observed_with_its_result(sketch):
    seen = []
    result = run_pipeline(
        two_models(sketch),
        (dedup_inputs, dedup_stems, AliasModels({})),
        lambda name, graph: seen.append((name, len(graph.nodes), graph)),
    )
    assert [(name, nodes) for name, nodes, _ in seen] == [
        ("dedup_inputs", 3),
        ("dedup_stems", 2),
        ("alias_models", 2),
    ]
    assert result is seen[-1][2] is seen[-2][2]


def test_nothing_to_do_gives_the_same_object(sketch):
    graph = run_pipeline(two_models(sketch), (dedup_inputs, dedup_stems))
    assert run_pipeline(graph, (dedup_inputs, dedup_stems)) is graph


def test_a_pass_that_raises_is_named(sketch):
    def broken(graph: Graph) -> Graph:
        raise ValueError("no luck")

    with pytest.raises(PassError, match="pass broken failed: ValueError: no luck") as caught:
        run_pipeline(two_models(sketch), (dedup_inputs, broken))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_result_that_does_not_verify_is_the_pass_fault(sketch):
    def drop_first(graph: Graph) -> Graph:
        return replace(graph, nodes=graph.nodes[1:])

    with pytest.raises(PassError, match=r"pass drop_first failed: GraphError: %a\.relu reads"):
        run_pipeline(two_models(sketch), (drop_first,))


def test_a_pass_that_returns_no_graph_is_named(sketch):
    with pytest.raises(PassError, match="pass forgets_return failed"):
        run_pipeline(two_models(sketch), (forgets_return,))


def forgets_return(graph):
    dedup_inputs(graph)


def test_a_bad_start_is_no_pass_fault(sketch):
    graph = two_models(sketch)
    with pytest.raises(GraphError, match="is not defined before it"):
        run_pipeline(replace(graph, nodes=graph.nodes[1:]), (dedup_inputs,))


def test_an_observer_that_raises_is_no_pass_fault(sketch):
    def observe(name: str, graph: Graph) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="dedup_inputs"):
        run_pipeline(two_models(sketch), (dedup_inputs,), observe)
