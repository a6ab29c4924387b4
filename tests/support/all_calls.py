"""Calls of every operator with drawn arguments, each operator in a process of its own.

    PYTHONPATH=tests python -m support.all_calls 100 0 2     100 calls each, of every second one

What is admitted is run, forward and backward. Told is each operator that ends its process, fills
its memory, writes what it reads, or makes a leaf none; the exit status says whether there was one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import torch
from support.calls_drawn import call_of, drawn_call, types_of, types_read
from test_fuzz import operators
from torch import Tensor

from cgo.dtypes import torch_dtype
from cgo.graph import Node, TensorType
from cgo.operators import aten
from cgo.runtime.admission import Calls, torch_arguments
from cgo.runtime.builder import STANDS_IN
from cgo.runtime.watching import Limits

SHAPES = [[4], [4, 3], [3, 4, 5], [2, 3, 8, 8], [], [1], [0], [2, 0, 3], [5, 5], [1, 1, 1, 1]]
OTHERS = [("int64", [4]), ("int64", [4, 3]), ("bool", [4, 3]), ("float64", [2, 3]),
          ("complex64", [4, 3]), ("bfloat16", [3, 3]), ("int32", [2])]  # fmt: skip
TYPES = {
    (f"n{index}", 0): {"dtype": dtype, "shape": shape}
    for index, (dtype, shape) in enumerate([*(("float32", shape) for shape in SHAPES), *OTHERS])
}
#: Seconds for the calls of one operator, and what its process may grow to.
PATIENCE_S, MOST_BYTES = 300, 2**33
CALLS = Calls(Limits.of_memory(2**29))


def value(type_: TensorType, dice: Random) -> Tensor:
    dtype = torch_dtype(type_.dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(-2, 4, type_.shape).to(dtype)
    return torch.randn(type_.shape).to(dtype).requires_grad_(dice.random() < 0.7)


def call(op: str, dice: Random, log: Path) -> str | None:
    """What is wrong with a drawn call, or None."""
    args, kwargs = drawn_call(op, dice, list(TYPES))
    node = call_of(op, args, kwargs)
    log.write_text(f"{op} {args} {kwargs}")
    given = types_read(node, TYPES)
    types = types_of(node, given)
    if not types:
        return None
    node = call_of(op, args, kwargs, types)
    if CALLS.reason(node, given) is not None:
        return None
    return run(node, [value(type_, dice) for type_ in given])


def run(node: Node, read: list[Tensor]) -> str | None:
    learning = [tensor for tensor in read if tensor.requires_grad]
    args, kwargs = torch_arguments(node, read)
    with contextlib.suppress(Exception):  # an error is the model's own failure
        result = STANDS_IN.get(node.op, aten(node.op))(*args, **kwargs)
        several = result if isinstance(result, (list, tuple)) else [result]
        torch.autograd.backward([x.abs().sum() for x in several if x.requires_grad])
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MOST_BYTES:
        return "takes memory that its types do not show"
    if any(tensor._version for tensor in read):
        return "writes what it reads"
    return None if all(tensor.is_leaf for tensor in learning) else "makes a leaf none"


def in_a_child(op: str, count: int, log: Path) -> bool:
    """Whether something is wrong with an operator; prints what."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # not before: a pool of threads does not outlive a fork
        signal.alarm(PATIENCE_S)
        resource.setrlimit(resource.RLIMIT_AS, (2 * MOST_BYTES, 2 * MOST_BYTES))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        found = (call(op, Random(f"{op}{index}"), log) for index in range(count))
        wrong = next((wrong for wrong in found if wrong is not None), None)
        if wrong is not None:
            print(f"{op} {wrong}", flush=True)
        os._exit(wrong is not None)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        print(f"{op} ends by {signal.Signals(-status).name}", flush=True)
    if status:
        print(f"    {log.read_text()}", flush=True)
    return status != 0


def main(count: int, part: int, parts: int) -> bool:
    warnings.simplefilter("ignore")
    log = Path(tempfile.mkdtemp()) / "call"
    return any([in_a_child(op, count, log) for op in operators()[part::parts]])


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
