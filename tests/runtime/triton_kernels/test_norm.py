"""The kernels of batch norm against torch's operators one by one, by Triton's interpreter."""

import math
from itertools import product

import pytest
import torch
from support.triton_compiler import run_compiling
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from cgo.runtime.fused_norms import ACTIVATIONS, TOLD_BY_RESULT, normalised  # noqa: E402
from cgo.runtime.triton_kernels import norm  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAST = torch.channels_last
ACTIVATED = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}
CLOSE = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-2, 4e-2),
    torch.float16: (3e-3, 5e-3),
}

#: (N, M*C, H, W): what the benchmarks' families have, with a smaller batch.
FAMILIES = {
    "cells, first stage": (3, 2 * 16, 32, 32),
    "cells, last stage": (8, 2 * 64, 8, 8),
    "narrow residual": (4, 2 * 8, 32, 32),
    "narrow residual, last": (16, 2 * 64, 4, 4),
    "wide residual, last": (4, 512, 4, 4),
}


def drawn(shape, dtype, last=False, seed=0):
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = value.to(DEVICE, dtype)
    return value.contiguous(memory_format=LAST) if last else value


def inputs(shape, dtype, last=False, added=True, affine=True, parameters=None):
    """Leaves: input, weight, bias, what is added; and the gradient that arrives."""
    channels, kept = (shape[1],), parameters or dtype
    given = [
        (drawn(shape, torch.float64, seed=1) * 2 + 3).to(dtype),
        drawn(channels, kept, seed=2) if affine else None,
        drawn(channels, kept, seed=3) if affine else None,
        drawn(shape, dtype, last, seed=4) if added else None,
    ]
    if last:
        given[0] = given[0].contiguous(memory_format=LAST)
    return given, drawn(shape, dtype, last, seed=5)


def outcome(function, given, gradient, parameters, training=True, kept=True):
    """Result, running statistics and gradients."""
    leaves = [None if value is None else value.clone().requires_grad_() for value in given]
    x, weight, bias, added = leaves
    channels = x.shape[1]
    mean = var = None
    if kept:
        mean = drawn((channels,), parameters, seed=6)
        var = drawn((channels,), parameters, seed=7).abs() + 0.5
    result = function(x, weight, bias, mean, var, training, 0.3, 1e-5, added)
    result.backward(gradient)
    gradients = [leaf.grad for leaf in leaves if leaf is not None]
    return [result.detach(), *([mean, var] if kept else []), *gradients]


def one_by_one(activation):
    def run(x, weight, bias, mean, var, training, momentum, eps, added):
        result = torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, False)
        return ACTIVATED[activation](result if added is None else result + added)

    return run


def in_one(activation):
    def run(*given):
        return normalised(*given, activation)

    return run


def compare(shape, dtype, activation, parameters=None, training=True, kept=True, **rest):
    given, gradient = inputs(shape, dtype, parameters=parameters, **rest)
    settings = given, gradient, parameters or dtype, training, kept
    found = outcome(in_one(activation), *settings)
    wanted = outcome(one_by_one(activation), *settings)
    rtol, atol = CLOSE[dtype]
    for ours, theirs in zip(found, wanted, strict=True):
        scale = max(1.0, float(theirs.abs().max()))  # of sums over many values
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * scale)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_as_torch_on_the_shapes_of_the_families(shape, last):
    if not last:  # a program each, all alike
        shape = (shape[0], 3, *shape[2:])
    compare(shape, torch.float32, "relu", last=last)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_in_every_dtype(dtype, last):
    # The interpreter cuts bfloat16 off, which moves values across a kink.
    compare((5, 3, 7, 3), dtype, "none" if dtype == torch.bfloat16 else "relu", last=last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_stay_in_float32_under_autocast(dtype):
    compare((5, 6, 7, 3), dtype, "silu", torch.float32, last=True, added=False)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("activation", "added"),
    [(a, d) for a, d in product(ACTIVATIONS, (False, True)) if a in TOLD_BY_RESULT or not d],
)
def test_each_activation_with_and_without_an_addition(activation, added, training):
    given = {"added": added, "training": training, "last": training}
    compare((3, 2, 4, 6), torch.float64, activation, **given)


@pytest.mark.parametrize(
    "shape", [(7, 40), (7, 1), (3, 2, 9), (2, 3, 2, 3, 5), (2, 33, 1, 1), (1, 2, 5, 5)], ids=str
)
def test_any_number_of_dimensions_and_odd_sizes(shape):
    compare(shape, torch.float64, "relu")


@pytest.mark.parametrize("given", [{"affine": False}, {"kept": False}, {"added": False}], ids=str)
def test_without_what_a_norm_need_not_have(given):
    compare((3, 2, 4, 6), torch.float64, "relu", **given)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_rows_are_divided_where_channels_are_few(monkeypatch, last, training):
    monkeypatch.setattr(norm, "_LAST", (8, 4))
    monkeypatch.setattr(norm, "_SMALL", (4, 8))
    x = torch.empty((11, 3, 2, 3), memory_format=LAST if last else torch.contiguous_format)
    found = norm.arrange(x)
    assert found.parts > 2
    assert found.rows % found.per_part  # the last part has fewer
    compare((11, 3, 2, 3), torch.float64, "relu", last=last, training=training)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000, 4097, 262144])
@pytest.mark.parametrize("channels", [1, 16, 513])
def test_every_row_is_in_one_part_and_no_part_is_empty(rows, channels):
    found = norm.arrange(torch.empty((rows, channels), device="meta"))
    assert (found.parts - 1) * found.per_part < found.rows <= found.parts * found.per_part


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the interpreter
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_channel_that_is_not_finite_changes_no_bit_of_its_neighbours(last, poison):
    given, gradient = inputs((3, 4, 5, 5), torch.float32, last)
    clean = outcome(in_one("relu"), given, gradient, torch.float32)
    for place in (0, 3):  # the input, and what is added
        dirty = [value.clone() for value in given]
        dirty[place][1, 2, 3, 3] = poison
        others = [0, 1, 3]
        found = outcome(in_one("relu"), dirty, gradient, torch.float32)
        for before, after in zip(clean, found):
            axis = 1 if before.ndim > 1 else 0
            index = torch.tensor(others, device=DEVICE)
            left, right = before.index_select(axis, index), after.index_select(axis, index)
            assert torch.equal(left, right)
        assert not found[0][:, 2].isfinite().all()


def test_a_large_mean_costs_no_digits():
    x = (torch.randn(64, 2, 8, 8, dtype=torch.float64) + 1000).to(DEVICE, torch.float32)
    found = normalised(x, None, None, None, None, True, 0.1, 1e-5)
    wanted = torch.batch_norm(x.double(), None, None, None, None, True, 0.1, 1e-5, False)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4)


def test_values_that_lie_otherwise_are_copied():
    given, gradient = inputs((4, 3, 5, 5), torch.float64)
    wanted = outcome(one_by_one("relu"), given, gradient, torch.float64)
    given[3] = given[3].contiguous(memory_format=LAST)
    turned = gradient.transpose(2, 3).contiguous().transpose(2, 3)
    found = outcome(in_one("relu"), given, turned, torch.float64)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_single_value_of_a_channel_is_an_error_as_it_is_torchs():
    x = torch.randn(1, 3, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="more than 1 value per channel") as theirs:
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        normalised(x, None, None, None, None, True, 0.1, 1e-5)
    assert str(ours.value) == str(theirs.value)
    normalised(x, None, None, x.flatten(), x.flatten() ** 2, False, 0.1, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_on_a_gpu(dtype, last, cuda):
    kinked = dtype in (torch.float64, torch.float32)
    for shape in ((64, 48, 32, 32), (32, 600, 8, 8), (16, 33, 7, 7)):
        compare(shape, dtype, "relu" if kinked else "none", last=last)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_captured_on_a_gpu(last, cuda):
    given, gradient = inputs((32, 48, 16, 16), torch.float32, last)
    leaves = [value.clone().requires_grad_() for value in given]
    mean, var = torch.zeros(48, device=cuda), torch.ones(48, device=cuda)

    def step():
        x, weight, bias, added = leaves
        result = normalised(x, weight, bias, mean, var, True, 0.3, 1e-5, added, "relu")
        return [result, *torch.autograd.grad(result, leaves, gradient)]

    with torch.autograd.set_multithreading_enabled(False):
        wanted, once = step(), (mean.clone(), var.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    mean.zero_()
    var.fill_(1)
    graph.replay()
    for ours, theirs in zip((*found, mean, var), (*wanted, *once), strict=True):
        assert torch.equal(ours, theirs)


_COMPILED = """
import triton.language as tl
from cgo.runtime.triton_kernels import norm
from support.triton_compiler import compile_kernel

def compiled(kernel, dtype, acc, absent=(), **constants):
    constants |= dict.fromkeys(absent)
    wide = {"x", "out", "residual", "gradient", "to_x", "to_residual"}
    held = {"held", "saved_mean", "saved_rstd"}
    sizes = {"rows", "per_part", "parts", "channels", "pixels", "stride"}
    def kind(name):
        if name in sizes: return "i32"
        if name.startswith(("momentum", "eps")): return "fp32"
        return "*" + (dtype if name in wide else acc if name in held else "fp32")
    types = {name: kind(name) for name in kernel.arg_names}
    compile_kernel(kernel, types, constants, num_warps=norm._WARPS)

for dtype, acc, last, stage, training, activation, absent in (
    ("bf16", "fp32", True, 2, True, "relu", ()),
    ("fp64", "fp64", False, 0, True, "gelu", ("residual", "to_residual", "weight", "bias")),
):
    for kernel in (norm._forward, norm._backward):
        missing = [name for name in absent if name in kernel.arg_names]
        if kernel is norm._forward and "out" in missing: missing.remove("out")
        if kernel is norm._backward and activation in ("none", "gelu"): missing.append("out")
        compiled(kernel, dtype, acc, missing, LAST=last, STAGE=stage, TRAINING=training,
                 ACTIVATION=activation, ROWS=16, COLUMNS=32, PARTS=16,
                 ACC=tl.float64 if acc == "fp64" else tl.float32)
print("compiled")
"""


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="no compiler for CUDA here")
def test_the_compiler_for_cuda_takes_the_kernels(tmp_path):
    """The interpreter runs what the compiler refuses; no device is needed to ask it."""
    assert run_compiling(_COMPILED, tmp_path) == "compiled\n"
