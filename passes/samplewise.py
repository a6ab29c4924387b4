# ruff: noqa: SIM905  (one word an operator keeps the list readable)
"""Which operators treat each sample of a batch by itself: dimension 0 is the batch, and stays it.

An allow-list with a rule an operator, because a list of exceptions rots: what nobody thought of
counts as mixing samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cgo.graph import Node, TensorType
from cgo.operators import named_arguments
from cgo.passes.sharing import pure


@dataclass(frozen=True)
class Operand:
    """A tensor argument: samples along dimension 0, or a value that is the same for all."""

    type: TensorType
    sampled: bool

    @property
    def ndim(self) -> int:
        """Dimensions, the batch's included."""
        return len(self.type.shape)


@dataclass(frozen=True)
class Call:
    """An operator call; `given` are its arguments by name, operands for references."""

    given: Mapping[str, Any]
    shape: tuple[int, ...]  # of its first output

    @property
    def operands(self) -> list[Operand]:
        """The tensor arguments, in order."""
        return [found for value in self.given.values() for found in _operands(value)]

    @property
    def input(self) -> Operand:
        """The first tensor argument."""
        return self.operands[0]

    def dims(self, name: str, ndim: int) -> list[int]:
        """An argument that names dimensions, counted from the front; none where none is named."""
        value = self.given.get(name)
        if value is None:
            return []
        return [dim % ndim for dim in (value if type(value) is tuple else (value,))]


Rule = Callable[[Call], bool]


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif type(value) is tuple:
        for part in value:
            yield from _operands(part)


def sample_wise(node: Node, given: Callable[[Any], Any], size: int) -> bool:
    """Whether each sample of the node's values depends on that sample of its inputs alone.

    Args:
        node: An operator whose inputs are samples (`size` along dimension 0) or fixed values.
        given: Turns an argument tree with references into one with operands.
        size: Samples in the batch.
    """
    rule = _RULES.get(node.op.split(".")[1]) if node.op.startswith("aten.") else None
    if rule is None or not pure(node):
        return False
    shapes = [type_.shape if type_ is not None else () for type_ in node.types]
    if any(not shape or shape[0] != size for shape in shapes):
        return False
    named = named_arguments(node.op, node.args, dict(node.kwargs))
    return rule(Call({name: given(value) for name, value in named.items()}, shapes[0]))


def _elementwise(call: Call) -> bool:
    """Broadcasting aligns from the right: a fixed value must not reach the batch dimension."""
    ndim = len(call.shape)
    return all(_aligned(operand, ndim) for operand in call.operands)


def _aligned(operand: Operand, ndim: int) -> bool:
    if operand.sampled:
        return operand.ndim == ndim
    return operand.ndim < ndim or operand.type.shape[0] == 1


def _first(least: int, most: int = 99) -> Rule:
    """The first argument is a batch of so many dimensions; all others are fixed."""

    def rule(call: Call) -> bool:
        first, *others = call.operands
        batched = first.sampled and least <= first.ndim <= most
        return batched and not any(operand.sampled for operand in others)

    return rule


def _along(argument: str, added: int = 0) -> Rule:
    """All tensors are batches, and the dimensions that `argument` names are not the batch's."""

    def rule(call: Call) -> bool:
        ndims = {operand.ndim for operand in call.operands}
        if not all(operand.sampled for operand in call.operands) or len(ndims) != 1:
            return False
        dims = call.dims(argument, ndims.pop() + added)
        return bool(dims) and 0 not in dims

    return rule


def _both(*rules: Rule) -> Rule:
    return lambda call: all(rule(call) for rule in rules)


def _running_statistics(call: Call) -> bool:
    return call.given["training"] is False


def _own_statistics(call: Call) -> bool:
    return call.given["use_input_stats"] is True and call.given["running_mean"] is None


def _norm_leaves_batch(call: Call) -> bool:
    return len(call.given["normalized_shape"]) < call.input.ndim


def _pad_leaves_batch(call: Call) -> bool:
    return len(call.given["pad"]) // 2 < call.input.ndim


def _batch_stays_first(call: Call) -> bool:
    return call.dims("dims", call.input.ndim)[:1] == [0]


def _not_transposed(call: Call) -> bool:
    ndim = call.input.ndim
    return 0 not in call.dims("dim0", ndim) + call.dims("dim1", ndim)


def _expand(call: Call) -> bool:
    return call.input.sampled and call.input.ndim == len(call.shape)


def _embedding(call: Call) -> bool:
    table, indices = call.given["weight"], call.given["indices"]
    return indices.sampled and not table.sampled


def _matmul(call: Call) -> bool:
    left, right = call.operands
    if left.sampled and right.sampled:
        return left.ndim == right.ndim >= 3
    batch, fixed = (left, right) if left.sampled else (right, left)
    return fixed.ndim == 2 and batch.ndim >= (2 if left.sampled else 3)


def _addmm(call: Call) -> bool:
    bias, left, right = call.operands
    return _aligned(bias, 2) and not bias.sampled and left.sampled and not right.sampled


def _attention(call: Call) -> bool:
    query, key, value, *mask = call.operands
    batched = all(operand.sampled and operand.ndim >= 3 for operand in (query, key, value))
    same = query.ndim == key.ndim == value.ndim
    return batched and same and all(_aligned(operand, query.ndim) for operand in mask)


_RULES: dict[str, Rule] = {
    name: rule
    for rule, names in (
        (
            _elementwise,
            """
            add sub rsub mul div true_divide floor_divide remainder fmod pow square sqrt rsqrt
            reciprocal neg abs sign exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan
            sinh cosh tanh erf ceil floor round trunc frac clamp clamp_min clamp_max lerp addcmul
            addcdiv maximum minimum nan_to_num eq ne lt le gt ge isnan isinf isfinite logical_and
            logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_not where masked_fill
            relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid log_sigmoid hardsigmoid
            hardswish hardtanh hardshrink softshrink softplus threshold
            alias detach clone contiguous lift_fresh_copy to _to_copy type_as zeros_like ones_like
            full_like dropout feature_dropout alpha_dropout feature_alpha_dropout
            """,
        ),
        (_first(2), "linear prelu mm group_norm"),
        (_first(1), "view reshape _unsafe_view"),
        (_first(3), "convolution conv1d conv_transpose1d avg_pool1d max_pool1d"),
        (_first(3), "adaptive_avg_pool1d upsample_nearest1d upsample_linear1d"),
        (_first(4, 4), "conv2d conv_transpose2d avg_pool2d max_pool2d max_pool2d_with_indices"),
        (_first(4, 4), "adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d"),
        (_first(4, 4), "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d pixel_shuffle"),
        (_first(5, 5), "conv3d conv_transpose3d avg_pool3d max_pool3d adaptive_avg_pool3d"),
        (_both(_first(2), _running_statistics), "batch_norm"),
        (_both(_first(3), _own_statistics), "instance_norm"),
        (_both(_first(2), _norm_leaves_batch), "layer_norm native_layer_norm rms_norm"),
        (_both(_first(2), _pad_leaves_batch), "constant_pad_nd pad"),
        (_both(_first(2), _batch_stays_first), "permute"),
        (_both(_first(2), _not_transposed), "transpose"),
        (_along("start_dim"), "flatten"),
        (_along("dim"), "squeeze cat split split_with_sizes chunk unbind select slice narrow"),
        (_along("dim"), "softmax _softmax log_softmax _log_softmax glu cumsum sum mean amax amin"),
        (_along("dim"), "max min argmax argmin var std logsumexp norm linalg_vector_norm"),
        (_along("dims"), "flip"),
        (_along("dim", added=1), "unsqueeze stack"),
        (_expand, "expand"),
        (_embedding, "embedding"),
        (_matmul, "matmul bmm"),
        (_addmm, "addmm"),
        (_attention, "scaled_dot_product_attention"),
    )
    for name in names.split()
}  # fmt: skip

#: Operators whose `size` says how many samples there are.
SIZED = frozenset("view reshape _unsafe_view expand zeros ones full".split())


def operator(node: Node) -> str:
    """The name of an ATen operator without its overload, or ""."""
    return node.op.split(".")[1] if node.op.startswith("aten.") else ""


def equal_rows(node: Node, operands: list[Operand], size: int) -> bool:
    """Whether a value made of fixed ones is a batch all of whose samples are equal.

    A class token is expanded so; a mask of ones is made so.
    """
    type_ = node.types[0]
    name = operator(node)
    if name not in SIZED or type_ is None or type_.shape[:1] != (size,):
        return False
    if name == "expand":
        (source,) = operands
        return _aligned(source, len(type_.shape))
    return name in ("zeros", "ones", "full")


def flops(node: Node, operands: list[Operand]) -> int:
    """Floating-point operations of the products in a node, a sample; others are not counted."""
    type_, name = node.types[0], operator(node)
    if type_ is None:
        return 0
    outputs = math.prod(type_.shape[1:])
    if name.startswith("conv"):
        return 2 * outputs * math.prod(operands[1].type.shape[1:])
    if name in ("linear", "matmul", "mm", "bmm"):
        return 2 * outputs * operands[0].type.shape[-1]
    if name == "addmm":
        return 2 * outputs * operands[1].type.shape[-1]
    if name == "scaled_dot_product_attention":
        return 4 * outputs * operands[1].type.shape[-2]
    return 0
