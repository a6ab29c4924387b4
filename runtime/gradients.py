"""Where gradients go: which parameters get one, and which values carry one."""

from __future__ import annotations

from cgo.graph import Graph, ModelId, Node, Ref, TensorType, homes, inputs_of

#: A parameter or buffer: whose, and its path in that module.
Place = tuple[ModelId, str]

#: Operators behind which nothing learns, though their results are floating-point numbers.
_DEAD_ENDS = frozenset(
    """
    aten.detach aten.zeros_like aten.ones_like aten.full_like aten.empty_like aten.rand_like
    aten.randn_like aten.new_zeros aten.new_ones aten.new_full aten.new_empty
    """.split()  # noqa: SIM905
)


def learning_places(graph: Graph) -> frozenset[Place]:
    """The parameters that some loss gives a gradient to, be it zero.

    The others have no gradient at all, and an optimizer leaves them alone. Next to a lane that
    learns, a fused operator would give them one of zeros, and weight decay would move them.
    """
    nodes = {node.name: node for node in graph.nodes}
    losses = [output for output in graph.outputs if output.role == "loss"]
    pending = [o.ref for o in losses if o.program.startswith("train/")]
    seen: set[Ref] = set()
    found: set[Place] = set()
    while pending:
        ref = pending.pop()
        node = nodes[ref.name]
        if ref in seen or not _passes(node, ref.index):
            continue
        seen.add(ref)
        if node.op == "cgo.parameter" and node.keyword("trainable") is True:
            found.update(homes(node))
        pending.extend(inputs_of(node))
    return frozenset(found)


def learning_refs(graph: Graph) -> frozenset[Ref]:
    """The values through which a gradient reaches some parameter, in training as it is written.

    What depends on no trainable parameter requires none, nor do running statistics.
    """
    found: set[Ref] = set()
    for node in graph.nodes:
        learns = node.op == "cgo.parameter" and node.keyword("trainable") is True
        if learns or not found.isdisjoint(inputs_of(node)):
            several = (Ref(node.name, index) for index in range(len(node.types)))
            found.update(ref for ref in several if _passes(node, ref.index))
    return frozenset(found)


def _passes(node: Node, output: int) -> bool:
    """Whether a gradient that arrives at an output goes on to the node's inputs."""
    if node.op == "cgo.batch_norm" and output > 0:  # statistics are written beside the graph
        return False
    return _differentiable(node.types[output]) and node.op.rpartition(".")[0] not in _DEAD_ENDS


def _differentiable(type_: TensorType | None) -> bool:
    return type_ is not None and type_.dtype.startswith(("float", "bfloat", "comp"))
