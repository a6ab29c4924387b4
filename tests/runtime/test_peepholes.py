"""Small rewrites of generated code."""

import pytest
import torch
from torch import fx

from cgo.runtime.fused_norms import trained
from cgo.runtime.peepholes import simplify
from cgo.runtime.triton_kernels import usable

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


def normalised(graph, x, *parameters):
    """A norm as its form writes it, of the dtype that it notes."""
    node = graph.call_function(trained, (x, *parameters, 0.1, 1e-5))
    node.meta["follow"] = torch.float64
    return node


def plus(graph, value, other, **more):
    node = graph.call_function(ATEN.add.Tensor, (), {"self": other, "other": value, **more})
    node.meta["alike"] = True
    return node


def activated(graph, value, name="relu", **more):
    return graph.call_function(getattr(ATEN, name).default, (), {"self": value, **more})


def cast(graph, value, dtype=torch.float64):
    return graph.call_function(torch.Tensor.to, (value, dtype))


PARAMETERS = ("x", "w", "b", "mean", "var", "added")
CHAINS = {
    "relu": (lambda g, n, a: activated(g, n), 1),
    "added": (lambda g, n, a: plus(g, n, a), 1),
    "added, relu": (lambda g, n, a: activated(g, plus(g, n, a, alpha=1)), 1),
    "between autocasts": (
        lambda g, n, a: cast(g, activated(g, cast(g, plus(g, cast(g, n), a)))),
        2,
    ),
    "relu6": (lambda g, n, a: activated(g, n, "hardtanh", min_val=0.0, max_val=6.0), 1),
    "gelu": (lambda g, n, a: activated(g, n, "gelu", approximate="none"), 1),
    "other bounds": (lambda g, n, a: activated(g, n, "hardtanh", min_val=-1, max_val=1), 2),
    "gelu by tanh": (lambda g, n, a: activated(g, n, "gelu", approximate="tanh"), 2),
    "added, then what needs its argument": (lambda g, n, a: activated(g, plus(g, n, a), "silu"), 2),
    "twice itself": (lambda g, n, a: plus(g, n, n), 2),
    "a multiple": (lambda g, n, a: plus(g, n, a, alpha=2), 2),
    "in another dtype": (lambda g, n, a: activated(g, cast(g, n, torch.float32)), 3),
    "added twice": (lambda g, n, a: plus(g, plus(g, n, a), a), 2),
    "two activations": (lambda g, n, a: activated(g, activated(g, n), "silu"), 2),
    "read twice": (lambda g, n, a: (activated(g, n), plus(g, n, a)), 3),
}


@pytest.mark.skipif(not usable(torch.device("cpu"), True), reason="no interpreter of Triton")
@pytest.mark.parametrize("name", CHAINS)
def test_a_norm_takes_over_what_follows(name):
    body, calls = CHAINS[name]

    def whole(graph, *given):
        found = body(graph, normalised(graph, *given[:5]), given[5])
        return found if isinstance(found, tuple) else (found,)

    def values():
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
        pairs = [torch.rand(2, generator=generator, dtype=torch.float64) for _ in range(4)]
        return [drawn[0], *pairs, drawn[1]]

    expected, before = run(written(whole, *PARAMETERS), *(left := values())), left
    graph = written(whole, *PARAMETERS)
    simplify(graph)
    graph.lint()
    assert len(targets(graph)) == calls
    found, after = run(graph, *(right := values())), right
    for ours, theirs in zip((*found, *after), (*expected, *before), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_sum_of_two_norms_is_taken_over_by_the_first():
    def body(graph, *given):
        left, right = normalised(graph, *given[:5]), normalised(graph, *given[5:])
        return activated(graph, plus(graph, right, left))

    names = [f"{name}{side}" for side in (0, 1) for name in PARAMETERS[:5]]
    graph = written(body, *names)
    simplify(graph)
    graph.lint()
    assert targets(graph) == ["trained", "trained"]
    *_, other, norm, _ = graph.nodes
    assert norm.kwargs == {"added": other, "activation": "relu"}
    assert [str(argument) for argument in norm.args[:5]] == names[:5]


def test_a_norm_that_may_not_takes_nothing_over():
    def body(graph, *given):
        norm = normalised(graph, *given)
        norm.meta.clear()
        return activated(graph, norm)

    graph = written(body, *PARAMETERS[:5])
    simplify(graph)
    assert targets(graph) == ["trained", "relu.default"]
