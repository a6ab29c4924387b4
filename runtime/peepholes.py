"""Small rewrites of generated code, where the plain translation computes too much.

Each takes the `torch.fx` graph of one region, changes it in place and leaves its values as they
are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from cgo.runtime.emitter import item


def simplify(graph: fx.Graph) -> None:
    """Apply all rewrites."""
    for rewrite in _REWRITES:
        rewrite(graph)


def selects_to_unbind(graph: fx.Graph) -> None:
    """Several `select`s along one axis become one `unbind`.

    The backward of each `select` fills a whole tensor with zeros; that of `unbind` is one `stack`.
    """
    found: dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.select.int:
            given: list[Any] = [*node.args, *map(node.kwargs.get, _SELECT[len(node.args) :])]
            value, axis, index = given
            found[value, axis].append((node, index))
    for (value, axis), selects in found.items():
        if len({index for _, index in selects}) < 2:
            continue
        with graph.inserting_before(selects[0][0]):
            several = graph.call_function(torch.unbind, (value, axis))
        for node, index in selects:
            node.target, node.args, node.kwargs = item, (several, index), {}


def linear_before_transpose(graph: fx.Graph) -> None:
    """A linear layer over what is transposed in its leading axes: the other way round.

    The layer would have to copy its input, and its backward the gradient.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.linear.default or node.kwargs:
            continue
        turned, *rest = node.args
        if not isinstance(turned, fx.Node) or turned.target is not torch.ops.aten.transpose.int:
            continue
        value, *axes = cast("tuple[Any, ...]", turned.args)
        if turned.kwargs or sorted(axes) != [0, 1] or _ndim(turned) != 3:
            continue
        with graph.inserting_before(node):
            layer = graph.call_function(node.target, (value, *rest))
        layer.meta, layer.meta["ndim"] = {}, 3
        node.target, node.args = turned.target, (layer, *axes)


def _ndim(node: fx.Node) -> int | None:
    """The number of dimensions, where lowering noted it."""
    return node.meta.get("ndim")


_SELECT = ("self", "dim", "index")

_REWRITES: tuple[Callable[[fx.Graph], None], ...] = (
    selects_to_unbind,
    linear_before_transpose,
)
