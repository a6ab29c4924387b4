"""What vendors publish of devices that are often met: a prior, until the device itself is measured.

Rates are of dense products, without structured sparsity; tensor cores where torch uses them. From:
NVIDIA H100 Tensor Core GPU datasheet (SXM5 and PCIe) and the Hopper architecture white paper (L2
cache); NVIDIA H200 Tensor Core GPU datasheet; NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM,
80 GB PCIe) and the Ampere architecture white paper; NVIDIA L4 Tensor Core GPU datasheet; NVIDIA Ada
GPU architecture white paper (RTX 4090; half precision with accumulation in float32).

Launches are no published figure: 0.87 us between kernels of a captured graph, 4 ms for a captured
measurement and half a second for cuDNN's search were measured on an H200
(`benchmarks/results/gpu_operators_h200.json`, `gpu_suite_h200.json`), and stand for the others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A device as its vendor describes it.

    Args:
        names: Parts of the name that the driver gives; the first device that has one is meant.
        capability: Of CUDA.
        multiprocessors: What rates of a cut-down device are scaled by.
        cache_bytes: Of the level 2 cache.
        bandwidth: Bytes a second, of the memory.
        rates: FLOP/s in float64, float32, tf32, bfloat16 and float16.
    """

    names: tuple[str, ...]
    capability: tuple[int, int]
    multiprocessors: int
    cache_bytes: int
    bandwidth: float
    rates: tuple[float, float, float, float, float]


#: More special names stand before those that they contain.
PUBLISHED = (
    Published(("H200",), (9, 0), 132, 50 * 2**20, 4.8e12, (67e12, 67e12, 494e12, 989e12, 989e12)),
    Published(
        ("H100 PCIe",), (9, 0), 114, 50 * 2**20, 2.0e12, (51e12, 51e12, 378e12, 756e12, 756e12)
    ),
    Published(("H100",), (9, 0), 132, 50 * 2**20, 3.35e12, (67e12, 67e12, 494e12, 989e12, 989e12)),
    Published(
        ("A100 PCIE", "A100 80GB PCIe"),
        (8, 0),
        108,
        40 * 2**20,
        1.935e12,
        (19.5e12, 19.5e12, 156e12, 312e12, 312e12),
    ),
    Published(
        ("A100",), (8, 0), 108, 40 * 2**20, 2.039e12, (19.5e12, 19.5e12, 156e12, 312e12, 312e12)
    ),
    Published(
        ("L4",),
        (8, 9),
        58,
        48 * 2**20,
        0.3e12,
        (0.47e12, 30.3e12, 60e12, 121e12, 121e12),
    ),
    Published(
        ("RTX 4090",),
        (8, 9),
        128,
        72 * 2**20,
        1.008e12,
        (1.29e12, 82.6e12, 82.6e12, 165e12, 165e12),
    ),
)


def published(name: str, capability: tuple[int, int], multiprocessors: int) -> Published:
    """The device of this name, or else the one that is most like it.

    Alike is, in this order: compute capability, then the number of multiprocessors.

    Args:
        name: As the driver gives it.
        capability: Of CUDA.
        multiprocessors: That the device has.
    """
    for known in PUBLISHED:
        if any(_has(name, part) for part in known.names):
            return known

    def distance(known: Published) -> tuple[float, int]:
        apart = abs(_number(known.capability) - _number(capability))
        return apart, abs(known.multiprocessors - multiprocessors)

    return min(PUBLISHED, key=distance)


def _has(name: str, part: str) -> bool:
    """Whether a name has this part as whole words: an L40 is no L4."""
    words, wanted = _words(name), _words(part)
    starts = range(len(words) - len(wanted) + 1)
    return any(words[start : start + len(wanted)] == wanted for start in starts)


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()


def _number(capability: tuple[int, int]) -> float:
    return capability[0] + capability[1] / 10
