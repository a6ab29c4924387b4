"""What a device can do: the figures that rules, estimates and budgets are made of.

A prior comes from what vendors publish (`cgo.runtime.known_devices`). A CUDA device is measured
once, when a trial first has time for it, and what was found is kept with its costs. A CPU's figures
are those that its rules were tuned with: measured ones would change choices from run to run.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cgo.runtime.accelerator import Accelerator, captured_seconds, without_frames
from cgo.runtime.known_devices import published
from cgo.runtime.precision import tf32

if TYPE_CHECKING:
    from cgo.runtime.cost_table import CostTable

log = logging.getLogger(__name__)

#: Precisions of products, by the names that rates have.
PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do.

    Args:
        name: As the device calls itself.
        kind: "cpu" or "cuda".
        cache_bytes: Of a core's own cache; on a GPU of the one that all share.
        turn_bytes: What the models of one program may give in a step, before others take turns.
        bandwidth: Bytes a second, of the memory.
        launch_s: Seconds between two kernels of a captured step; on a CPU of an operator's call.
        rates: FLOP/s of large products, by precision.
        measure_s: What measuring a group takes beside running it.
        search_s: What cuDNN takes to time its kernels for a convolution, forward and backward.
        source: "tuned", "published" or "measured".
    """

    name: str
    kind: str
    cache_bytes: float
    turn_bytes: float
    bandwidth: float
    launch_s: float
    rates: Mapping[str, float]
    measure_s: float
    search_s: float
    source: str

    def seconds(
        self, moved_bytes: float, flops: float = 0.0, precision: str = "float32", launches: int = 1
    ) -> float:
        """The least time that work takes: launching, and moving or computing, whichever is longer.

        Source: the roofline of Williams, Waterman and Patterson, CACM 52 (2009).
        """
        rate = self.rates.get(precision, self.rates["float32"])
        return launches * self.launch_s + max(moved_bytes / self.bandwidth, flops / rate)

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "rates": dict(self.rates)}

    @classmethod
    def from_json(cls, values: Any) -> DeviceProfile | None:
        """From what `as_json` gave; None from anything else, which is then measured again."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            return None
        texts = ("name", "kind", "source")
        rates = values["rates"]
        if not isinstance(rates, dict) or rates.keys() != set(PRECISIONS):
            return None
        numbers = [*rates.values(), *(values[n] for n in names - {*texts, "rates"})]
        if not all(isinstance(values[text], str) for text in texts):
            return None
        return cls(**values) if all(map(_is_positive, numbers)) else None


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and not math.isnan(value)


#: The CPU that its rules were tuned on, one thread: a core's cache of 2 MiB, 24 MB of a shared one.
CPU = DeviceProfile(
    name="cpu",
    kind="cpu",
    cache_bytes=2**21,
    turn_bytes=24e6,
    bandwidth=1e10,
    launch_s=5e-6,
    rates=dict(zip(PRECISIONS, (4.7e10, 9.5e10, 9.5e10, 9.5e10, 9.5e10))),
    measure_s=5e-3,
    search_s=math.inf,
    source="tuned",
)


def prior(
    name: str, capability: tuple[int, int], multiprocessors: int, cache_bytes: int = 0
) -> DeviceProfile:
    """What is to be expected of a CUDA device, from what its vendor publishes.

    Of a device that is not in the table, rates are those of the most similar one, scaled by the
    number of multiprocessors.

    Args:
        name: As the driver gives it.
        capability: Of CUDA.
        multiprocessors: That the device has.
        cache_bytes: Of the level 2 cache, where the driver says so.
    """
    known = published(name, capability, multiprocessors)
    scale = multiprocessors / known.multiprocessors if multiprocessors else 1.0
    return DeviceProfile(
        name=name,
        kind="cuda",
        cache_bytes=cache_bytes or known.cache_bytes,
        turn_bytes=math.inf,
        bandwidth=known.bandwidth,
        launch_s=_LAUNCH_S,
        rates={name: rate * scale for name, rate in zip(PRECISIONS, known.rates)},
        measure_s=_MEASURE_S,
        search_s=_SEARCH_S,
        source="published",
    )


#: On an H200, torch 2.11: see `cgo.runtime.known_devices`.
_LAUNCH_S = 0.87e-6
_MEASURE_S = 4e-3
_SEARCH_S = 0.5


def prior_of(device: torch.device) -> DeviceProfile:
    """What is to be expected of a device, before it is measured."""
    if device.type != "cuda":
        return CPU
    found = torch.cuda.get_device_properties(device)
    cache = int(getattr(found, "L2_cache_size", 0))
    capability = found.major, found.minor
    return prior(found.name, capability, found.multi_processor_count, cache)


#: Where a profile stands among what is kept with a device's costs.
_KEY = "device profile 1"


def profile_of(
    device: torch.device,
    table: CostTable | None = None,
    measuring: Callable[[DeviceProfile], DeviceProfile] | None = None,
) -> DeviceProfile:
    """A device's profile: as it was measured before, or is now; else its prior.

    Args:
        device: Which.
        table: Of the device's costs, where a measured profile is kept.
        measuring: Measures the device of a prior; None: there is no time for that.
    """
    if device.type != "cuda":
        return CPU
    known = None if table is None else DeviceProfile.from_json(table.recall(_KEY))
    if known is not None or measuring is None:
        return known or prior_of(device)
    found = measuring(prior_of(device))
    if table is not None:
        table.remember(_KEY, found.as_json(), anew=True)
    return found


# --- measuring ------------------------------------------------------------------------------------

#: Kernels over next to nothing that are captured together, to find what launching one takes.
_LAUNCHES = 200

#: What is copied, by kind of device: beyond any cache.
_COPIED_BYTES = {"cuda": 2**28, "cpu": 2**24}

#: Rows of square products, by precision: a few milliseconds on a device of 30 TFLOP/s.
_ROWS = {"float64": 1024, "float32": 4096, "tf32": 4096, "bfloat16": 4096, "float16": 4096}
_CPU_ROWS = 256


def measure(
    accelerator: Accelerator,
    expected: DeviceProfile,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceProfile:
    """Measure a device within about a second; what cannot be measured stays as expected.

    Args:
        accelerator: The device.
        expected: Its prior.
        clock: Of the host.
    """
    launch = _try(lambda: _launch_s(accelerator), expected.launch_s)
    return dataclasses.replace(
        expected,
        bandwidth=_try(lambda: _bandwidth(accelerator), expected.bandwidth),
        launch_s=launch,
        rates={
            name: _try(lambda name=name: _rate(accelerator, name), rate)  # type: ignore[misc]
            for name, rate in expected.rates.items()
        },
        measure_s=_try(lambda: _measure_s(accelerator, clock), expected.measure_s),
        source="measured",
    )


def _try(action: Callable[[], float], otherwise: float) -> float:
    """What was measured, if it is a number that can be one."""
    try:
        found = action()
    except Exception as error:
        log.debug("not measured: %s", without_frames(error))
        return otherwise
    return found if 0 < found < math.inf else otherwise


def _seconds(accelerator: Accelerator, form: Callable[..., Sequence[Tensor]], *given: Any) -> float:
    with torch.no_grad():
        form(*given)  # chooses kernels
        return captured_seconds(accelerator, form, given)


def _launch_s(accelerator: Accelerator) -> float:
    place = torch.zeros(8, device=accelerator.device)

    def many(value: Tensor) -> list[Tensor]:
        for _ in range(_LAUNCHES):
            value.add_(1)
        return [value]

    return _seconds(accelerator, many, place) / _LAUNCHES


def _bandwidth(accelerator: Accelerator) -> float:
    """Bytes read and written a second, by a large copy."""
    device = accelerator.device
    size = min(_COPIED_BYTES[device.type], accelerator.free_bytes() // 8)
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return 2 * size / _seconds(accelerator, lambda a, b: [b.copy_(a)], source, target)


def _rate(accelerator: Accelerator, precision: str) -> float:
    rows = _ROWS[precision] if accelerator.device.type == "cuda" else _CPU_ROWS
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    a, b = (torch.ones(rows, rows, dtype=dtype, device=accelerator.device) for _ in range(2))
    with tf32(precision == "tf32"):
        taken = _seconds(accelerator, lambda a, b: [a @ b], a, b)
    return 2.0 * rows**3 / taken


def _measure_s(accelerator: Accelerator, clock: Callable[[], float]) -> float:
    """Host seconds of capturing and timing a few calls, and of recording them, about as long."""
    place = torch.zeros(8, device=accelerator.device)
    started = clock()
    _seconds(accelerator, lambda value: [value + 1], place)
    return 2 * (clock() - started)
