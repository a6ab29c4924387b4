"""Calls that torch would take, and then end the process by; every operator with drawn arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cgo.graph import Node, Ref, Symbol, TensorType
from cgo.runtime.unchecked import refusal

TESTS = Path(__file__).parent.parent
X = Ref("x", 0)
BIG = 2**31


def refused(op, *args, shape=(4, 3), reads=1, **kwargs):
    node = Node("n", op, args, tuple(kwargs.items()), (), frozenset({"a"}))
    return refusal(node, [TensorType("float32", shape)] * reads)


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        ("aten.cat.default", ((),), "no tensors in tensors"),
        ("aten.softmax.int", (X, 1, 6), "dtype 6 is no dtype"),
        ("aten.softmax.int", (X, 1, Symbol("layout", "strided")), "is no dtype"),
        ("aten.max_pool2d.default", (X, (BIG, 1)), "kernel_size (2147483648, 1) is beyond 32 bits"),
        ("aten.conv1d.default", (X, X, None, (1,), (0,), (-BIG,)), "dilation (-2147483648,) is"),
        ("aten.tensor_split.sections", (X, BIG), "sections 2,147,483,648; at most 65,536"),
        ("aten.combinations.default", (X, BIG), "r 2,147,483,648; at most 65,536"),
        ("aten.native_channel_shuffle.default", (X, 0), "groups 0"),
        ("aten.special_multigammaln.default", (X, BIG), "p 2,147,483,648; at most 65,536"),
        ("aten.histogram.bin_ct", (X, BIG), "bins 2147483648; at most 16,777,216"),
        ("aten.histogramdd.int_bins", (X, 300), "bins 300; at most 16,777,216"),
        ("aten.histogramdd.default", (X, (300, 300, 300)), "bins (300, 300, 300); at most"),
        ("aten._fft_r2c.default", (X, (-2,), 0, True), "dim (-2,) of 2 dimensions"),
        ("aten._fft_r2c.default", (X, (2,), 0, True), "dim (2,) of 2 dimensions"),
        ("aten._fft_c2c.default", (X, (1, 1), 0, True), "dim (1, 1) of 2 dimensions"),
        ("aten._fft_c2c.default", (X, (1, 0), 3, True), "normalization 3"),
        ("aten.as_strided.default", (X, (4, 4), (3, 1)), "reaches over 13 of 12 elements"),
        ("aten.as_strided.default", (X, (4,), (-1,)), "size [4], stride [-1], offset 0"),
        ("aten.as_strided.default", (X, 4, (1,)), "are no lists of numbers"),
    ],
)
def test_what_torch_does_not_check(op, args, reason):
    said = refused(op, *args)
    assert said.startswith(f"{op}: ")
    assert reason in said


def test_a_step_of_less_than_one_in_whole_numbers():
    said = refused("aten.range.step", 2.0, 5.0, 0.5, dtype=Symbol("dtype", "int8"))
    assert said == "aten.range.step: step 0.5 is none in int8"
    assert refused("aten.range.step", 2.0, 5.0, 0.5, dtype=Symbol("dtype", "float32")) is None
    assert refused("aten.range.step", 2.0, 5.0, 1.5, dtype=Symbol("dtype", "int8")) is None


def test_norms_of_nothing():
    op = "aten._weight_norm.default"
    assert refused(op, X, X, shape=(2, 0), reads=2) == f"{op}: no elements"
    assert refused(op, X, X, shape=(2, 1), reads=2) is None


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.cat.default", ((X,),)),
        ("aten.softmax.int", (X, 1, Symbol("dtype", "float32"))),
        ("aten.conv1d.default", (X, X, None, (1,), (BIG - 1,), (BIG - 1,))),
        ("aten.tensor_split.sections", (X, 2**16)),
        ("aten._fft_c2c.default", (X, (1, 0), 2, True)),
        ("aten.as_strided.default", (X, (4, 3), (3, 1))),
        ("aten.histogram.bin_ct", (X, 100)),
        ("aten.histogram.bins_tensor", (X, X)),
        ("aten.histogramdd.int_bins", (X, 100)),
        ("cgo.batch_norm", (X, (), 7)),
    ],
)
def test_what_it_does_check(op, args):
    assert refused(op, *args) is None


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_no_operator_ends_its_process_or_writes_what_it_reads(part):
    """Of 60 drawn calls of each operator, those that are admitted."""
    done = subprocess.run(
        [sys.executable, "-m", "support.all_calls", "60", str(part), "4"],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
