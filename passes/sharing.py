# ruff: noqa: SIM905  (one word an operator keeps the list readable)
"""What may be shared between models: pure, deterministic operators, and exact keys of literals.

An allow-list, because ban-lists rot: an operator that nobody thought of is not shared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from cgo.graph import Argument, Node, Ref
from cgo.operators import named_arguments

#: ATen operators, by name without overload, whose value is decided by their arguments alone.
#: Left out on purpose: what draws random numbers or reads uninitialised memory, what looks at
#: strides or storage (`as_strided`), what sums in no fixed order (`scatter_add`, `index_add`,
#: `bincount`, `scatter` with repeated indices), what reads a value back to Python (`item`).
PURE = frozenset(
    (
    # matrix products and convolutions
    """
    linear matmul mm bmm mv dot vdot addmm addmv addbmm baddbmm addr outer ger inner einsum
    tensordot bilinear _trilinear chain_matmul linalg_multi_dot linalg_matmul kron cross
    linalg_cross linalg_vecdot conv1d conv2d conv3d convolution _convolution conv_tbc
    conv_transpose1d conv_transpose2d conv_transpose3d _weight_norm norm_except_dim
    """
    # arithmetic, element by element
    """
    add sub rsub subtract mul multiply div divide true_divide floor_divide remainder fmod pow
    float_power square sqrt rsqrt reciprocal neg negative positive abs absolute sign sgn signbit
    copysign exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 xlogy sin cos tan asin acos
    atan atan2 sinh cosh tanh asinh acosh atanh arcsin arccos arctan arctan2 arcsinh arccosh
    arctanh sinc deg2rad rad2deg hypot ldexp erf erfc erfinv lgamma digamma polygamma mvlgamma
    igamma igammac i0 ceil floor round trunc fix frac clamp clamp_min clamp_max clip lerp
    addcmul addcdiv maximum minimum fmax fmin nan_to_num heaviside nextafter gcd lcm logit
    eq ne lt le gt ge equal not_equal less less_equal greater greater_equal isclose
    isnan isinf isfinite isposinf isneginf isreal
    logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
    bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__
    where masked_fill conj real imag angle view_as_real view_as_complex complex polar
    resolve_conj resolve_neg _conj conj_physical
    special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2 special_expit
    special_expm1 special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p
    special_log_ndtr special_logit special_ndtr special_ndtri special_psi special_round
    special_sinc special_xlog1py special_xlogy special_softmax special_log_softmax
    special_logsumexp
    """
    # activations
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid log_sigmoid hardsigmoid hardswish
    hardtanh hardshrink softshrink softplus threshold glu prelu _prelu_kernel softmax _softmax
    _safe_softmax log_softmax _log_softmax _masked_softmax
    """
    # norms and pooling
    """
    layer_norm native_layer_norm rms_norm group_norm native_group_norm
    _native_batch_norm_legit_no_training
    cosine_similarity pairwise_distance cdist _cdist_forward _euclidean_dist pdist
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
    """
    # shapes, views, copies and casts
    """
    view _unsafe_view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze permute
    transpose t numpy_T mT mH adjoint swapaxes swapdims movedim moveaxis expand expand_as
    broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d
    cat concat concatenate stack hstack vstack dstack column_stack row_stack
    split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split
    hsplit vsplit dsplit unbind select slice narrow diagonal diag diag_embed diagflat tril triu
    repeat repeat_interleave tile flip fliplr flipud roll rot90 unfold im2col col2im
    gather take take_along_dim index index_select index_fill select_scatter slice_scatter
    diagonal_scatter constant_pad_nd pad _pad_circular _pad_enum reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle meshgrid cartesian_prod
    block_diag one_hot pad_sequence
    alias detach clone contiguous copy lift lift_fresh lift_fresh_copy to _to_copy type_as
    _cast_Float _cast_Double _cast_Half _cast_Long _cast_Int
    permute_copy transpose_copy view_copy expand_copy select_copy slice_copy squeeze_copy
    unsqueeze_copy split_copy split_with_sizes_copy unbind_copy diagonal_copy t_copy detach_copy
    alias_copy unfold_copy _reshape_copy
    """
    # tensors made from literals
    """
    zeros ones full eye arange range linspace logspace scalar_tensor zeros_like ones_like full_like
    new_zeros new_ones new_full tril_indices triu_indices hann_window hamming_window
    blackman_window bartlett_window kaiser_window fft_fftfreq fft_rfftfreq
    """
    # reductions, order and search
    """
    sum mean prod nansum nanmean amax amin aminmax max min argmax argmin all any var std var_mean
    std_mean logsumexp logcumsumexp cumsum cumprod cummax cummin median nanmedian quantile
    nanquantile norm linalg_norm linalg_vector_norm linalg_matrix_norm frobenius_norm renorm dist
    trace count_nonzero diff trapezoid trapz cumulative_trapezoid cov corrcoef sort argsort msort
    topk kthvalue searchsorted bucketize isin sum_to_size
    """
    # embeddings, losses, transforms
    """
    embedding embedding_bag
    mse_loss l1_loss smooth_l1_loss huber_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward
    nll_loss2d_forward cross_entropy_loss binary_cross_entropy binary_cross_entropy_with_logits
    kl_div cosine_embedding_loss hinge_embedding_loss margin_ranking_loss soft_margin_loss
    multi_margin_loss multilabel_margin_loss triplet_margin_loss poisson_nll_loss ctc_loss
    fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
    fft_rfftn fft_irfftn fft_hfft fft_ihfft fft_fftshift fft_ifftshift stft istft
    linalg_det linalg_slogdet linalg_inv linalg_solve linalg_cholesky linalg_matrix_power
    linalg_matrix_exp matrix_exp matrix_power det inverse logdet
    """
    ).split()
)  # fmt: skip

#: Operators that are pure under a condition on their arguments, given by name.
CONDITIONAL: dict[str, Callable[[dict[str, Any]], bool]] = {
    name: rule
    for names, rule in (
        (
            "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout",
            lambda given: given["train"] is False,
        ),
        ("rrelu", lambda given: given["training"] is False),
        # Training mode writes the running statistics behind the schema.
        ("batch_norm", lambda given: given["training"] is False or given["running_mean"] is None),
        (
            "instance_norm",
            lambda given: given["use_input_stats"] is False or given["running_mean"] is None,
        ),
        ("scaled_dot_product_attention", lambda given: given["dropout_p"] == 0),
        ("lstm gru rnn_tanh rnn_relu", lambda given: not (given["train"] and given["dropout"])),
    )
    for name in names.split()
}

#: Our own operators that are pure.
OURS = frozenset({"cgo.batch_norm"})


def pure(node: Node) -> bool:
    """Whether equal arguments give this operator an equal value, always."""
    if node.op.startswith("cgo."):
        return node.op in OURS
    name = node.op.split(".")[1] if node.op.startswith("aten.") else ""
    if name in PURE:
        return True
    rule = CONDITIONAL.get(name)
    return rule is not None and rule(named_arguments(node.op, node.args, dict(node.kwargs)))


def is_own(node: Node) -> bool:
    """Whether the node is the start of what a model shares with nobody."""
    return node.op == "cgo.random" or (
        node.op == "cgo.parameter" and node.keyword("trainable") is not False
    )


def literal_key(value: object) -> tuple[type, object]:
    """A key that two literals share only if type and bits agree.

    In Python `1 == 1.0 == True` and `0.0 == -0.0`, in tensor programs not.
    """
    return type(value), struct.pack("<d", value) if type(value) is float else value


def argument_key(argument: Argument, refs: list[Ref] | None = None) -> object:
    """A key of an argument tree.

    With `refs`, references are appended to it in order, and the key says only where they stand.
    """
    if type(argument) is tuple:
        return (tuple, *[argument_key(item, refs) for item in argument])
    if type(argument) is Ref and refs is not None:
        refs.append(argument)
        return Ref, argument.index
    return literal_key(argument)
