"""What a training step computes and moves, counted, and what the device can do, measured.

The least time of a step is the longer of its FLOPs over the measured peak and its bytes over the
measured bandwidth. Bytes are those of ATen calls run one by one, as if no two were fused: a program
that fuses elementwise operators may move less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from cgo.bench.methods import Solo
from cgo.runtime.precision import tf32

#: Calls that give memory without touching it.
_UNTOUCHED = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step, and its calls of operators that are no views."""

    flops: int
    moved: int  # bytes read and written
    calls: int = field(default=0, compare=False)

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.moved * times, self.calls * times)


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of what ATen calls are given and give; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in _UNTOUCHED:
            self.moved += sum(map(_size, tree_iter((args, kwargs, result))))
            self.calls += 1
        return result


def _size(value: Any) -> int:
    """Bytes; an expanded tensor has those that it lies on."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def work_of(action: Callable[[], Any]) -> Work:
    """FLOPs and bytes of a call."""
    moved = _Bytes()
    with FlopCounterMode(display=False) as flops, moved:
        action()
    return Work(flops.get_total_flops(), moved.moved, moved.calls)


def step_work(solo: Solo) -> Work:
    """Of a training step of one model, its optimizer's included; the model takes two steps."""
    solo.step()  # moments and gradients are there afterwards
    return work_of(solo.step)


def forward_work(part: nn.Module, x: Tensor) -> Work:
    """Of a forward without gradients."""
    with torch.no_grad():
        return work_of(lambda: part(x))


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: FLOP/s of a large product, and bytes/s of a large copy."""

    flops: float
    tf32_flops: float | None  # with TF32 allowed; None where there is none
    bandwidth: float

    def least_s(self, work: Work, *, tf32: bool) -> float:
        """The least seconds that this work takes."""
        peak = self.tf32_flops if tf32 and self.tf32_flops else self.flops
        return max(work.flops / peak, work.moved / self.bandwidth)


def measure_ceilings(device: torch.device, *, reduced: bool) -> Ceilings:
    """Measure them in float32: a product of 8192 (reduced: 1024) rows, a copy of 1 GiB (64 MiB)."""
    rows, size = (1024, 2**24) if reduced else (8192, 2**28)
    a, b = (torch.randn(rows, rows, device=device) for _ in range(2))
    product = torch.empty_like(a)
    with tf32(False):
        plain = 2 * rows**3 / seconds(lambda: torch.mm(a, b, out=product), device)
    fast = None
    if device.type == "cuda":
        with tf32(True):
            fast = 2 * rows**3 / seconds(lambda: torch.mm(a, b, out=product), device)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    copied = 2 * 4 * size / seconds(lambda: target.copy_(source), device)
    return Ceilings(plain, fast, copied)


def seconds(action: Callable[[], Any], device: torch.device, rounds: int = 9) -> float:
    """Least wall seconds of a call, the device's work included: what it takes undisturbed."""
    found = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
