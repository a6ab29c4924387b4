"""Random small graphs: sharing changes no output of any model, in any step."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from support.recipes import RECIPE, RECIPES, assert_equal, build, interpret

from cgo.graph import restrict, verify
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge


@settings(max_examples=300, deadline=None, print_blob=True)
@given(RECIPES)
def test_sharing_changes_no_output(recipes):
    graphs = [build(f"m{index}", *recipe) for index, recipe in enumerate(recipes)]
    before = merge(graphs)
    after = dedup_stems(dedup_inputs(before))
    verify(after)
    assert len(after.nodes) <= len(before.nodes)
    expected = interpret(before, steps=3)
    assert_equal(expected, interpret(after, steps=3))
    assert dedup_stems(dedup_inputs(after)) is after
    # What is left when some models have gone is right too.
    for index in range(len(recipes)):
        model = f"m{index}"
        alone = restrict(after, models=[model])
        verify(alone)
        mine = [{k: v for k, v in step.items() if k[0] == model} for step in expected]
        assert_equal(mine, interpret(alone, steps=3))


@settings(max_examples=100, deadline=None, print_blob=True)
@given(RECIPE, st.integers(2, 4))
def test_equal_models_without_parameters_and_randomness_become_one(recipe, models):
    sources, steps = recipe
    sources = [source for source in sources if source[0] not in ("trained", "random")]
    recipe = ([*sources, ("input",)], steps)
    graphs = [build(f"m{index}", recipe, (), "d") for index in range(models)]
    after = dedup_stems(dedup_inputs(merge(graphs)))
    assert all(len(node.owners) == models for node in after.nodes)
    assert len(after.nodes) <= len(graphs[0].nodes)
