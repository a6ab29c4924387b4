"""What executing a group should take at least, from its shapes and what the device can do.

Rough, and meant so: they say what is worth measuring, in which order, and stand in for what there
was no time to measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cgo.graph import Node, Ref, TensorType, bytes_of, inputs_of
from cgo.operators import aten
from cgo.runtime.costs import KINDS, Repacking
from cgo.runtime.device_profile import DeviceProfile
from cgo.runtime.emitter import Types, operator_of
from cgo.runtime.precision import float32_products
from cgo.tuning import CHANNELS

_CONVOLUTIONS = frozenset(
    """
    aten.conv1d aten.conv2d aten.conv3d aten.convolution
    aten.conv_transpose1d aten.conv_transpose2d aten.conv_transpose3d
    """.split()  # noqa: SIM905
)
_PRODUCTS = frozenset(
    """
    aten.linear aten.mm aten.bmm aten.matmul aten.addmm aten.baddbmm aten.addmv aten.mv aten.einsum
    """.split()  # noqa: SIM905
)
_RECURRENT = frozenset({"aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"})
_ATTENTION = "aten.scaled_dot_product_attention"

_HEAVY = _CONVOLUTIONS | _PRODUCTS | _RECURRENT | {_ATTENTION}

#: Says of itself that it is a view, and is written where one is not wanted.
_COPIES = frozenset({"aten.contiguous"})


@dataclass(frozen=True)
class Work:
    """What one member of a group does in a forward and backward.

    Args:
        launches: Kernels.
        moved_bytes: Read and written.
        flops: Of products.
        precision: That products are computed in.
    """

    launches: int
    moved_bytes: float
    flops: float
    precision: str

    def seconds(self, members: int, profile: DeviceProfile, *, fused: bool) -> float:
        """The least that so many members take: one by one, or as one operator."""
        if not fused:
            one = profile.seconds(self.moved_bytes, self.flops, self.precision, self.launches)
            return members * one
        moved, flops = members * self.moved_bytes, members * self.flops
        return profile.seconds(moved, flops, self.precision, self.launches)


def work_of(node: Node, types: Types) -> Work:
    """What a member of a group does in a forward and backward."""
    if is_view(node):
        return Work(0, 0.0, 0.0, "float32")
    read = [types[ref] for ref in inputs_of(node)]
    moved = sum(map(bytes_of, [*read, *node.types]))
    flops = _flops(node, read)
    # The backward reads what the forward did and the gradients of what it gave, and writes as
    # much; products are two then.
    return Work(_launches(node), 3.0 * moved, 3.0 * flops, _precision(node))


def is_view(node: Node) -> bool:
    """Whether an operator launches no kernel: it shows the same memory in another shape."""
    overload = aten(node.op)
    return overload is not None and overload.is_view and operator_of(node) not in _COPIES


def is_product(node: Node) -> bool:
    """Whether an operator's time depends on which of many kernels computes it."""
    return operator_of(node) in _HEAVY


def is_convolution(node: Node) -> bool:
    """Whether cuDNN has kernels for an operator that it could time."""
    return operator_of(node) in _CONVOLUTIONS


def view_seconds(nodes: Sequence[Node], layout: str, types: Types, profile: DeviceProfile) -> float:
    """Of a group of views: nothing, but in channels, where another shape is another order."""
    if layout != CHANNELS:
        return 0.0
    moved = 3.0 * len(nodes) * sum(bytes_of(types[ref]) for ref in inputs_of(nodes[0]))
    return profile.seconds(2 * moved, launches=2)


def estimated_repacking(profile: DeviceProfile) -> Repacking:
    """What moving values between layouts should take, forward and backward."""
    lane = 2 * profile.launch_s / _LANES
    byte = 4 / profile.bandwidth  # read and written, twice
    return Repacking(dict.fromkeys(KINDS, lane), dict.fromkeys(KINDS, byte))


#: Lanes that are moved by one kernel, about.
_LANES = 8


def largest_bytes(node: Node, types: Types) -> int:
    """Of the largest value that a node reads or gives; weights count as well."""
    return max((bytes_of(types[ref]) for ref in all_refs(node)), default=0)


def largest_elements(node: Node, types: Types) -> int:
    """Of the largest value that a node reads or gives."""
    found = (types[ref] for ref in all_refs(node))
    return max((math.prod(type_.shape) for type_ in found if type_ is not None), default=1)


def all_refs(node: Node) -> list[Ref]:
    """What a node reads and gives."""
    return [*inputs_of(node), *(Ref(node.name, index) for index in range(len(node.types)))]


def _launches(node: Node) -> int:
    """Kernels forward and backward: a product has two gradients, and a bias another."""
    if is_product(node):
        return 3 + (len(tuple(inputs_of(node))) > 2)
    return 2


def _flops(node: Node, read: Sequence[TensorType | None]) -> float:
    """Of the forward."""
    operator, given = operator_of(node), node.types[0]
    if given is None or len(read) < 2 or read[0] is None or read[1] is None:
        return 0.0
    first, second = read[0].shape, read[1].shape
    outputs = math.prod(given.shape)
    if operator in _CONVOLUTIONS:
        # Of a transposed one, each element of the input meets the weights, not of the output.
        met = math.prod(first) if "transpose" in operator else outputs
        return 2.0 * met * math.prod(second[1:])
    if operator in _RECURRENT:
        return 2.0 * math.prod(first[:-1]) * sum(math.prod(t.shape) for t in read[2:] if t)
    if operator == _ATTENTION:
        return 4.0 * outputs * second[-2]
    if operator in ("aten.addmm", "aten.baddbmm"):
        return 2.0 * outputs * second[-1]
    return 2.0 * outputs * first[-1] if operator in _PRODUCTS else 0.0


def _precision(node: Node) -> str:
    """What products are computed in."""
    given = node.types[0]
    name = node.autocast or ("float32" if given is None else given.dtype)
    if name == "float32":
        return float32_products(convolutions=is_convolution(node))
    return name
