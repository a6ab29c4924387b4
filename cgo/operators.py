"""Which operators a graph may contain; `cgo.passes.sharing` says which may be shared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from cgo.graph import SOURCES

#: Our own operators beside the sources; `cgo.runtime.operators` has what stands behind them.
#:
#: - `cgo.random(distribution=, model=, order=, ...)`: random tensor, drawn before the step from
#:   the model's own stream; `order` counts the model's draws within one program. Distributions:
#:   dropout (p: zeros and 1 / (1 - p), what the input is multiplied by), bernoulli (p), uniform
#:   (low, high), normal (mean, std), exponential (rate), log_normal (mean, std), cauchy (median,
#:   scale), geometric (p), randint (low, high), randperm
#: - `cgo.batch_norm(x, weight, bias, mean, var, momentum, eps)` in training mode: outputs
#:   (y, new mean, new var)
CGO_OPERATORS = SOURCES | {"cgo.random", "cgo.batch_norm"}


#: ATen's name of an operator: "aten.conv2d.default".
_ATEN = re.compile(r"aten\.(\w+)\.(\w+)", re.ASCII)


@cache
def aten(op: str) -> Any | None:
    """The `torch` OpOverload that "aten.name.overload" names, or None."""
    import torch

    from cgo.private.operators import OpOverload, OpOverloadPacket

    found = _ATEN.fullmatch(op)
    if found is None:
        return None
    packet = getattr(torch.ops.aten, found[1], None)
    # A namespace and a packet have attributes of their own, such as "name" and "op".
    if not isinstance(packet, OpOverloadPacket):
        return None
    overload = getattr(packet, found[2], None)
    return overload if isinstance(overload, OpOverload) else None


@cache
def known(op: str) -> bool:
    """Whether a graph may contain `op`: one of ours, or a functional ATen operator on tensors.

    Refused are operators that write their arguments, that give no tensor, that reach beyond
    tensors (`from_file`), that are kernels of one backend or of quantised, sparse, nested and named
    tensors, and ATen's internal ones but for those that captured graphs have: what they are called
    with is not checked by anybody, and some end the process.
    """
    if op in CGO_OPERATORS:
        return True
    overload = aten(op)
    if overload is None or overload._schema.is_mutable:
        return False
    _, name, variant = op.split(".")
    return _plain_name(name, variant) and _on_tensors(overload)


def _plain_name(name: str, variant: str) -> bool:
    if "dimname" in variant.lower():
        return False
    if name.startswith("_"):
        return name in _INTERNAL
    return not _REFUSED.fullmatch(name)


def _on_tensors(overload: Any) -> bool:
    """Whether it is a kernel that takes tensors and literals, and gives tensors."""
    from cgo.private.operators import has_kernel

    if not has_kernel(overload):
        return False
    schema = overload._schema
    returns = [str(value.type) for value in schema.returns]
    return any("Tensor" in kind for kind in returns) and all(
        _ARGUMENT.fullmatch(str(argument.type)) for argument in schema.arguments
    )


_ARGUMENT = re.compile(
    r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|int|bool|float|number|Device)\]*"
    r"|str|Optional\[(str|Generator)\]"
)

#: Of ATen's internal operators, those that captured graphs have.
_INTERNAL = frozenset(
    """
    __and__ __or__ __xor__ __lshift__ __rshift__
    _convolution _trilinear _weight_norm _prelu_kernel _softmax _safe_softmax _log_softmax
    _masked_softmax _native_batch_norm_legit_no_training _native_batch_norm_legit_functional
    _cdist_forward _euclidean_dist _pdist_forward
    _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_lanczos2d_aa _unsafe_view _reshape_alias _reshape_copy _pad_circular _pad_enum
    _to_copy _conj _conj_copy _conj_physical _neg_view _neg_view_copy _aminmax
    _logcumsumexp _shape_as_tensor _dim_arange _ctc_loss _fft_c2c _fft_c2r _fft_r2c _linalg_det
    _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd _lu_with_info
    _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention _cast_Byte
    _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short _add_relu
    _fused_rms_norm _is_all_true _is_any_true _lazy_clone
    """.split()  # noqa: SIM905
)

#: Operators that no captured graph of dense tensors needs, by the form of their names.
_REFUSED = re.compile(
    r".*_backward(_.*)?|(mkldnn|cudnn|miopen|mps|fbgemm|quantized?|q|sparse|fused|nested)_.*"
    r"|.*(sparse|nested|quantized|mkldnn|padded_tensor|_polynomial_).*"
    r"|from_file|resize|resize_as.*|set|int_repr|dequantize|segment_reduce|choose_qparams.*"
    r"|hspmm|sspaddmm|smm|pin_memory|data|(c?col_|c?row_)?indices(_copy)?|values(_copy)?|coalesce"
    r"|batch_norm_.*|get_gradients|hash_tensor|convolution_overrideable|thnn_.*"
    r"|slow_conv.*|conv_depthwise3d|.*dense_tensors"
)


def draws(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an ATen operator draws random numbers.

    Attention and recurrences that may drop out values draw none where they are told not to.
    """
    import torch

    if torch.Tag.nondeterministic_seeded not in overload.tags:
        return False
    named = named_arguments(str(overload), args, kwargs)
    return bool(named.get("dropout_p", named.get("dropout")) != 0)


#: Argument names of our own operators.
_OURS = {"cgo.batch_norm": ("input", "weight", "bias", "mean", "var", "momentum", "eps")}


def named_arguments(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name in the order of its schema, defaults filled in."""
    overload = aten(op)
    if overload is None:
        return {**dict(zip(_OURS.get(op, ()), args)), **kwargs}
    arguments = overload._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args)} | dict(kwargs)
    return {
        argument.name: given.get(argument.name, _default(argument))
        for argument in arguments
        if argument.name in given or argument.has_default_value()
    }


def _default(argument: Any) -> Any:
    value = argument.default_value
    return tuple(value) if isinstance(value, list) else value
