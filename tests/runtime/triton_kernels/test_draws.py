"""Draws of all lanes in one launch: the numbers of the streams' definition."""

import pytest
import torch
from support.triton_compiler import run_compiling

from cgo.runtime import triton_kernels
from cgo.runtime.keyed_draws import Draw, fill, stream_key

if not triton_kernels.installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from cgo.runtime.triton_kernels.draws import Segment, Table, kind_of

DRAWS = [
    ("dropout", {"p": 0.3}), ("dropout", {"p": 1.0}), ("bernoulli", {"p": 0.7}),
    ("bernoulli", {"p": 0.0}), ("uniform", {}), ("uniform", {"low": -0.3, "high": 0.11}),
    ("uniform", {"low": 0.5, "high": 0.5}), ("normal", {}), ("normal", {"mean": 1.0, "std": 0.3}),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: Lanes of one table: begin, elements, counter; more than one tile, less than a block.
LANES = [(0, 1025, 0), (1088, 2, 1), (1152, 2300, 2)]
ELEMENTS = 3500


def device_of():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


#: All that have a kernel.
CASES = [
    (distribution, given, dtype)
    for distribution, given in DRAWS
    for dtype in DTYPES
    if (distribution, dtype) != ("uniform", torch.bfloat16)
]


def both(distribution, given, dtype):
    """Filled by the kernel, and by the definition; and where."""
    device = device_of()
    counts = torch.tensor([3, 0, 2**33 + 5], device=device)
    draws = [Draw(distribution, given, stream_key(2**62 + 1, order, 0)) for order in range(3)]
    found = torch.full((ELEMENTS,), 9.0, dtype=dtype, device=device)
    wanted = found.clone()
    kind = kind_of(draws[0], dtype)
    segments = [Segment(*lane[:2], draw, lane[2]) for lane, draw in zip(LANES, draws)]
    Table(kind, segments, dtype, device).fill(found, counts)
    for segment in segments:
        place = wanted[segment.start : segment.start + segment.elements]
        fill(place, segment.draw, counts[segment.slot])
    return found, wanted


@pytest.mark.parametrize(("distribution", "given", "dtype"), CASES)
def test_the_kernel_draws_what_the_definition_says(distribution, given, dtype):
    found, wanted = both(distribution, given, dtype)
    if distribution == "normal":  # by other logarithms and cosines
        torch.testing.assert_close(found, wanted)
    else:
        assert torch.equal(found, wanted)
    assert bool((found[1025:1088] == 9).all())
    assert bool((found[3452:] == 9).all())


def test_only_floating_numbers_of_three_distributions_have_kernels():
    kinds = {name: kind_of(Draw(name, {}, 0), torch.float32) for name in
             ("dropout", "bernoulli", "uniform", "normal", "cauchy", "randint")}  # fmt: skip
    assert kinds == {"dropout": "masks", "bernoulli": "masks", "uniform": "uniforms",
                     "normal": "normals", "cauchy": None, "randint": None}  # fmt: skip
    assert kind_of(Draw("bernoulli", {}, 0), torch.int64) is None
    assert kind_of(Draw("uniform", {}, 0), torch.bfloat16) is None


def test_lanes_that_begin_and_end_at_multiples_of_four_are_filled_the_same():
    draws = [Draw("dropout", {"p": 0.3}, stream_key(1, order, 0)) for order in range(2)]
    counts = torch.tensor([4], device=device_of())
    found = torch.full((2048,), 9.0, device=device_of())
    segments = [Segment(0, 1028, draws[0], 0), Segment(1028, 1020, draws[1], 0)]
    Table("masks", segments, found.dtype, found.device).fill(found, counts)
    wanted = torch.empty_like(found)
    for segment in segments:
        fill(wanted[segment.start :][: segment.elements], segment.draw, counts[0])
    assert torch.equal(found, wanted)


#: Prints the assembly.
COMPILE = """
from cgo.runtime.triton_kernels import draws
from support.triton_compiler import compile_kernel

types = dict(out="*fp32", tiles="*i32", segments="*i64", numbers="*fp64", counts="*i64")
given = dict(COLUMNS=6, BLOCKS=256, WIDE=False, ALIGNED=True)
for kernel in draws._KERNELS.values():
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    compiled = compile_kernel(kernel, types, given, aligned, enable_fp_fusion=False)
    assert compiled.asm["cubin"]
    print(compiled.asm["ptx"], "// end of kernel")
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    printed = run_compiling(COMPILE, tmp_path)
    masks, uniforms, normals, _ = printed.split("// end of kernel")
    for kernel in (masks, uniforms):  # four elements a store
        assert kernel.count("st.global.v4.b32") == kernel.count("st.global") == 2
    assert "st.global.v2.b32" in normals
    assert "fma.rn.f64" not in uniforms  # the range's numbers are the same to the bit


@pytest.mark.gpu
def test_a_captured_draw_goes_on_with_the_counter(cuda):
    draw = Draw("dropout", {"p": 0.4}, stream_key(1, 0, 0))
    counts = torch.zeros(1, dtype=torch.int64, device=cuda)
    out = torch.zeros(5000, device=cuda)
    table = Table("masks", [Segment(0, 5000, draw, 0)], out.dtype, cuda)
    table.fill(out, counts)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.fill(out, counts)
        counts.add_(1)
    wanted = torch.empty_like(out)
    for step in range(3):
        graph.replay()
        fill(wanted, draw, torch.tensor(step, device=cuda))
        assert torch.equal(out, wanted)
