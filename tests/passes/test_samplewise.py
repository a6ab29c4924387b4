"""Operators that treat samples apart: each listed one is run, on a batch and on its samples."""

import pytest
import torch

from cgo.graph import Node, Ref, TensorType
from cgo.operators import aten
from cgo.passes.samplewise import _RULES, Operand, equal_rows, flops, sample_wise

N = 3


class X:
    """A batch of samples of this shape."""

    def __init__(self, *shape, dtype="float32", batch=True):
        self.shape, self.dtype, self.sampled = ((N, *shape) if batch else shape), dtype, batch

    def value(self):
        if self.dtype == "bool":
            return torch.rand(self.shape) > 0.5
        if self.dtype == "int64":
            return torch.randint(0, 3, self.shape)
        return torch.rand(self.shape) + 0.1


def W(*shape, **kwargs):
    """A fixed value."""
    return X(*shape, batch=False, **kwargs)


B = {"dtype": "bool"}
INT = {"dtype": "int64"}
UNARY = """
    square sqrt rsqrt reciprocal neg abs sign exp exp2 expm1 log log2 log10 log1p sin cos tan asin
    acos atan sinh cosh tanh erf ceil floor round trunc frac nan_to_num isnan isinf isfinite relu
    relu6 leaky_relu elu selu celu gelu silu mish sigmoid log_sigmoid hardsigmoid hardswish
    hardtanh hardshrink softshrink softplus alias detach clone contiguous lift_fresh_copy
    _to_copy zeros_like ones_like
""".split()  # noqa: SIM905
BINARY = "sub rsub mul div remainder fmod eq ne lt le gt ge".split()  # noqa: SIM905

#: (operator with overload, arguments): what the rule has to accept.
ACCEPTED = [
    *((f"{name}.default", (X(4, 2),)) for name in UNARY),
    *((f"{name}.Tensor", (X(4, 2), X(4, 1))) for name in BINARY),
    ("add.Tensor", (X(4, 2), W(2))),
    ("add.Tensor", (X(4, 2), W(1, 4, 2))),
    ("add.Tensor", (W(1, 4, 2), X(4, 2))),
    ("add.Scalar", (X(4), 2.0)),
    ("true_divide.Tensor", (X(4), W())),
    ("floor_divide.default", (X(4), X(4))),
    ("pow.Tensor_Scalar", (X(4), 2)),
    ("clamp.default", (X(4), 0.0, 0.5)),
    ("clamp_min.default", (X(4), 0.5)),
    ("clamp_max.default", (X(4), 0.5)),
    ("lerp.Tensor", (X(4), X(4), W(4))),
    ("addcmul.default", (X(4), X(4), W(4))),
    ("addcdiv.default", (X(4), X(4), W(4))),
    ("maximum.default", (X(4), W(4))),
    ("minimum.default", (X(4), W(4))),
    *((f"logical_{name}.default", (X(4, **B), X(4, **B))) for name in ("and", "or", "xor")),
    ("logical_not.default", (X(4, **B),)),
    ("bitwise_and.Tensor", (X(4, **B), W(4, **B))),
    ("bitwise_or.Tensor", (X(4, **B), W(4, **B))),
    ("bitwise_not.default", (X(4, **B),)),
    ("where.self", (X(4, **B), X(4), W())),
    ("masked_fill.Scalar", (X(4), X(4, **B), 0.0)),
    ("threshold.default", (X(4), 0.5, 0.0)),
    ("to.dtype", (X(4), torch.float64)),
    ("type_as.default", (X(4), W(1))),
    ("full_like.default", (X(4), 2.0)),
    *((f"{name}.default", (X(4, 2), 0.5, False))
      for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")),
    ("linear.default", (X(5, 4), W(2, 4), W(2))),
    ("prelu.default", (X(4), W(4))),
    ("mm.default", (X(4), W(4, 2))),
    ("group_norm.default", (X(4, 3), 2, W(4), W(4))),
    ("view.default", (X(6), (N, 2, -1))),
    ("reshape.default", (X(6), (-1, 2, 3))),
    ("_unsafe_view.default", (X(2, 3), (N, 6))),
    ("convolution.default",
     (X(2, 6, 6), W(3, 2, 3, 3), None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
    ("conv1d.default", (X(2, 6), W(3, 2, 3))),
    ("conv_transpose1d.default", (X(2, 6), W(2, 3, 3))),
    ("avg_pool1d.default", (X(2, 6), (2,))),
    ("max_pool1d.default", (X(2, 6), (2,))),
    ("adaptive_avg_pool1d.default", (X(2, 6), (3,))),
    ("upsample_nearest1d.default", (X(2, 6), (12,))),
    ("upsample_linear1d.default", (X(2, 6), (12,), False)),
    ("conv2d.default", (X(2, 6, 6), W(3, 2, 3, 3), W(3))),
    ("conv_transpose2d.input", (X(2, 6, 6), W(2, 3, 3, 3))),
    ("avg_pool2d.default", (X(2, 6, 6), (2, 2))),
    ("max_pool2d.default", (X(2, 6, 6), (2, 2))),
    ("max_pool2d_with_indices.default", (X(2, 6, 6), (2, 2))),
    ("adaptive_avg_pool2d.default", (X(2, 6, 6), (2, 2))),
    ("_adaptive_avg_pool2d.default", (X(2, 6, 6), (2, 2))),
    ("adaptive_max_pool2d.default", (X(2, 6, 6), (2, 2))),
    ("upsample_nearest2d.default", (X(2, 3, 3), (6, 6))),
    ("upsample_bilinear2d.default", (X(2, 3, 3), (6, 6), False)),
    ("upsample_bicubic2d.default", (X(2, 3, 3), (6, 6), False)),
    ("pixel_shuffle.default", (X(4, 3, 3), 2)),
    ("conv3d.default", (X(2, 4, 4, 4), W(3, 2, 3, 3, 3))),
    ("conv_transpose3d.input", (X(2, 4, 4, 4), W(2, 3, 3, 3, 3))),
    ("avg_pool3d.default", (X(2, 4, 4, 4), (2, 2, 2))),
    ("max_pool3d.default", (X(2, 4, 4, 4), (2, 2, 2))),
    ("adaptive_avg_pool3d.default", (X(2, 4, 4, 4), (2, 2, 2))),
    ("batch_norm.default", (X(4, 2), W(4), W(4), W(4), W(4), False, 0.1, 1e-5, False)),
    ("instance_norm.default", (X(4, 5), W(4), W(4), None, None, True, 0.1, 1e-5, False)),
    ("layer_norm.default", (X(2, 4), (4,), W(4), W(4))),
    ("native_layer_norm.default", (X(2, 4), (4,), W(4), W(4), 1e-5)),
    ("rms_norm.default", (X(2, 4), (4,), W(4))),
    ("constant_pad_nd.default", (X(2, 4), (1, 1), 0.0)),
    ("pad.default", (X(2, 4), (1, 1), "reflect")),
    ("permute.default", (X(2, 4), (0, 2, 1))),
    ("transpose.int", (X(2, 4), 1, -1)),
    ("flatten.using_ints", (X(2, 4), 1)),
    ("squeeze.dim", (X(1, 4), 1)),
    ("cat.default", ((X(2), X(3)), 1)),
    ("split.Tensor", (X(4), 2, 1)),
    ("split_with_sizes.default", (X(4), (1, 3), 1)),
    ("chunk.default", (X(4), 2, -1)),
    ("unbind.int", (X(4), 1)),
    ("select.int", (X(4, 2), 1, -1)),
    ("slice.Tensor", (X(4, 2), 2, 0, 1)),
    ("narrow.default", (X(4), 1, 1, 2)),
    ("softmax.int", (X(4), -1)),
    ("_softmax.default", (X(4), 1, False)),
    ("log_softmax.int", (X(4), -1)),
    ("_log_softmax.default", (X(4), 1, False)),
    ("glu.default", (X(4),)),
    ("cumsum.default", (X(4), 1)),
    ("sum.dim_IntList", (X(4, 2), (1, 2))),
    ("mean.dim", (X(4, 2), (-1,), True)),
    ("amax.default", (X(4, 2), (1,))),
    ("amin.default", (X(4, 2), (1,))),
    ("max.dim", (X(4), 1)),
    ("min.dim", (X(4), 1)),
    ("argmax.default", (X(4), 1)),
    ("argmin.default", (X(4), 1)),
    ("var.dim", (X(4), (1,))),
    ("std.dim", (X(4), (1,))),
    ("logsumexp.default", (X(4), (1,))),
    ("norm.ScalarOpt_dim", (X(4), 2, (1,), True)),
    ("linalg_vector_norm.default", (X(4), 2, (1,))),
    ("flip.default", (X(4, 2), (1, 2))),
    ("unsqueeze.default", (X(4), 1)),
    ("unsqueeze.default", (X(4), -1)),
    ("stack.default", ((X(4), X(4)), 1)),
    ("expand.default", (X(1, 4), (-1, 2, -1))),
    ("embedding.default", (W(4, 5), X(2, **INT))),
    ("matmul.default", (X(2, 4), X(4, 2))),
    ("matmul.default", (X(2, 4), W(4, 5))),
    ("matmul.default", (W(5, 2), X(2, 4))),
    ("bmm.default", (X(2, 4), X(4, 2))),
    ("addmm.default", (W(5), X(4), W(4, 5))),
    ("scaled_dot_product_attention.default", (X(2, 4, 3), X(2, 5, 3), X(2, 5, 3), W(4, 5))),
]  # fmt: skip

#: What mixes samples, or puts another dimension first.
REFUSED = [
    ("add.Tensor", (X(2), W(N, 2))),
    ("add.Tensor", (X(), X(N))),
    ("softmax.int", (X(4), 0)),
    ("softmax.int", (X(4), -2)),
    ("sum.dim_IntList", (X(N), (0,))),
    ("sum.dim_IntList", (X(N), (-2,))),
    ("cumsum.default", (X(4), 0)),
    ("flip.default", (X(4), (0,))),
    ("flip.default", (X(4), (1, -2))),
    ("roll.default", (X(4), (1,), (0,))),
    ("transpose.int", (X(N), 0, 1)),
    ("t.default", (X(N),)),
    ("permute.default", (X(N, 2), (1, 0, 2))),
    ("flatten.using_ints", (X(),)),
    ("unsqueeze.default", (X(4), 0)),
    ("stack.default", ((X(), X(), X()), 0)),
    ("cat.default", ((X(2), W(N, 2)), 1)),
    ("slice.Tensor", (X(4),)),
    ("linear.default", (W(N, 4), X(4))),
    ("linear.default", (X(4), W(N, 4), X())),
    ("linear.default", (X(), W(N, N))),
    ("matmul.default", (X(N), X(4))),
    ("mm.default", (W(N, N), X(4))),
    ("conv2d.default", (X(6, 6), W(N, N, 3, 3))),
    ("max_pool2d.default", (X(6, 6), (2, 2))),
    ("batch_norm.default", (X(4), W(4), W(4), W(4), W(4), True, 0.1, 1e-5, False)),
    ("batch_norm.default", (X(4), W(4), W(4), None, None, True, 0.1, 1e-5, False)),
    ("layer_norm.default", (X(4), (N, 4))),
    ("constant_pad_nd.default", (X(4), (0, 0, 1, -1), 0.0)),
    ("max.default", (X(4),)),
    ("argmax.default", (X(4),)),
    ("sort.default", (X(4), 0)),
    ("dropout.default", (X(4), 0.5, True)),
    ("bernoulli.p", (X(4), 0.5)),
    ("embedding.default", (X(4), X(2, **INT))),
]  # fmt: skip


def tree(argument, change):
    if type(argument) is tuple:
        return tuple(tree(item, change) for item in argument)
    return change(argument)


def described(op, args, values):
    """The node of a call, and what turns its references into operands."""
    result = aten(f"aten.{op}")(*values)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    types = tuple(TensorType("float32", tuple(one.shape)) for one in outputs)
    operands = {}

    def refer(argument):
        if not isinstance(argument, X):
            return str(argument) if isinstance(argument, torch.dtype) else argument
        name = f"x{len(operands)}"
        operands[name] = Operand(TensorType(argument.dtype, argument.shape), argument.sampled)
        return Ref(name)

    node = Node("n", f"aten.{op}", tree(args, refer), (), types, frozenset("a"))

    def given(argument):
        return tree(argument, lambda one: operands[one.name] if type(one) is Ref else one)

    return node, given, list(operands.values()), outputs


def names(cases):
    return [f"{op}-{index}" for index, (op, _) in enumerate(cases)]


@pytest.mark.parametrize(("op", "args"), ACCEPTED, ids=names(ACCEPTED))
def test_a_listed_operator_gives_each_sample_what_it_gives_it_in_another_order(op, args):
    torch.manual_seed(0)
    tensors = []

    def make(argument):
        if isinstance(argument, X):
            tensors.append((argument, argument.value()))
            return tensors[-1][1]
        return argument

    values = tree(args, make)
    node, given, _, outputs = described(op, args, values)
    assert sample_wise(node, given, N)
    order = torch.tensor([2, 0, 1])
    turned = {id(value): value[order] for x, value in tensors if x.sampled}
    again = aten(f"aten.{op}")(*tree(values, lambda one: turned.get(id(one), one)))
    again = again if isinstance(again, (tuple, list)) else (again,)
    for one, other in zip(outputs, again, strict=True):
        torch.testing.assert_close(other, one[order], equal_nan=True)


@pytest.mark.parametrize(("op", "args"), REFUSED, ids=names(REFUSED))
def test_what_mixes_samples_is_refused(op, args):
    values = tree(args, lambda one: one.value() if isinstance(one, X) else one)
    node, given, _, _ = described(op, args, values)
    assert not sample_wise(node, given, N)


def test_every_listed_operator_is_tried():
    assert set(_RULES) == {op.partition(".")[0] for op, _ in ACCEPTED}


def test_operators_of_ours_are_refused():
    type_ = TensorType("float32", (N, 4))
    node = Node("n", "cgo.batch_norm", (Ref("x"),), (), (type_, type_, type_), frozenset("a"))
    assert not sample_wise(node, lambda argument: Operand(type_, True), N)


@pytest.mark.parametrize(
    ("op", "args", "equal"),
    [
        ("expand.default", (W(1, 4), (N, 4)), True),
        ("expand.default", (W(4), (N, 4)), True),
        ("expand.default", (W(N, 1), (N, 4)), False),
        ("ones.default", ((N, 2),), True),
        ("ones.default", ((2, N),), False),
        ("add.Scalar", (W(N, 4), 1), False),
    ],
)
def test_batches_of_equal_samples(op, args, equal):
    values = tree(args, lambda one: one.value() if isinstance(one, X) else one)
    node, _, operands, _ = described(op, args, values)
    assert equal_rows(node, operands, N) is equal


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("linear.default", (X(5, 4), W(2, 4)), 2 * 5 * 4 * 2),
        ("conv2d.default", (X(2, 6, 6), W(3, 2, 3, 3)), 2 * 3 * 4 * 4 * 2 * 9),
        ("addmm.default", (W(5), X(4), W(4, 5)), 2 * 4 * 5),
        ("matmul.default", (X(2, 4), W(4, 5)), 2 * 2 * 4 * 5),
        ("scaled_dot_product_attention.default", (X(2, 4, 3), X(2, 5, 3), X(2, 5, 3)),
         4 * 2 * 4 * 3 * 5),
        ("relu.default", (X(4),), 0),
    ],
)  # fmt: skip
def test_operations_a_sample(op, args, expected):
    values = tree(args, lambda one: one.value() if isinstance(one, X) else one)
    node, _, operands, _ = described(op, args, values)
    assert flops(node, operands) == expected
