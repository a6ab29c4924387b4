"""Convolutions of many models in one kernel against torch's grouped ones, by the interpreter."""

import math

import pytest
import torch
from support.triton_compiler import run_compiling
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from cgo.runtime.grouped_convolutions import convolved  # noqa: E402
from cgo.runtime.precision import tf32  # noqa: E402
from cgo.runtime.triton_kernels import convolution  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Products in float64 are for the interpreter.
EXACT = torch.float64 if DEVICE.type == "cpu" else torch.float32
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 5e-3}

#: M, N, C, O, H, W, kernel, stride, padding: what the families have, with fewer images.
SHAPES = {
    "cnn first": (2, 2, 3, 16, 9, 8, 3, 1, 1),
    "cells 3x3": (2, 2, 16, 16, 8, 8, 3, 1, 1),
    "cells 1x1": (2, 2, 16, 16, 8, 8, 1, 1, 0),
    "narrow 8": (2, 2, 8, 8, 8, 8, 3, 1, 1),
    "narrow, stride": (2, 2, 8, 16, 8, 8, 3, 2, 1),
    "shortcut": (2, 2, 8, 16, 8, 8, 1, 2, 0),
    "more than a tile": (1, 2, 40, 72, 4, 4, 3, 1, 1),
    "odd": (3, 1, 5, 7, 9, 6, 3, 2, 0),
    "5x5": (1, 2, 3, 4, 7, 5, 5, 1, 2),
}


def drawn(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(shape, dtype):
    m, n, c, o, h, w, kernel, _, _ = shape
    scale = 1 / math.sqrt(c * kernel**2)
    return [
        drawn((n, m * c, h, w), dtype, 1),
        drawn((m * o, c, kernel, kernel), dtype, 2) * scale,
        drawn((m * o,), dtype, 3),
    ]


def outcome(function, given, seed=4):
    leaves = [value.clone().requires_grad_() for value in given]
    result = function(*leaves)
    result.backward(drawn(result.shape, result.dtype, seed))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def ours(shape, dtype):
    m, *_, stride, padding = shape
    return lambda x, w, b: convolved(x, w, b, m, stride, padding, dtype)


def theirs(shape):
    m, *_, stride, padding = shape
    return lambda x, w, b: F.conv2d(x, w, b, stride, padding, groups=m)


@pytest.fixture(autouse=True)
def exact():
    with tf32(False):
        yield


def compare(shape, dtype):
    given = inputs(shape, dtype)
    found, wanted = outcome(ours(shape, dtype), given), outcome(theirs(shape), given)
    for left, right in zip(found, wanted, strict=True):
        assert left.dtype == right.dtype
        scale = max(1.0, float(right.abs().max()))
        torch.testing.assert_close(left, right, rtol=CLOSE[dtype], atol=CLOSE[dtype] * scale)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_torch_on_the_shapes_of_the_families(shape):
    compare(shape, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_other_dtypes(dtype):
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16: only a GPU can tell")
    compare(SHAPES["narrow, stride"], dtype)


def test_pixels_are_divided_for_the_weight(monkeypatch):
    monkeypatch.setattr(convolution, "_PART", 32)
    compare(SHAPES["cells 3x3"], EXACT)


def test_a_member_that_is_not_finite_changes_no_bit_of_its_neighbours():
    shape = SHAPES["odd"]
    given = inputs(shape, torch.float32)
    clean = outcome(ours(shape, torch.float32), given)
    for place, poison in ((0, math.nan), (0, math.inf), (1, math.nan)):
        dirty = [value.clone() for value in given]
        dirty[place].select(1 - place, len(dirty[place].select(place, 0)) // 2).fill_(poison)
        for index, (before, after) in enumerate(
            zip(clean, outcome(ours(shape, torch.float32), dirty))
        ):
            axis = 1 if index < 2 else 0
            left, right = (v.unflatten(axis, (3, -1)) for v in (before, after))
            for lane in (0, 2):
                assert torch.equal(left.select(axis, lane), right.select(axis, lane))


def test_autocast_decides_the_dtype():
    x, weight, bias = inputs(SHAPES["cells 1x1"], torch.float32)
    found = outcome(lambda *v: convolved(*v, 2, 1, 0, torch.float16), [x, weight, bias])
    assert [value.dtype for value in found] == [torch.float16, *[torch.float32] * 3]
    wanted = F.conv2d(x, weight, bias, groups=2)
    torch.testing.assert_close(found[0].float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype, cuda):
    for m, n, c, o, size, kernel, stride in (
        (32, 64, 3, 16, 32, 3, 1), (32, 16, 16, 16, 32, 1, 1), (8, 64, 64, 64, 8, 3, 1),
        (16, 32, 8, 16, 32, 3, 2), (4, 16, 100, 128, 7, 3, 1),
    ):  # fmt: skip
        compare((m, n, c, o, size, size, kernel, stride, kernel // 2), dtype)


@pytest.mark.gpu
def test_tf32_on_a_gpu(cuda):
    shape = SHAPES["cells 3x3"]
    given = inputs(shape, torch.float32)
    wanted = outcome(theirs(shape), [value.double() for value in given])
    errors = []
    for allowed in (False, True):
        with tf32(allowed):
            found = outcome(ours(shape, torch.float32), given)
        errors.append([float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted)])
    assert max(errors[0]) < 1e-5
    assert max(errors[1]) < 1e-2


_COMPILED = """
import triton.language as tl
from cgo.runtime.triton_kernels import convolution
from support.triton_compiler import compile_kernel

POINTERS = {"x", "weight", "bias", "y", "gradient"}

def compiled(kernel, dtype, **constants):
    types = {name: "*" + dtype if name in POINTERS else "i32" for name in kernel.arg_names}
    compile_kernel(kernel, types | {"held": "*fp32"}, constants)

tiles = {"ROWS": 16, "COLUMNS": 64, "ACC": tl.float32}
compiled(convolution._convolve, "fp32", KERNEL=3, BACK=True, bias=None, DEPTH=16,
         PRECISION="tf32", **tiles)
compiled(convolution._convolve, "bf16", KERNEL=1, BACK=False, DEPTH=32, PRECISION="ieee", **tiles)
compiled(convolution._weigh, "fp32", KERNEL=3, DEPTH=64, PRECISION="tf32", **tiles)
print("compiled")
"""


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="no compiler for CUDA here")
def test_the_compiler_for_cuda_takes_the_kernels(tmp_path):
    assert run_compiling(_COMPILED, tmp_path) == "compiled\n"
