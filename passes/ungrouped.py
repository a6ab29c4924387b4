"""Why nodes stand in no group, for `cgo explain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cgo.graph import Graph, Node, Ref, format_argument, format_type
from cgo.operators import named_arguments
from cgo.passes.batch_operators import BatchOperators, Operand, Signature, operators, signatures
from cgo.passes.sharing import argument_key
from cgo.passes.unmerged import Family

OPTIONS = "left out by the options"
ORDER = "its inputs are not ready together with those of its kind"
WIDTH = "groups of its kind are as wide as the options allow"
SHARED = "computed once for all its models"
ALONE = "no other node has this operator"


def ungrouped(graph: Graph, options: BatchOperators) -> tuple[Family, ...]:
    """Families of operator nodes that are in no group, by operator and reason, largest first.

    Args:
        graph: One program of a graph that `batch_operators` has gone over.
        options: The pass that went over it.
    """
    nodes = operators(graph)
    found = signatures(graph, nodes)
    kinds = Counter(found)
    nodes_of = dict(zip(reversed(found), reversed(nodes)))  # the first of each kind
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for node, signature in zip(nodes, found):
        if node.group is not None:
            continue
        if not options.allows(node):
            reason = OPTIONS
        elif kinds[signature] > 1:
            reason = ORDER if options.max_width is None else WIDTH
        elif len(node.owners) > 1:
            reason = SHARED
        else:
            others = [other for other in nodes_of if other.op == node.op and other != signature]
            reason = _difference(node, signature, others, nodes_of)
        counts[node.op, reason] += 1
        examples.setdefault((node.op, reason), node.name)
    return tuple(
        Family(op, count, reason, examples[op, reason])
        for (op, reason), count in counts.most_common()
    )


def _difference(
    node: Node,
    signature: Signature,
    others: Sequence[Signature],
    nodes_of: Mapping[Signature, Node],
) -> str:
    """What keeps the node from the kind that is most like it."""
    if not others:
        return ALONE
    found = [_literals(node, nodes_of[o]) + _operands(signature, o) for o in others]
    fewest = min(found, key=len)
    return fewest[0] if fewest else "its results differ in dtype or shape"


def _literals(node: Node, other: Node) -> list[str]:
    """Literal arguments that differ."""
    mine, theirs = (named_arguments(n.op, n.args, dict(n.kwargs)) for n in (node, other))
    found = []
    for name in mine:
        refs: tuple[list[Ref], list[Ref]] = [], []
        keys = argument_key(mine[name], refs[0]), argument_key(theirs.get(name), refs[1])
        if keys[0] != keys[1]:
            values = [_show(value) for value in (mine[name], theirs.get(name))]
            found.append(f"{name} {values[0]}, others {values[1]}")
    return found


def _show(value: object) -> str:
    """A literal, or that a tensor stands there."""
    if isinstance(value, Ref):
        return "a tensor"
    return format_argument(value)  # type: ignore[arg-type]


def _operands(mine: Signature, other: Signature) -> list[str]:
    """Whatever else differs, but for results."""
    found = [
        f"input {place} is {_show_operand(one)}, others' {_show_operand(another)}"
        for place, (one, another) in enumerate(zip(mine.inputs, other.inputs))
        if one != another
    ]
    if mine.autocast != other.autocast:
        found.append(f"autocast {mine.autocast}, others {other.autocast}")
    if mine.data != other.data:
        found.append("trains on other data")
    if mine.programs != other.programs:
        found.append("runs in other programs")
    return found


def _show_operand(operand: Operand) -> str:
    kind = {True: "trained", False: "frozen", None: operand.kind.removeprefix("cgo.")}
    words = [kind[operand.trained], format_type(operand.type)]
    return " ".join(word for word in words if word)
