"""Whether compiling repays what it takes: what is expected to be saved, in the steps that are left.

A chain of elementwise operators takes as long as its values take to be read and written: on a GPU
what one kernel need not move, and need not be launched for, is what compiling saves. On a CPU it is
a share that was measured, and nothing where convolutions take the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cgo.machine import cores
from cgo.runtime.tape import Tape

#: What compiling is expected to gain of a step on a CPU.
CPU_GAIN = 0.25

#: Of the memory traffic that a fused kernel saves, what it is expected to save in time.
_REACHED = 0.7

#: What launching a kernel weighs, in bytes that it could have moved.
_LAUNCH_BYTES = 2**20

#: Seconds of importing a compiler, and of loading what was compiled.
_IMPORT_S, _LOAD_S = 3.0, 0.2

#: Seconds that no step takes.
_LONGEST_S = 10.0


@dataclass(frozen=True)
class Expected:
    """What compiling a structure is expected to gain in a step, and to take."""

    gain_s: float
    compile_s: float


def convolves(tape: Tape) -> bool:
    """Whether there are convolutions."""
    return any("convolution" in call.op._schema.name for call in tape.calls)


def saving(apart: int, together: int, calls: int) -> float:
    """The share of its time that a chain is expected to save as one kernel.

    Args:
        apart: Bytes that its calls move.
        together: Bytes that one kernel would move.
        calls: How many launches it takes now.
    """
    before = apart + calls * _LAUNCH_BYTES
    return _REACHED * max(0.0, 1 - (together + _LAUNCH_BYTES) / before)


def repaying(
    expected: Mapping[str, Expected], step_s: float, steps: int, share: float
) -> list[str]:
    """The structures that repay what they take in the steps that are left once they are there.

    Args:
        expected: By structure.
        step_s: Seconds of a step now.
        steps: Planned.
        share: Of compiling's seconds, what training loses meanwhile.
    """
    left = steps - sum(found.compile_s for found in expected.values()) / max(step_s, 1e-9)
    worth = {
        key: found.gain_s * left - share * found.compile_s - _LOAD_S
        for key, found in expected.items()
    }
    chosen = [key for key, value in worth.items() if value > 0]
    return chosen if sum(worth[key] for key in chosen) > _IMPORT_S else []


def share_of_training(kind: str) -> float:
    """What training loses of the seconds that another process works."""
    if kind != "cpu":
        return 0.2
    return min(1.0, torch.get_num_threads() / cores())


def may_repay(tape: Tape, steps: int, device_type: str) -> bool:
    """False where no length of the step could speak for it, so that it need not be timed."""
    if device_type == "cpu" and convolves(tape):
        return False
    return steps * _LONGEST_S > _IMPORT_S
