"""Small rewrites of generated code."""

import torch
from torch import fx

from cgo.runtime.peepholes import simplify

ATEN = torch.ops.aten


def written(body, *names):
    graph = fx.Graph()
    graph.output(body(graph, *[graph.placeholder(name) for name in names]))
    return graph


def run(graph, *values):
    return fx.GraphModule(torch.nn.Module(), graph)(*values)


def targets(graph):
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes
            if n.op == "call_function"]  # fmt: skip


def selects(graph, x):
    call = graph.call_function
    return tuple(
        [call(ATEN.select.int, (x, 0, index)) for index in (2, 0)]
        + [call(ATEN.select.int, (x,), {"dim": 0, "index": 1})]
    )


def test_selects_along_one_axis_become_one_unbind():
    x = torch.randn(3, 4)
    expected = run(written(selects, "x"), x)
    graph = written(selects, "x")
    simplify(graph)
    graph.lint()
    assert targets(graph) == ["unbind", "item", "item", "item"]
    assert all(map(torch.equal, run(graph, x), expected))


def test_a_single_select_stays():
    graph = written(lambda g, x: g.call_function(ATEN.select.int, (x, 0, 1)), "x")
    simplify(graph)
    assert targets(graph) == ["select.int"]


def layer(axes, note=3):
    def body(graph, x, weight):
        turned = graph.call_function(ATEN.transpose.int, (x, *axes))
        turned.meta["ndim"] = note
        return graph.call_function(ATEN.linear.default, (turned, weight))

    return body


def test_a_linear_layer_goes_before_the_transpose_of_its_leading_axes():
    x, weight = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    graph = written(layer((0, 1)), "x", "w")
    simplify(graph)
    graph.lint()
    graph.eliminate_dead_code()
    assert targets(graph) == ["linear.default", "transpose.int"]
    expected = torch.nn.functional.linear(x.transpose(0, 1), weight)
    torch.testing.assert_close(run(graph, x, weight), expected)


def test_a_transpose_of_the_features_stays_before_the_layer():
    for body in (layer((1, 2)), layer((0, 1), note=2), layer((0, 1), note=None)):
        graph = written(body, "x", "w")
        simplify(graph)
        assert targets(graph) == ["transpose.int", "linear.default"]
