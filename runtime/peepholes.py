"""Small rewrites of generated code, where the plain translation computes too much.

Each takes the `torch.fx` graph of one region, changes it in place and leaves its values as they
are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from cgo.runtime.emitter import item
from cgo.runtime.fused_norms import TOLD_BY_RESULT


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


def norms_with_what_follows(graph: fx.Graph) -> None:
    """A batch norm in a kernel of ours also adds and activates, where nobody else reads it.

    Its form notes in `follow` that it may, and the dtype of its result.
    """
    for norm in [node for node in graph.nodes if "follow" in node.meta]:
        chain = _followers(norm)
        if not chain.nodes:
            continue
        last = chain.nodes[-1]
        with graph.inserting_before(last):
            rest: dict[str, Any] = {"added": chain.added, "activation": chain.activation}
            whole = graph.call_function(norm.target, norm.args, rest)
        whole.meta = dict(last.meta)
        last.replace_all_uses_with(whole)
        for node in (*reversed(chain.nodes), norm):
            graph.erase_node(node)


@dataclass
class _Chain:
    """What a norm takes over: nodes in order, and what these add and how they activate."""

    nodes: list[fx.Node] = field(default_factory=list)
    added: fx.Node | None = None
    activation: str = "none"


def _followers(norm: fx.Node) -> _Chain:
    chain, value = _Chain(), norm
    found: list[fx.Node] = []  # conversions are taken over with what comes behind them
    while len(value.users) == 1 and chain.activation == "none":
        (user,) = value.users
        found.append(user)
        if user.target is torch.Tensor.to:
            if user.args[1] != norm.meta["follow"]:
                break
        elif (other := _added(user, value)) is not None and chain.added is None:
            chain.nodes, chain.added = [*chain.nodes, *found], other
            found = []
        elif (name := _activation(user)) and (name in TOLD_BY_RESULT or chain.added is None):
            chain.nodes, chain.activation = [*chain.nodes, *found], name
        else:
            break
        value = user
    return chain


def _added(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What a node adds to a value, if that is another of its shape and dtype."""
    named = node.kwargs
    if node.target is not torch.ops.aten.add.Tensor or not node.meta.get("alike") or node.args:
        return None
    others = [v for v in (named["self"], named["other"]) if v is not value]
    single = len(others) == 1 and named.get("alpha", 1) == 1
    return others[0] if single and isinstance(others[0], fx.Node) else None


def _activation(node: fx.Node) -> str | None:
    """Our name for an activation."""
    literals = {name: given for name, given in node.kwargs.items() if name != "self"}
    if node.args or "self" not in node.kwargs:
        return None
    return next(
        (name for op, rest, name in _ACTIVATIONS if (node.target, literals) == (op, rest)), None
    )


_ACTIVATIONS: tuple[tuple[object, dict[str, Any], str], ...] = (
    (torch.ops.aten.relu.default, {}, "relu"),
    (torch.ops.aten.relu6.default, {}, "relu6"),
    (torch.ops.aten.hardtanh.default, {"min_val": 0, "max_val": 6}, "relu6"),
    (torch.ops.aten.silu.default, {}, "silu"),
    (torch.ops.aten.gelu.default, {"approximate": "none"}, "gelu"),
    (torch.ops.aten.hardswish.default, {}, "hardswish"),
)


def _ndim(node: fx.Node) -> int | None:
    """The number of dimensions, where lowering noted it."""
    return node.meta.get("ndim")


_SELECT = ("self", "dim", "index")

_REWRITES: tuple[Callable[[fx.Graph], None], ...] = (
    selects_to_unbind,
    linear_before_transpose,
    norms_with_what_follows,
)
