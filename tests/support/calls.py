"""At least one call for every fused form, in every layout that it takes."""

from support.fused import Call, T

from cgo.graph import Symbol

X4 = T((2, 4, 6, 6))
X3 = T((2, 4, 8))
X2 = T((5, 4))
B4 = T((4,))
ROW = T((3, 7, 6))
DOUBLE = Symbol("dtype", "float64")


def convolution(op, x, weight, *rest, form="grouped convolution", **given):
    return Call(f"aten.{op}", (x, weight, *rest), form, **given)


CONVOLUTIONS = [
    convolution("conv2d.default", X4, T((3, 4, 3, 3)), T((3,)), (1, 1), (1, 1)),
    convolution("conv2d.default", X4, T((3, 4, 3, 3)), None, (2, 2), channels=(0,)),
    convolution("conv2d.default", X4, T((8, 2, 3, 3)), None, (1, 1), (2, 2), (2, 2), 2),
    convolution("conv2d.default", X4, T((4, 1, 3, 3)), T((4,)), (1, 1), (1, 1), (1, 1), 4),
    convolution("conv2d.default", X4, T((4, 1, 3, 3)), None, (1, 1), (1, 1), (1, 1), 4, share=(0,)),
    convolution("conv2d.padding", X4, T((3, 4, 3, 3)), None, (1, 1), "same"),
    convolution("conv2d.default", X4, T((3, 4, 1, 1)), T((3,)), form="product of pixels"),
    convolution("conv2d.default", X4, T((3, 4, 1, 1)), form="product of pixels", channels=(0,)),
    convolution(
        "conv2d.padding", X4, T((3, 4, 1, 1)), None, (1, 1), "same", form="product of pixels"
    ),
    convolution("conv2d.default", X4, T((3, 4, 1, 1)), None, (2, 2)),
    convolution("conv1d.default", X3, T((3, 4, 3)), T((3,)), (2,), (1,), channels=(0,)),
    convolution("conv3d.default", T((2, 2, 3, 4, 4)), T((3, 2, 2, 2, 2)), T((3,))),
    convolution("conv_transpose1d.default", X3, T((4, 3, 3)), T((3,)), (2,), (1,), (1,)),
    convolution("conv_transpose2d.input", X4, T((4, 2, 3, 3)), T((4,)), (2, 2), (1, 1), (1, 1), 2),
    convolution("conv_transpose2d.input", X4, T((4, 3, 3, 3)), None, (2, 2), share=(0,)),
    convolution(
        "conv2d.default",
        X4,
        T((3, 4, 3, 3)),
        T((3,)),
        (2, 2),
        form="grouped convolution, reformatted",
    ),
    convolution(
        "conv2d.padding",
        X4,
        T((3, 4, 1, 1)),
        None,
        (1, 1),
        "same",
        channels=(0,),
        form="grouped convolution, reformatted",
    ),
    convolution(
        "conv2d.default",
        T((1, 2, 3, 3)),
        T((2, 2, 1, 1)),
        T((2,)),
        (2, 2),
        form="grouped convolution in one kernel",
    ),
    convolution("conv2d.default", X4, T((3, 4, 1, 1)), T((3,)), form="products of channels"),
    convolution(
        "conv2d.default", X4, T((3, 4, 1, 1)), None, channels=(0,), form="products of channels"
    ),
    convolution(
        "conv2d.default", X4, T((3, 4, 3, 3)), T((3,)), form="wide convolution", share=(0,)
    ),
    convolution("conv1d.default", X3, T((3, 4, 3)), None, form="wide convolution", share=(0,)),
    convolution(
        "conv2d.default", X4, T((3, 4, 3, 3)), T((3,)), form="folded convolution", share=(1, 2)
    ),
    convolution("conv2d.default", X4, T((3, 4, 3, 3)), form="folded convolution", share=(1,)),
]

LINEAR = [
    Call("aten.linear.default", (X2, T((3, 4)), T((3,))), "batched linear"),
    Call("aten.linear.default", (X2, T((3, 4))), "batched linear", channels=(0,)),
    Call("aten.linear.default", (T((2, 3, 4)), T((3, 4)), T((3,))), "batched linear"),
    Call("aten.linear.default", (T((4,)), T((3, 4)), T((3,))), "batched linear"),
    Call("aten.linear.default", (X2, T((3, 4)), T((3,))), "wide linear", share=(0,)),
    Call("aten.linear.default", (T((2, 3, 4)), T((3, 4)), T((3,))), "wide linear", share=(0,)),
    Call("aten.linear.default", (X2, T((3, 4)), T((3,))), "folded linear", share=(1, 2)),
    Call("aten.mm.default", (X2, T((4, 3))), "batched product"),
    Call("aten.mm.default", (X2, T((4, 3))), "batched product", share=(1,)),
    Call("aten.bmm.default", (T((3, 2, 4)), T((3, 4, 5))), "batched product"),
    Call("aten.matmul.default", (T((2, 3, 5, 4)), T((4, 6))), "batched product"),
    Call("aten.matmul.default", (T((5, 4)), T((3, 4, 6))), "batched product", share=(0,)),
    Call("aten.matmul.default", (T((5, 4)), T((4,))), "vmap"),
    Call("aten.addmm.default", (T((3,)), X2, T((4, 3))), "batched addmm"),
    Call("aten.addmm.default", (T((5, 3)), X2, T((4, 3))), "batched addmm",
         kwargs={"alpha": 2, "beta": 3}),
]  # fmt: skip

STATISTICS = (T((4,), trained=False), T((4,), "positive", trained=False))
NORMS = [
    Call("cgo.batch_norm", (X4, B4, B4, *STATISTICS, 0.3, 1e-5), "batch norm over channels"),
    Call("cgo.batch_norm", (X4, B4, B4, *STATISTICS, 0.3, 1e-5), "batch norm over channels",
         channels=(0,)),
    Call("cgo.batch_norm", (X2, None, None, *STATISTICS, 0.1, 1e-3), "batch norm over channels"),
    Call("cgo.batch_norm", (X3, B4, B4, *STATISTICS, 0.1, 1e-5), "batch norm over channels",
         share=(0,)),
    Call("aten.batch_norm.default", (X4, B4, B4, *STATISTICS, False, 0.1, 1e-5, False),
         "evaluated batch norm over channels"),
    Call("cgo.batch_norm", (T((2, 3, 4, 2)), T((3,)), T((3,)), T((3,), trained=False),
                            T((3,), "positive", trained=False), 0.3, 1e-5),
         "batch norm in one kernel"),
    Call("aten.batch_norm.default", (T((2, 3, 4, 2)), T((3,)), T((3,)), T((3,), trained=False),
                                     T((3,), "positive", trained=False), False, 0.1, 1e-5, False),
         "evaluated batch norm in one kernel"),
    Call("aten.group_norm.default", (X4, 2, B4, B4, 1e-5), "group norm over channels"),
    Call("aten.group_norm.default", (X3, 4, None, None, 1e-5), "group norm over channels",
         channels=(0,)),
    Call("aten.instance_norm.default", (X4, B4, B4, None, None, True, 0.1, 1e-5, False),
         "instance norm over channels"),
    Call("aten.layer_norm.default", (ROW, (6,), T((6,)), T((6,)), 1e-5), "stacked layer norm"),
    Call("aten.layer_norm.default", (ROW, (7, 6), T((7, 6)), None, 1e-5), "stacked layer norm"),
    Call("aten.layer_norm.default", (ROW, (6,), T((6,)), T((6,)), 1e-5), "stacked layer norm",
         share=(0,)),
    Call("aten.rms_norm.default", (ROW, (6,), T((6,)), 1e-6), "stacked RMS norm"),
]  # fmt: skip

CLASSES = T((2, 3), "classes", below=5)
EMBEDDINGS = [
    Call("aten.embedding.default", (T((5, 4)), CLASSES), "offset embedding"),
    Call("aten.embedding.default", (T((5, 4)), CLASSES), "offset embedding", share=(1,)),
    Call("aten.embedding.default", (T((5, 4)), CLASSES, 2), "offset embedding", share=(1,)),
    Call("aten.embedding.default", (T((5, 4)), CLASSES), "folded embedding", share=(0,)),
    Call("aten.embedding.default", (T((5, 4)), CLASSES, 1), "folded embedding", share=(0,)),
]

HEADS = T((2, 2, 5, 4))
ATTENTION = "aten.scaled_dot_product_attention.default"
ATTENTIONS = [
    Call(ATTENTION, (HEADS, HEADS, HEADS), "folded attention"),
    Call(ATTENTION, (HEADS, HEADS, HEADS, None, 0.0, True), "folded attention"),
    Call(ATTENTION, (HEADS, HEADS, HEADS, T((5, 5), trained=False)), "folded attention",
         share=(3,)),
    Call(ATTENTION, (HEADS, HEADS, HEADS, T((2, 1, 5, 5), trained=False)), "folded attention"),
    Call(ATTENTION, (T((2, 5, 4)), T((2, 5, 4)), T((2, 5, 4))), "folded attention",
         kwargs={"scale": 0.5}, share=(1,)),
]  # fmt: skip


def recurrent(gates, layers, directions, biases, batch_first):
    hidden, inputs = 3, 4
    weights = []
    for layer in range(layers):
        for _ in range(directions):
            size = inputs if layer == 0 else directions * hidden
            weights += [T((gates * hidden, size)), T((gates * hidden, hidden))]
            weights += [T((gates * hidden,))] * 2 if biases else []
    x = T((2, 6, 4)) if batch_first else T((6, 2, 4))
    start = T((layers * directions, 2, hidden))
    states = [start, start] if gates == 4 else start
    op = "aten.lstm.input" if gates == 4 else "aten.gru.input"
    form = "unrolled LSTM" if gates == 4 else "unrolled GRU"
    args = (x, states, weights, biases, layers, 0.0, True, directions == 2, batch_first)
    return Call(op, tuple(tuple(a) if isinstance(a, list) else a for a in args), form)


RECURRENT = [
    recurrent(gates, layers, directions, biases, batch_first)
    for gates in (4, 3)
    for layers, directions, biases, batch_first in (
        (1, 1, True, True), (2, 2, True, False), (1, 2, False, True)
    )
]  # fmt: skip

POOLING = [
    Call("aten.max_pool2d.default", (X4, (2, 2), (2, 2)), "pooling over channels"),
    Call("aten.max_pool1d.default", (X3, (3,), (2,), (1,)), "pooling over channels",
         channels=(0,)),
    Call("aten.max_pool2d_with_indices.default", (X4, (3, 3), (1, 1), (1, 1)),
         "pooling over channels"),
    Call("aten.avg_pool2d.default", (X4, (3, 3), (1, 1), (1, 1), False, False),
         "pooling over channels", channels=(0,)),
    Call("aten.adaptive_avg_pool2d.default", (X4, (2, 3)), "pooling over channels"),
    Call("aten.adaptive_max_pool1d.default", (X3, (2,)), "pooling over channels"),
    Call("aten.upsample_nearest2d.default", (X4, (12, 12)), "resizing over channels"),
    Call("aten.upsample_bilinear2d.default", (X4, (9, 9), False), "resizing over channels",
         channels=(0,)),
    Call("aten.pixel_shuffle.default", (X4, 2), "resizing over channels"),
    Call("aten.constant_pad_nd.default", (X4, (1, 2, 0, 1), 0.5), "padding over channels"),
    Call("aten.reflection_pad2d.default", (X4, (1, 2, 0, 1)), "padding over channels",
         channels=(0,)),
]  # fmt: skip

TARGET = T((5,), "classes", below=4)
LOSSES = [
    Call("aten.cross_entropy_loss.default", (X2, TARGET), "folded cross entropy", share=(1,)),
    Call("aten.cross_entropy_loss.default", (X2, TARGET, None, 1, 2, 0.1), "folded cross entropy"),
    Call("aten.cross_entropy_loss.default", (X2, TARGET, None, 2), "folded cross entropy"),
    Call("aten.cross_entropy_loss.default", (X2, TARGET, None, 0), "folded cross entropy"),
    Call("aten.cross_entropy_loss.default", (X3, T((2, 8), "classes", below=4)),
         "folded cross entropy", share=(1,)),
    Call("aten.cross_entropy_loss.default", (X2, T((5, 4), "unit")), "folded cross entropy"),
    Call("aten.nll_loss_nd.default", (X2, TARGET, None, 1, -100), "folded negative log likelihood"),
    Call("aten.nll_loss_nd.default", (X2, TARGET, None, 1, 1), "folded negative log likelihood",
         share=(1,)),
    Call("aten.mse_loss.default", (X2, X2), "elementwise loss", share=(1,)),
    Call("aten.smooth_l1_loss.default", (X2, X2, 2, 0.5), "elementwise loss"),
    Call("aten.huber_loss.default", (X2, X2, 1, 0.7), "elementwise loss"),
    Call("aten.l1_loss.default", (X2, X2, 0), "elementwise loss"),
    Call("aten.binary_cross_entropy_with_logits.default", (X2, T((5, 4), "unit"), None, None, 1),
         "elementwise loss"),
    Call("aten.binary_cross_entropy.default", (T((5, 4), "unit"), T((5, 4), "unit"), None, 1),
         "elementwise loss"),
]  # fmt: skip


def unary(op, *args, kind="normal"):
    return [
        Call(f"aten.{op}", (T((2, 4, 3), kind), *args), "elementwise"),
        Call(f"aten.{op}", (T((2, 4, 3), kind), *args), "elementwise", channels=(0,)),
    ]


ELEMENTWISE = [
    *unary("relu.default"),
    *unary("gelu.default"),
    *unary("leaky_relu.default", 0.2),
    *unary("elu.default"),
    *unary("silu.default"),
    *unary("sigmoid.default"),
    *unary("tanh.default"),
    *unary("hardswish.default"),
    *unary("softplus.default"),
    *unary("exp.default"),
    *unary("abs.default"),
    *unary("pow.Tensor_Scalar", 3),
    *unary("clamp.default", -0.5, 0.5),
    *unary("mul.Scalar", 1.5),
    *unary("add.Tensor", 2),
    Call("aten.add.Tensor", (X4, 0), "sum from zero"),
    Call("aten.add.Tensor", (X4, 0), "sum from zero", channels=(0,)),
    *unary("rsub.Scalar", 1.0),
    *unary("neg.default"),
    *unary("detach.default"),
    *unary("zeros_like.default"),
    *unary("to.dtype", Symbol("dtype", "float64")),
    *unary("gt.Scalar", 0),
    Call("aten.sqrt.default", (T((3, 4), "positive"),), "elementwise"),
    Call("aten.log.default", (T((3, 4), "positive"),), "elementwise"),
    Call("aten.add.Tensor", (X4, X4), "elementwise", channels=(0, 1)),
    Call("aten.add.Tensor", (X4, X4), "elementwise", channels=(0,)),
    Call("aten.add.Tensor", (X4, X4), "elementwise", channels=(0,), share=(1,)),
    Call("aten.add.Tensor", (X4, X4), "elementwise", kwargs={"alpha": 2}),
    Call("aten.mul.Tensor", (X4, T((2, 4, 1, 1))), "elementwise", channels=(0,)),
    Call("aten.mul.Tensor", (X4, T((2, 1, 6, 6))), "elementwise", channels=(0,)),
    Call("aten.mul.Tensor", (X4, T((2, 1, 6, 6))), "elementwise", channels=(0,), share=(1,)),
    Call("aten.mul.Tensor", (X4, T((4, 1, 1))), "elementwise", channels=(0,)),
    Call("aten.mul.Tensor", (X4, T(())), "elementwise", channels=(0,)),
    Call("aten.mul.Tensor", (X4, T((6,))), "elementwise", channels=(0,)),
    Call("aten.sub.Tensor", (T((3, 1)), T((5,))), "elementwise"),
    Call("aten.div.Tensor", (X2, T((5, 4), "positive")), "elementwise"),
    Call("aten.maximum.default", (X2, X2), "elementwise"),
    Call("aten.addcmul.default", (X2, X2, T((4,))), "elementwise", kwargs={"value": 0.5}),
    Call("aten.lerp.Scalar", (X2, X2, 0.3), "elementwise"),
    Call("aten.where.self", (T((5, 4), "bool"), X2, X2), "elementwise"),
    Call("aten.masked_fill.Scalar", (X2, T((5, 4), "bool"), -1.0), "elementwise", share=(1,)),
    Call("aten.contiguous.default", (X4,), "same value", channels=(0,)),
    Call("aten.contiguous.default", (X2,), "same value"),
    Call("aten.clone.default", (X4,), "elementwise", channels=(0,)),
    Call("aten.prelu.default", (X4, T((1,))), "per-channel slope"),
    Call("aten.prelu.default", (X4, T((4,))), "per-channel slope", channels=(0,)),
    Call("aten.atan2.default", (X2, X2), "elementwise"),
]  # fmt: skip

REDUCTIONS = [
    Call("aten.sum.default", (X4,), "whole sum", channels=(0,)),
    Call("aten.mean.default", (X2,), "whole sum"),
    Call("aten.sum.dim_IntList", (X4, (2, 3)), "along dimensions", channels=(0,)),
    Call("aten.mean.dim", (X4, (-1, -2), True), "along dimensions", channels=(0,)),
    Call("aten.mean.dim", (X4, (1,)), "along dimensions", channels=(0,)),
    Call("aten.mean.dim", (ROW, (0, 2)), "along dimensions"),
    Call("aten.softmax.int", (ROW, -1), "along dimensions"),
    Call("aten.softmax.int", (X4, 1), "along dimensions", channels=(0,)),
    Call("aten.log_softmax.int", (X2, 1), "along dimensions"),
    Call("aten.amax.default", (ROW, (1,)), "along dimensions"),
    Call("aten.max.dim", (ROW, 1), "along dimensions"),
    Call("aten.argmax.default", (ROW, 2), "along dimensions"),
    Call("aten.var.correction", (ROW, (2,)), "along dimensions", kwargs={"correction": 1}),
    Call("aten.logsumexp.default", (ROW, (1,)), "along dimensions"),
    Call("aten.cumsum.default", (ROW, 1), "along dimensions"),
    Call("aten.glu.default", (X4, 1), "along dimensions"),
    Call("aten.flip.default", (ROW, (0, 2)), "along dimensions"),
    Call("aten.linalg_vector_norm.default", (ROW, 2, (1,)), "along dimensions"),
    Call("aten.max.default", (X2,), "vmap"),
]

SHAPES = [
    Call("aten.view.default", (X4, (2, 144)), "reshape", channels=(0,)),
    Call("aten.view.default", (X4, (8, 36)), "reshape", channels=(0,)),
    Call("aten.reshape.default", (ROW, (21, 6)), "reshape"),
    Call("aten.flatten.using_ints", (X4, 1), "reshape", channels=(0,)),
    Call("aten.flatten.using_ints", (X4, 0, 1), "reshape", channels=(0,)),
    Call("aten.squeeze.dim", (T((3, 1, 4)), 1), "reshape"),
    Call("aten.unsqueeze.default", (X2, 0), "reshape"),
    Call("aten.permute.default", (X4, (0, 2, 3, 1)), "permutation", channels=(0,)),
    Call("aten.transpose.int", (ROW, 1, -1), "permutation"),
    Call("aten.t.default", (X2,), "permutation"),
    Call("aten.select.int", (ROW, 1, -1), "part"),
    Call("aten.select.int", (X4, 2, 3), "part", channels=(0,)),
    Call("aten.slice.Tensor", (X4, 1, 1, 3), "part", channels=(0,)),
    Call("aten.slice.Tensor", (X4, 3, 1, 6, 2), "part", channels=(0,)),
    Call("aten.split.Tensor", (X4, 2, 1), "part", channels=(0,)),
    Call("aten.split_with_sizes.default", (ROW, (2, 5), 1), "part"),
    Call("aten.chunk.default", (X4, 2, -1), "part", channels=(0,)),
    Call("aten.unbind.int", (ROW, 0), "part"),
    Call("aten.select_scatter.default", (ROW, T((3, 6)), 1, 2), "written part"),
    Call("aten.select_scatter.default", (ROW, T((3, 7)), -1, -2), "written part", share=(0,)),
    Call("aten.slice_scatter.default", (ROW, T((3, 3, 6)), 1, 1, 6, 2), "written part"),
    Call("aten.slice_scatter.default", (X4, T((2, 4, 6, 2)), -1, 4), "written part", share=(1,)),
    Call("aten.diagonal_scatter.default", (ROW, T((3, 6)), 0, 1, 2), "written part"),
    Call("aten.roll.default", (X4, (1, 2), (2, 3)), "part", channels=(0,)),
    Call("aten.cat.default", ((X4, X4), 1), "concatenation", channels=(0, 1)),
    Call("aten.cat.default", ((X4, T((2, 3, 6, 6))), 1), "concatenation", channels=(0,)),
    Call("aten.cat.default", ((X4, X4), 3), "concatenation", channels=(0, 1)),
    Call("aten.cat.default", ((X2, X2, X2), 0), "concatenation", share=(1,)),
    Call("aten.stack.default", ((X2, X2), -1), "stack"),
    Call("aten.expand.default", (T((3, 1, 4)), (2, 3, 5, -1)), "expansion"),
    Call("aten.repeat.default", (X2, (2, 1, 3)), "repetition"),
    Call("aten.tril.default", (ROW, 1), "last axes"),
    Call("aten.constant_pad_nd.default", (X2, (1, 1, 2, 0), 1.0), "last axes"),
    Call("aten.index_select.default", (ROW, 1, T((4,), "classes", below=7)), "shared index",
         share=(1,)),
    Call("aten.gather.default", (X2, 1, T((5, 2), "classes", below=4)), "vmap"),
    Call("aten.trace.default", (X2,), "vmap"),
]  # fmt: skip

SMALL = (3, 4)


def each(form, operators, *args, **kwargs):
    """One call for every operator named."""
    return [Call(f"aten.{op}", args, form, kwargs) for op in operators.split()]


def elementwise(operators, *args, **kwargs):
    return each("elementwise", operators, *args, **kwargs)


NORMAL, POSITIVE, UNIT, BOOL = (T(SMALL, kind) for kind in ("normal", "positive", "unit", "bool"))
CLASS = T(SMALL, "classes", below=5)
#: Every other operator that has a form, once.
REST = [
    *elementwise(
        """
        absolute.default asinh.default atan.default ceil.default cos.default cosh.default
        erf.default erfc.default exp2.default expm1.default floor.default frac.default
        isfinite.default isinf.default isnan.default lift_fresh_copy.default log_sigmoid.default
        mish.default nan_to_num.default negative.default ones_like.default reciprocal.default
        relu6.default round.default selu.default sign.default sin.default sinh.default
        square.default tan.default trunc.default celu.default hardshrink.default
        hardsigmoid.default hardtanh.default softshrink.default
        """,
        NORMAL,
    ),
    *elementwise("log10.default log1p.default log2.default rsqrt.default", POSITIVE),
    *elementwise("acos.default asin.default atanh.default", UNIT),
    *elementwise("acosh.default", T(SMALL, "above one")),
    *elementwise("logical_not.default bitwise_not.default", BOOL),
    *elementwise("_to_copy.default", NORMAL, dtype=DOUBLE),
    *elementwise("full_like.default", NORMAL, 0.5),
    *elementwise("threshold.default", NORMAL, 0.1, 20.0),
    *elementwise("clamp_max.default clamp_min.default clip.default", NORMAL, 0.3),
    *elementwise("fmod.Scalar remainder.Scalar", NORMAL, 0.7),
    *elementwise("floor_divide.Scalar", T(SMALL, trained=False), 0.7),
    *elementwise("eq.Scalar ne.Scalar lt.Scalar le.Scalar ge.Scalar", CLASS, 2),
    *elementwise(
        """
        divide.Tensor true_divide.Tensor multiply.Tensor subtract.Tensor fmax.default fmin.default
        minimum.default logaddexp.default logaddexp2.default fmod.Tensor
        """,
        NORMAL,
        POSITIVE,
    ),
    *elementwise("xlogy.Tensor", NORMAL, POSITIVE),
    *elementwise("addcdiv.default", NORMAL, NORMAL, POSITIVE, value=0.3),
    *elementwise(
        """
        bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor logical_and.default
        logical_or.default logical_xor.default
        """,
        BOOL,
        BOOL,
    ),
    *each("same value", "alias.default", NORMAL),
    *each("per-channel slope", "_prelu_kernel.default", X2, B4),
    *each("along dimensions", "any.dim all.dim", BOOL, 1),
    *each("along dimensions", "amin.default nansum.default std.dim", ROW, (1,)),
    *each("along dimensions", "argmin.default argsort.default min.dim sort.default", ROW, 1),
    *each("along dimensions", "cumprod.default logcumsumexp.default prod.dim_int", ROW, 1),
    *each("along dimensions", "topk.default", ROW, 2, 1),
    *each("concatenation", "concat.default concatenate.default", (X2, X2), 1),
    *each("elementwise loss", "soft_margin_loss.default", X2, T((5, 4), trained=False)),
    *each("expansion", "broadcast_to.default", T((3, 1, 4)), (2, 3, 5, 4)),
    *each("folded negative log likelihood", "nll_loss.default", X2, TARGET),
    *each("folded negative log likelihood", "nll_loss2d.default", X4,
          T((2, 6, 6), "classes", below=4)),
    convolution("conv_transpose3d.input", T((2, 4, 3, 3, 3)), T((4, 3, 2, 2, 2)), T((3,))),
    *each("last axes", "triu.default", ROW, -1),
    *each("padding over channels", "pad.default", X4, (1, 1)),
    *each("padding over channels", "reflection_pad1d.default replication_pad1d.default", X3,
          (1, 2)),
    *each("padding over channels", "replication_pad2d.default", X4, (1, 0, 2, 1)),
    *each("padding over channels", "reflection_pad3d.default replication_pad3d.default",
          T((2, 2, 3, 3, 3)), (1, 0, 1, 1, 0, 2)),
    *each("part", "narrow.default", ROW, 1, 2, 3),
    *each("permutation", "mT.default numpy_T.default", X2),
    *each("pooling over channels", "adaptive_avg_pool1d.default", X3, (3,)),
    *each("pooling over channels", "adaptive_avg_pool3d.default adaptive_max_pool3d.default",
          T((2, 2, 4, 4, 4)), (2, 2, 1)),
    *each("pooling over channels", "adaptive_max_pool2d.default", X4, (2, 3)),
    *each("pooling over channels", "avg_pool1d.default max_pool1d_with_indices.default", X3, (2,),
          (2,)),
    *each("pooling over channels",
          "avg_pool3d.default max_pool3d.default max_pool3d_with_indices.default",
          T((2, 2, 4, 4, 4)), (2, 2, 2), (2, 2, 2)),
    *each("reshape", "_unsafe_view.default", X2, (4, 5)),
    *each("reshape", "unflatten.int", ROW, 2, (2, 3)),
    *each("resizing over channels", "_upsample_nearest_exact1d.default upsample_nearest1d.default",
          X3, (12,)),
    *each("resizing over channels", "upsample_linear1d.default", X3, (12,), True),
    *each("resizing over channels", "_upsample_nearest_exact2d.default", X4, (9, 9)),
    *each("resizing over channels", "upsample_bicubic2d.default", X4, (9, 9), False),
    *each("resizing over channels", "_upsample_nearest_exact3d.default upsample_nearest3d.default",
          T((2, 2, 2, 2, 2)), (3, 4, 3)),
    *each("resizing over channels", "upsample_trilinear3d.default", T((2, 2, 2, 2, 2)), (3, 4, 3),
          False),
    *each("resizing over channels", "pixel_unshuffle.default", X4, 2),
    *each("expansion", "expand_as.default", T((5, 1)), X2),
    *each("reshape", "view_as.default reshape_as.default", X2, T((4, 5))),
]  # fmt: skip

CALLS = [
    *CONVOLUTIONS, *LINEAR, *NORMS, *EMBEDDINGS, *ATTENTIONS, *RECURRENT, *POOLING, *LOSSES,
    *ELEMENTWISE, *REDUCTIONS, *SHAPES, *REST,
]  # fmt: skip
