"""Convolutions that are kept out of channels-last memory on a CPU, where oneDNN fails at them.

Pixels: the weight's gradient of a 1x1 convolution with a stride is computed from a copy of the
pixels that count. With channels last, parts of that copy are placed as if an image had a whole
vector of channels, 8 (AVX2) or 16 (AVX-512): with fewer it writes beyond its memory, which corrupts
the heap or another thread's part (uxlfoundation/oneDNN#6035; torch 2.11 and 2.13).

Holes: the weight's gradient of a dilated convolution in bfloat16 is wrong, and said nowhere, where
the channels of a group do not fill blocks of 16 (AVX-512 with bfloat16, torch 2.13). Depthwise ones
are among them.

Of transposed convolutions the same holds for the channels of the output, where those are of what
the gradient is multiplied with. `benchmarks/onednn_layouts.py` searches for such cases, and
`benchmarks/results/onednn_layouts.json` has what it found. The rule does not ask for the processor:
a trial's choices then mean the same on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Channels in the largest of oneDNN's blocks.
_BLOCK = 16

CONVOLUTIONS = frozenset(
    """
    aten.conv1d aten.conv2d aten.conv_transpose1d aten.conv_transpose2d aten.convolution
    """.split()  # noqa: SIM905
)


def needs_contiguous(operator: str, arguments: Mapping[str, Any], groups: int, dtype: str) -> bool:
    """Whether a convolution's input has to lie as torch has it by itself, (N, C, H, W).

    Args:
        operator: Without its overload: "aten.conv2d".
        arguments: By name; `weight` has a shape.
        groups: As the convolution is executed: of several members side by side, that of all.
        dtype: Of its result; under autocast the lower one.
    """
    if operator not in CONVOLUTIONS:
        return False
    channels, *kernel = arguments["weight"].shape[1:]  # of one group
    if groups == 1 and channels < _BLOCK and set(kernel) == {1}:
        return max(arguments["stride"]) > 1
    if dtype not in ("bfloat16", "float16") or channels % _BLOCK == 0:
        return False
    fills_one = groups == 1 and channels < _BLOCK
    return not fills_one and max(kernel) > 1 and max(arguments["dilation"]) > 1
