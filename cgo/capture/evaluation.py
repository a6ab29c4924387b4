"""The evaluation program from the training program's export, which saves an export of its own.

Evaluation mode turns the `training` arguments of a few operators off and stops the counters of
batch norms. A module may do anything else besides, so what comes out is only a guess: it is
validated against the eager module as every capture is, and exported properly where it is wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten

#: Position of the `training` argument.
_SWITCHES: dict[Any, int] = {
    _ATEN.batch_norm.default: 5,
    _ATEN.instance_norm.default: 5,
    _ATEN.dropout.default: 2,
    _ATEN.feature_dropout.default: 2,
    _ATEN.alpha_dropout.default: 2,
    _ATEN.feature_alpha_dropout.default: 2,
}


def in_evaluation_mode(exported: ExportedProgram) -> ExportedProgram:
    """A copy of a training export, as the same module in evaluation mode might be exported."""
    graph = copy.deepcopy(exported.graph_module.graph)
    for node in list(graph.nodes):
        position = _SWITCHES.get(node.target) if node.op == "call_function" else None
        if position is not None and len(node.args) > position:
            if node.target is not _ATEN.batch_norm.default or node.args[3] is not None:
                node.update_arg(position, False)
        elif node.target is _ATEN.add_.Tensor and _counts(node, exported):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    found = copy.copy(exported)
    found._graph_module = fx.GraphModule(exported.graph_module, graph)
    return found


def _counts(node: fx.Node, exported: ExportedProgram) -> bool:
    """Whether a node adds to a batch norm's number of batches."""
    buffers = exported.graph_signature.inputs_to_buffers
    counter = node.args[0]
    name = buffers.get(counter.name, "") if isinstance(counter, fx.Node) else ""
    return name.endswith("num_batches_tracked")
