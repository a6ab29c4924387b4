"""What single operators of many models cost on a GPU, form by form, captured; in half a minute.

    python benchmarks/gpu_operators.py --out benchmarks/results/gpu_operators.json
    python benchmarks/gpu_operators.py --device cpu --reduced    # that it runs

Each row is a forward and backward of M members' operator. Its forms: a loop on one stream and on
several, one grouped kernel in both memory formats, products of unfolded images. Times are of a
captured graph's replays, so launches from Python do not count. `floor` is the time that reading and
writing each value once takes at the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_counting import measure_ceilings
from torch import Tensor
from torch.nn import functional as F

from cgo import bench
from cgo.runtime.accelerator import Accelerator, CaptureRefused, accelerator_for
from cgo.runtime.forms.convolution import products_of_channels
from cgo.runtime.fused_norms import trained
from cgo.runtime.grouped_convolutions import convolved
from cgo.runtime.triton_kernels import usable

LAST = torch.channels_last


@dataclass(frozen=True)
class Convolution:
    """M convolutions of one shape: (N, C, H, W) to (N, O, H / stride, W / stride)."""

    members: int
    samples: int
    channels: int
    outputs: int
    image: int
    kernel: int = 3
    stride: int = 1

    @property
    def bytes(self) -> int:
        """Moved by a forward and backward that read and write each value once, float32."""
        inside = self.samples * self.channels * self.image**2
        outside = self.samples * self.outputs * (self.image // self.stride) ** 2
        return 4 * self.members * 3 * (inside + outside)

    @property
    def padding(self) -> int:
        return self.kernel // 2


CONVOLUTIONS = {
    "cnn first": Convolution(32, 64, 3, 16, 32),
    "cnn second": Convolution(32, 64, 16, 32, 32),
    "cells 3x3 16": Convolution(32, 64, 16, 16, 32),
    "cells 1x1 16": Convolution(32, 64, 16, 16, 32, kernel=1),
    "cells 3x3 64": Convolution(32, 64, 64, 64, 8),
    "narrow 3x3 8": Convolution(64, 256, 8, 8, 32),
    "narrow 3x3 64": Convolution(64, 256, 64, 64, 4),
    "narrow stride": Convolution(64, 256, 8, 16, 32, stride=2),
    "wide 3x3 64": Convolution(4, 64, 64, 64, 32),
    "wide 3x3 512": Convolution(4, 64, 512, 512, 4),
}


@dataclass
class Row:
    """Seconds by form; why a form could not be timed."""

    name: str
    floor_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Timing:
    """Times bodies as captured, forward and backward, within a time of its own."""

    def __init__(self, accelerator: Accelerator, rounds: int) -> None:
        self.accelerator, self.rounds = accelerator, rounds

    def forms(self, row: Row, forms: dict[str, Callable[[], list[Tensor]]]) -> Row:
        for name, form in forms.items():
            try:
                row.seconds[name] = self.seconds(form)
            except (RuntimeError, CaptureRefused) as error:
                row.failed[name] = str(error).partition("\n")[0][:200]
        return row

    def seconds(self, form: Callable[[], list[Tensor]]) -> float:
        with torch.autograd.set_multithreading_enabled(False):
            form()  # chooses kernels, which cuDNN keeps for each thread
        captured = self.accelerator.capture(form)
        captured.replay()
        times = [self.accelerator.seconds(captured.replay) for _ in range(self.rounds)]
        return statistics.median(times)


def gradients(results: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Of the sum of all results."""
    ones = [torch.ones_like(result) for result in results]
    return list(torch.autograd.grad(results, [v for v in values if v.requires_grad], ones))


def convolutions(
    shape: Convolution, device: torch.device, dtype: torch.dtype, accelerator: Accelerator
) -> dict[str, Callable[[], list[Tensor]]]:
    """The forms of a convolution, over values of their own."""
    m, n, c, o, s = shape.members, shape.samples, shape.channels, shape.outputs, shape.image
    given: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding}

    def made(*size: int, last: bool = False) -> Tensor:
        value = torch.rand(*size, device=device, dtype=dtype)
        return (value.to(memory_format=LAST) if last else value).requires_grad_()

    def looped(last: bool, several: bool) -> Callable[[], list[Tensor]]:
        xs = [made(n, c, s, s, last=last) for _ in range(m)]
        ws = [made(o, c, shape.kernel, shape.kernel, last=last) for _ in range(m)]
        found: dict[int, list[Tensor]] = {}

        def one(i: int) -> None:
            found[i] = gradients([F.conv2d(xs[i], ws[i], **given)], [xs[i], ws[i]])

        def some(start: int) -> Callable[[], None]:
            return lambda: [one(i) for i in range(start, m, 4)] and None

        def run() -> list[Tensor]:
            if several:
                accelerator.side_by_side([some(start) for start in range(4)])
            else:
                for i in range(m):
                    one(i)
            return [gradient for i in range(m) for gradient in found[i]]

        return run

    def grouped(last: bool) -> Callable[[], list[Tensor]]:
        x = made(n, m * c, s, s, last=last)
        w = made(m * o, c, shape.kernel, shape.kernel, last=last)
        return lambda: gradients([F.conv2d(x, w, groups=m, **given)], [x, w])

    def unfolded() -> Callable[[], list[Tensor]]:
        x, w = made(m, n, c, s, s), made(m, o, c * shape.kernel**2)

        def run() -> list[Tensor]:
            columns = F.unfold(x.flatten(0, 1), shape.kernel, **given)
            columns = columns.view(m, n, *columns.shape[1:])
            return gradients([torch.einsum("moc,mncp->mnop", w, columns)], [x, w])

        return run

    def pixels() -> Callable[[], list[Tensor]]:
        x, w = made(m, n * s * s, c), made(m, o, c)
        return lambda: gradients([torch.bmm(x, w.transpose(1, 2))], [x, w])

    def ours() -> Callable[[], list[Tensor]]:
        x = made(n, m * c, s, s)
        w = made(m * o, c, shape.kernel, shape.kernel)
        rest = m, shape.stride, shape.padding, dtype
        return lambda: gradients([convolved(x, w, None, *rest)], [x, w])

    def products() -> Callable[[], list[Tensor]]:
        x, w = made(n, m * c, s, s), made(m, o, c, 1, 1)
        return lambda: gradients([products_of_channels(x, w, None)], [x, w])

    forms = {
        "loop": looped(False, False),
        "loop, 4 streams": looped(False, True),
        "loop last, 4 streams": looped(True, True),
        "grouped": grouped(False),
        "grouped last": grouped(True),
        "unfolded": unfolded(),
    }
    if shape.kernel == 1:
        forms["product of pixels"] = pixels()
        forms["products of channels"] = products()
    if usable(device):
        forms["kernel of ours"] = ours()
    return forms


def norms(device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """Batch norm, activation and addition over M*C channels, in both memory formats."""
    m, n, c, s = (32, 64, 16, 32) if device.type == "cuda" else (2, 2, 4, 4)

    def norm(last: bool, relu: bool) -> Callable[[], list[Tensor]]:
        x = torch.rand(n, m * c, s, s, device=device)
        x = (x.to(memory_format=LAST) if last else x).requires_grad_()
        mean, var, w, b = (torch.ones(m * c, device=device) for _ in range(4))
        w, b = w.requires_grad_(), b.requires_grad_()

        def run() -> list[Tensor]:
            y = F.batch_norm(x, mean, var, w, b, training=True)
            return gradients([F.relu(y) if relu else y], [x, w, b])

        return run

    def relu() -> Callable[[], list[Tensor]]:
        x = torch.rand(n, m * c, s, s, device=device, requires_grad=True)
        return lambda: gradients([F.relu(x)], [x])

    def residual(last: bool, kernel: bool) -> Callable[[], list[Tensor]]:
        x, added = (torch.rand(n, m * c, s, s, device=device) for _ in range(2))
        if last:
            x, added = (value.to(memory_format=LAST) for value in (x, added))
        x, added = x.requires_grad_(), added.requires_grad_()
        mean, var, w, b = (torch.ones(m * c, device=device) for _ in range(4))
        w, b = w.requires_grad_(), b.requires_grad_()

        def run() -> list[Tensor]:
            if kernel:
                y = trained(x, w, b, mean, var, 0.1, 1e-5, added, "relu")
            else:
                y = F.relu(F.batch_norm(x, mean, var, w, b, training=True) + added)
            return gradients([y], [x, w, b, added])

        return run

    kernels = (False, True) if usable(device) else (False,)
    chains = {
        f"norm{' last' * last} + added + relu{', kernel of ours' * kernel}": residual(last, kernel)
        for last in (False, True)
        for kernel in kernels
    }
    return chains | {
        "norm": norm(False, False), "norm last": norm(True, False),
        "norm + relu": norm(False, True), "norm last + relu": norm(True, True), "relu": relu(),
    }  # fmt: skip


def optimizers(device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """SGD with momentum for M models of 20 parameters: by torch's kernels, or over flat values."""
    m = 256 if device.type == "cuda" else 2
    own = [[torch.rand(1000, device=device) for _ in range(20)] for _ in range(3 * m)]
    rates = torch.rand(m, device=device)
    flat = [torch.rand(m * 20_000, device=device) for _ in range(4)]

    def step(
        parameters: list[Tensor], grads: list[Tensor], moments: list[Tensor], rate: Any
    ) -> None:
        torch._fused_sgd_(
            parameters,
            grads,
            moments,
            weight_decay=0.0,
            momentum=0.9,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    def kernels() -> list[Tensor]:
        for i in range(m):
            step(own[3 * i], own[3 * i + 1], own[3 * i + 2], rates[i])
        return own[0]

    def together() -> list[Tensor]:
        several = [[t for i in range(m) for t in own[3 * i + part]] for part in range(3)]
        step(*several, rates[0])
        return own[0]

    def vectors() -> list[Tensor]:
        flat[2].mul_(0.9).add_(flat[1])
        return [flat[0].addcmul_(flat[2], flat[3])]

    return {
        "a kernel a model": kernels,
        "one rate for all": together,
        "flat, rates as a vector": vectors,
    }


def launches(device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """A thousand kernels over next to nothing, on one stream and on four."""
    values = [torch.zeros(4, device=device) for _ in range(4)]
    accelerator = accelerator_for(device)

    def branch(value: Tensor) -> Callable[[], None]:
        return lambda: [value.add_(1) for _ in range(250)] and None

    def one() -> list[Tensor]:
        for value in values:
            branch(value)()
        return values

    def four() -> list[Tensor]:
        accelerator.side_by_side([branch(value) for value in values])
        return values

    return {"1000 launches": one, "1000 launches, 4 streams": four}


def rows(device: torch.device, reduced: bool, until: float) -> Iterator[dict[str, Any]]:
    """All rows, as long as there is time."""
    accelerator = accelerator_for(device)
    timing = Timing(accelerator, 2 if reduced else 7)
    bandwidth = measure_ceilings(device, reduced=reduced).bandwidth
    others = {"launches": launches, "norms": norms, "optimizers": optimizers}
    with torch.enable_grad():
        for name, forms in others.items():
            yield {"benchmark": False, **asdict(timing.forms(Row(name, 0.0), forms(device)))}
        for benchmark, dtype in (
            (True, torch.float32),
            (True, torch.bfloat16),
            (False, torch.float32),
        ):
            torch.backends.cudnn.benchmark = benchmark
            for name, shape in CONVOLUTIONS.items():
                if time.monotonic() > until:
                    return
                shape = Convolution(2, 2, 4, 4, 4) if reduced else shape
                forms = convolutions(shape, device, dtype, accelerator)
                row = timing.forms(Row(name, shape.bytes / bandwidth), forms)
                yield {"benchmark": benchmark, "dtype": str(dtype), **asdict(row)}
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, until = torch.device(options.device), time.monotonic() + options.budget_s
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    found: dict[str, Any] = {"device": name, "environment": bench.environment(), "rows": []}
    for row in rows(device, options.reduced, until):
        found["rows"].append(row)
        best = min(row["seconds"].values(), default=1.0)
        forms = ", ".join(f"{k} {1e6 * v:.0f}" for k, v in row["seconds"].items())
        what = f"{row['name']:16} {row.get('dtype', '')[6:]:9} benchmark {row['benchmark']}"
        floor = 1e6 * row["floor_s"]
        print(f"{what}: floor {floor:.0f} us, best {1e6 * best:.0f}; {forms} {row['failed']}")
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
