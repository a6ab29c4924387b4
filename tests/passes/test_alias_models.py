from __future__ import annotations

from textwrap import dedent

from cgo.graph import dump, verify
from cgo.passes.alias_models import AliasModels, find_aliases
from cgo.passes.dedup_inputs import dedup_inputs
from cgo.passes.dedup_stems import dedup_stems
from cgo.passes.merge import merge


def shared_stem(sketch, *models: str):
    graphs = []
    for model in models:
        build = sketch(model)
        x, w = build.input(), build.parameter("stem.weight", 8, 8, content="f00")
        build.out(build.add("stem", "aten.linear.default", x, w))
        graphs.append(build.graph())
    return dedup_stems(dedup_inputs(merge(graphs)))


def test_later_models_of_equal_content_are_aliases_of_the_first():
    contents = {"a": "1", "b": "2", "c": "1", "d": "1", "e": "2", "f": "3"}
    assert find_aliases(contents) == {"c": "a", "d": "a", "e": "b"}
    assert find_aliases({}) == {}


def test_what_only_aliases_need_is_dropped(sketch):
    graph = merge([shared_stem(sketch, "a", "b"), shared_stem(sketch, "c")])
    out = AliasModels({"c": "a"})(graph)
    verify(out)
    assert dump(out) == dump(shared_stem(sketch, "a", "b"))


def test_a_shared_parameter_moves_to_a_model_that_stays(sketch):
    out = AliasModels({"a": "b"})(shared_stem(sketch, "a", "b", "c"))
    verify(out)
    assert dump(out) == dedent("""\
        %a.input = cgo.input(data='digits', leaf='input', size=4, split='train') : f32[4, 8] {b, c}
        %a.stem.weight = cgo.parameter(content='f00', model='b', path='stem.weight', trainable=False, twins=[['c', 'stem.weight']]) : f32[8, 8] {b, c}
        %a.stem = aten.linear.default(%a.input, %a.stem.weight) : f32[4, 8] {b, c}
        b train/4 loss <- %a.stem
        c train/4 loss <- %a.stem""")  # noqa: E501


def test_nothing_to_do_gives_the_same_object(sketch):
    graph = shared_stem(sketch, "a", "b")
    assert AliasModels({})(graph) is graph
    assert AliasModels({"x": "a"})(graph) is graph
