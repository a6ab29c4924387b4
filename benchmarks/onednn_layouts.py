"""Which convolutions oneDNN computes wrongly, or writes beyond their memory, by memory format.

    python benchmarks/onednn_layouts.py [--random 1500] [--isa AVX2 SSE41]

Forward and backward of thousands of convolutions, contiguous and with channels last, for each
instruction set that oneDNN can be limited to. Children run them under `guarded_malloc.c` (built
with `cc`; Linux): it counts blocks that were written beside, and fills memory with NaN, so that
what nobody wrote shows in the values, which are compared with float64. `runtime/unsafe.py` holds
the rule that follows.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from cgo.runtime.unsafe import needs_contiguous

HERE = Path(__file__).parent
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: oneDNN's names; one that the processor does not have limits nothing.
INSTRUCTION_SETS = ("DEFAULT", "AVX2", "SSE41")
REPETITIONS = 2
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2}  # relative to the largest value


@dataclass(frozen=True)
class Case:
    """One convolution; channels are those of one group."""

    channels: int
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    more: tuple[int, int] = (0, 0)  # pixels that a transposed one adds to its output
    groups: int = 1
    size: tuple[int, int] = (8, 8)
    batch: int = 4
    bias: bool = False
    transposed: bool = False
    dtype: str = "float32"

    @property
    def possible(self) -> bool:
        """Whether the result has pixels."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        if self.transposed:
            pairs = zip(self.size, self.stride, self.padding, spans)
            return all((n - 1) * s - 2 * p + span > 0 for n, s, p, span in pairs)
        return all(n + 2 * p >= span for n, p, span in zip(self.size, self.padding, spans))


# --- cases ----------------------------------------------------------------------------------------


def cases(drawn: int) -> list[Case]:
    """Grids over channels, kernels, strides and groups, and random ones over everything."""
    grids = [_pixels(), _transposed_pixels(), _plain(), _grouped(), _dilated(), _drawn(drawn)]
    found = itertools.chain(*grids)
    return [case for case in dict.fromkeys(found) if case.possible]


def _pixels() -> Iterator[Case]:
    """1x1 kernels with a stride that divides the image: oneDNN copies the pixels that count."""
    widths = (*range(1, 18), 20, 24, 32, 33)
    given = itertools.product(widths, (4, 16), ((2, 2), (3, 3), (2, 1)), (6, 24, 48, 64), ALLOWED)
    for channels, out, stride, size, dtype in given:
        yield Case(channels, out, stride=stride, size=(size, size), batch=2, dtype=dtype)


def _transposed_pixels() -> Iterator[Case]:
    """Their transposes: what was the input is the gradient of the output."""
    widths = (*range(1, 18), 24, 33)
    for channels, out, stride in itertools.product((4, 16), widths, (2, 3)):
        for size, dtype in itertools.product((3, 12, 24, 32), ALLOWED):
            yield Case(
                channels, out, stride=(stride, stride), more=(stride - 1,) * 2, size=(size, size),
                batch=2, transposed=True, dtype=dtype,
            )  # fmt: skip


def _plain() -> Iterator[Case]:
    outs = (1, 2, 3, 4, 8, 16, 17)
    for kernel, stride, channels, out in itertools.product((1, 3), (1, 2), range(1, 19), outs):
        for size in (8, 17):
            pads = (kernel // 2,) * 2
            yield Case(channels, out, (kernel,) * 2, (stride,) * 2, pads, size=(size, size))


def _grouped() -> Iterator[Case]:
    given = itertools.product((2, 3, 8), (1, 2, 3, 4, 7, 8, 9, 12, 16), (1, 2, 4, 8), (1, 3))
    for groups, channels, out, kernel in given:
        for stride, size in itertools.product((1, 2), (8, 48)):
            yield Case(
                channels, out, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, groups=groups,
                size=(size, size),
            )  # fmt: skip


def _dilated() -> Iterator[Case]:
    """3x3 kernels with holes, depthwise ones and transposes among them."""
    widths = (1, 2, 3, 4, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48)
    given = itertools.product(widths, (1, 2, 3, 16), (1, 2), (False, True), ALLOWED)
    for channels, groups, stride, transposed, dtype in given:
        for other in {1: (1, 2)}.get(channels, (8,)):
            ends = (other, channels) if transposed else (channels, other)
            size = 32 // (stride if transposed else 1)
            yield Case(
                *ends, (3, 3), (stride, stride), (2, 2), (2, 2), groups=groups, size=(size, size),
                batch=1, transposed=transposed, dtype=dtype,
            )  # fmt: skip


def _drawn(count: int) -> Iterator[Case]:
    draw = random.Random(0)

    def pair(*values: int) -> tuple[int, int]:
        one = draw.choice(values)
        return (one, one) if draw.random() < 0.7 else (one, draw.choice(values))

    few = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64)
    for _ in range(count):
        groups = draw.choice((1, 1, 1, 2, 3, 4, 6, 8, 16))
        depthwise = groups > 1 and draw.random() < 0.3
        yield Case(
            channels=1 if depthwise else draw.choice(few),
            out=draw.choice((1, 1, 2)) if depthwise else draw.choice(few),
            kernel=pair(1, 1, 1, 2, 3, 3, 5, 7),
            stride=pair(1, 1, 2, 2, 3, 4),
            padding=pair(0, 0, 1, 2, 3),
            dilation=pair(1, 1, 1, 2, 3),
            groups=groups,
            size=pair(1, 2, 3, 4, 5, 7, 8, 11, 14, 16, 17, 32, 48),
            batch=draw.choice((1, 2, 3, 8, 16)),
            bias=draw.random() < 0.5,
            transposed=draw.random() < 0.3,
            dtype=draw.choice(("float32", "float32", "bfloat16")),
        )


# --- a child --------------------------------------------------------------------------------------


def child(path: Path, first: int) -> None:
    """Run cases from `first` on; a line before and after each."""
    torch.set_num_threads(1)
    damage = ctypes.CDLL(None).guarded_damage
    damage.restype = ctypes.c_long
    known = damage()
    for number, item in enumerate(json.loads(path.read_text())[first:], first):
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items()}
        case = Case(**fields)
        for name in FORMATS:
            print(json.dumps({"begun": number, "format": name}), flush=True)
            wrong = {what for seed in range(REPETITIONS) for what in wrong_values(case, name, seed)}
            if (damaged := damage()) > known:
                wrong.add("written beside")
            known = damaged
            print(json.dumps({"done": number, "format": name, "wrong": sorted(wrong)}), flush=True)


def wrong_values(case: Case, name: str, seed: int) -> list[str]:
    """What differs from float64: "result", "input", "weight", "bias" (gradients), or nothing."""
    given, upper, exact = _reference(case, seed)
    found = _both(case, [_laid(given[0], name), *given[1:]], _laid(upper, name))
    terms = upper.numel() / upper.shape[1]  # of each element of the bias's gradient
    near = [
        bool(((value.double() - wanted).abs() <= ALLOWED[case.dtype] * scale).all())
        for value, wanted in zip(found, exact)
        for scale in [max(float(wanted.abs().max()), math.sqrt(terms) * (wanted.ndim == 1), 1e-30)]
    ]  # NaN is not near
    return [n for n, there in zip(("result", "input", "weight", "bias"), near) if not there]


@functools.lru_cache(REPETITIONS)
def _reference(case: Case, seed: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Input, weight and bias; the gradient of the result; result and gradients in float64."""
    torch.manual_seed(seed)
    inputs, outputs = case.channels * case.groups, case.out * case.groups
    ends = (inputs, case.out) if case.transposed else (outputs, case.channels)
    shapes = [(case.batch, inputs, *case.size), (*ends, *case.kernel), (outputs,)]
    dtype = getattr(torch, case.dtype)
    given = [torch.randn(shape).to(dtype) for shape in shapes[: 2 + case.bias]]
    double = [value.double() for value in given]
    upper = torch.randn(_convolved(case, double).shape).to(dtype)
    return given, upper, _both(case, double, upper.double())


def _laid(value: Tensor, name: str) -> Tensor:
    """In a memory format; of one channel or pixel as well, where both would pass for the other."""
    order = (0, 2, 3, 1) if name == "channels_last" else (0, 1, 2, 3)
    rows = value.permute(order).flatten().view([value.shape[axis] for axis in order])
    return rows.permute([order.index(axis) for axis in range(4)])


def _convolved(case: Case, given: list[Tensor]) -> Tensor:
    bias = given[2] if case.bias else None
    rest = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    if case.transposed:
        more = {"output_padding": case.more, "groups": case.groups}
        return F.conv_transpose2d(given[0], given[1], bias, **rest, **more)
    return F.conv2d(given[0], given[1], bias, groups=case.groups, **rest)


def _both(case: Case, given: list[Tensor], upper: Tensor) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in given]
    result = _convolved(case, leaves)
    return [result.detach(), *torch.autograd.grad([result], leaves, [upper])]


# --- the parent -----------------------------------------------------------------------------------


def search(isa: str, listed: list[Case], folder: Path) -> dict[str, Any]:
    """All cases under one instruction set."""
    path = folder / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in listed]))
    found: dict[tuple[int, str], list[str]] = {}
    first = 0
    while first < len(listed):
        first = _part(isa, path, first, folder, found)
    bad = [(listed[number], name, wrong) for (number, name), wrong in found.items() if wrong]
    left = [asdict(case) | {"format": name} for case, name, _ in bad if not kept_off(case, name)]
    return {"cases": len(listed), "wrong": len(bad), "left": left, "kinds": _kinds(bad)}


def kept_off(case: Case, name: str) -> bool:
    """Whether the rule keeps a case out of a format."""
    operator = "aten.conv_transpose2d" if case.transposed else "aten.conv2d"
    shape = (case.out if case.transposed else case.channels, *case.kernel)
    arguments = {
        "weight": SimpleNamespace(shape=(0, *shape)),
        "stride": case.stride,
        "dilation": case.dilation,
    }
    unsafe = needs_contiguous(operator, arguments, case.groups, case.dtype)
    return unsafe and name == "channels_last"


def _part(isa: str, path: Path, first: int, folder: Path, found: dict[Any, list[str]]) -> int:
    """One child's part; the number of the case to go on with."""
    env = {
        **os.environ, "LD_PRELOAD": str(folder / "guarded.so"), "ONEDNN_MAX_CPU_ISA": isa,
        "OMP_NUM_THREADS": "1",
        # Primitives that stay in a cache would be looked at after each case.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", str(path), "--first", str(first)]
    told = folder / f"{isa}.txt"
    with told.open("w") as file:
        done = subprocess.run(command, env=env, stdout=file, check=False)
    last: dict[str, Any] = {}
    for line in told.read_text().splitlines():
        last = json.loads(line)
        if "done" in last:
            found[last["done"], last["format"]] = last["wrong"]
    if not last:
        raise RuntimeError(f"a child ended with {done.returncode} before its first case")
    if done.returncode and "begun" in last:
        found[last["begun"], last["format"]] = [f"ended with {done.returncode}"]
    number = last.get("done", last.get("begun"))
    assert isinstance(number, int)
    return number + 1


def _kinds(bad: list[tuple[Case, str, list[str]]]) -> list[dict[str, Any]]:
    """What is wrong, for each kind of convolution, with the channels it was seen for."""
    kinds: dict[tuple[Any, ...], list[Case]] = defaultdict(list)
    for case, name, wrong in bad:
        shape = "1x1" if case.kernel == (1, 1) else "larger"
        strided = "1" if case.stride == (1, 1) else "more"
        grouped = "1" if case.groups == 1 else "more"
        holes = "1" if case.dilation == (1, 1) else "more"
        what = "conv_transpose2d" if case.transposed else "conv2d"
        kind = (what, case.dtype, shape, strided, holes, grouped, name, ", ".join(wrong))
        kinds[kind].append(case)
    keys = ("operator", "dtype", "kernel", "stride", "dilation", "groups", "format", "wrong")
    return [
        {
            **dict(zip(keys, kind)),
            "seen": len(members),
            "channels": dict(sorted(Counter(case.channels for case in members).items())),
            "out": dict(sorted(Counter(case.out for case in members).items())),
            "example": asdict(members[0]),
        }
        for kind, members in sorted(kinds.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=1500)
    parser.add_argument("--isa", nargs="+", default=INSTRUCTION_SETS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.first)
        return
    with tempfile.TemporaryDirectory() as name:
        guard = str(HERE / "guarded_malloc.c")
        build = ["cc", "-O2", "-shared", "-fPIC", "-o", f"{name}/guarded.so", guard, "-lpthread"]
        subprocess.run(build, check=True)
        listed = cases(options.random)
        found = {isa: search(isa, listed, Path(name)) for isa in options.isa}
    common.write(
        "onednn_layouts",
        {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "formats": list(FORMATS),
            "repetitions": REPETITIONS,
            "instruction_sets": found,
        },
    )


if __name__ == "__main__":
    main()
