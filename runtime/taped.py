"""Steps that are replayed from their tape once that is trusted.

A tape is not trusted before it has given, at another step than the one it was recorded from, the
same bits as that step run plainly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cgo.private import many_tensors
from cgo.runtime.tape import Replay, Tape, TapeError, compile_tape, interpreted, record

log = logging.getLogger(__name__)


class Later:
    """A form of a step that may take its replay's place at a later run.

    Attributes:
        meanwhile: A form that is to be run until then; None: the replay.
    """

    meanwhile: Replay | None = None

    def due(self, run: int) -> bool:
        """Whether it is to be finished after this run of the step, counted from 1."""
        raise NotImplementedError

    def finish(self, run: int, inputs: Sequence[Tensor], current: Replay) -> Replay | None:
        """The other form; None where the current one is to be kept.

        Args:
            run: After which it takes its place.
            inputs: Of one step. Tensors that it writes are written, several times.
            current: The form that the step has.
        """
        raise NotImplementedError


class Taped:
    """A step that is run plainly, then recorded, then checked, then replayed.

    Args:
        step: Called with a list of tensors; gives the tensors that the step is for. What it reads
            beside its inputs is the same tensor at every step.
        buffers: What it writes in place.
        wanted: Whether it is to be recorded at all; preparing takes the time of some ten steps.
        compiled: Makes another form of a tape and its replay, called with one step's inputs, now
            or later; None of it where the replay is to be kept.

    Attributes:
        reason: Why it is not replayed; empty while it may be.
    """

    def __init__(
        self,
        step: Callable[..., Sequence[Tensor]],
        buffers: Sequence[Tensor],
        *,
        wanted: bool,
        compiled: Callable[[Tape, Replay, Sequence[Tensor]], Replay | Later | None] | None = None,
    ) -> None:
        self._step, self._buffers, self._compiled = step, list(buffers), compiled
        self._runs = 0
        self._tape: Tape | None = None  # recorded, not yet checked
        self._replay: Replay | None = None  # trusted
        self._later: Later | None = None
        self.reason = "" if wanted else "too few steps are planned"

    @property
    def settled(self) -> bool:
        """Whether the step was run, and will not change its form before `waiting` is over."""
        return self._replay is not None or bool(self.reason and self._runs)

    @property
    def replaying(self) -> bool:
        """Whether the next step is a replay."""
        return self._replay is not None

    @property
    def waiting(self) -> bool:
        """Whether another form may take the replay's place."""
        return self._later is not None

    def passed(self) -> bool:
        """Count a run that was replayed elsewhere; True where the next has to be run here."""
        self._runs += 1
        return self._later is not None and self._later.due(self._runs + 1)

    def __call__(self, inputs: Sequence[Tensor], *, keeps: bool = False) -> Sequence[Tensor]:
        """Run the step; where it keeps its form, it is not counted as a run."""
        if self._replay is not None:
            if self._later is None or keeps:
                return self._replay(*inputs)
            self._runs += 1
            if not self._later.due(self._runs):
                return self._replay(*inputs)
            return self._swapped(self._later, self._replay, inputs)
        self._runs += 1
        if self.reason or self._runs == 1:  # the first allocates memory and chooses kernels
            return self._step(*inputs)
        return self._recorded(inputs) if self._tape is None else self._checked(inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        before = _clones(self._buffers)
        try:
            results, self._tape = record(self._step, inputs)
            return results
        except TapeError as error:
            self._give_up(str(error))
            restore(self._buffers, before)
            return self._step(*inputs)

    def _checked(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The step run plainly, and then by its tape from the same state; they must agree."""
        assert self._tape is not None
        tape, self._tape = self._tape, None
        before = _clones(self._buffers)
        results = list(self._step(*inputs))
        after = _clones(self._buffers)
        try:
            self._replay = self._trusted(tape, inputs, before, [*results, *after])
        except TapeError as error:
            self._give_up(str(error))
        restore(self._buffers, after)
        return results

    def _trusted(
        self,
        tape: Tape,
        inputs: Sequence[Tensor],
        before: Sequence[Tensor],
        expected: Sequence[Tensor],
    ) -> Replay:
        replay = fastest(tape)
        restore(self._buffers, before)
        try:
            found = [*replay(*inputs), *self._buffers]
        except RuntimeError as error:
            raise TapeError(f"the replay failed: {error}") from error
        if not agree(expected, found):
            raise TapeError("the replay does not give the same bits")
        if self._compiled is None:
            return replay
        restore(self._buffers, before)
        made = self._compiled(tape, replay, inputs)
        if not isinstance(made, Later):
            return made or replay
        current = made.meanwhile or replay
        if not made.due(self._runs):
            self._later = made
            return current
        restore(self._buffers, before)
        return made.finish(self._runs, inputs, current) or current

    def _swapped(self, later: Later, current: Replay, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The step as it was run until now; its other form is tried from the same state."""
        before = _clones(self._buffers)
        results = [result.clone() for result in current(*inputs)]
        after = _clones(self._buffers)
        restore(self._buffers, before)
        self._later = None
        try:
            self._replay = later.finish(self._runs, inputs, current) or current
        finally:
            restore(self._buffers, after)
        return results

    def _give_up(self, reason: str) -> None:
        log.info("a step is not replayed: %s", reason)
        self.reason = reason


def fastest(tape: Tape) -> Replay:
    """TorchScript's interpreter, or Python where that refuses the tape, or is no more.

    `benchmarks/replays.py` has how they compare; either is faster than the plain step.
    """
    try:
        return compile_tape(tape)
    except TapeError as error:
        log.info("a step is replayed from Python: %s", error)
        return interpreted(tape)


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into tensors."""
    if tensors:
        with torch.no_grad():
            many_tensors.copy_(list(tensors), list(values))


#: Relative differences that two runs of one kernel may have on a GPU, where sums have no order.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}


def agree(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether tensors are equal, NaN to NaN; to the bit on a CPU."""
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    close = 0.0 if left.device.type == "cpu" else _CLOSE.get(left.dtype, 0.05)
    scale = float(left.abs().nan_to_num().max()) if close and left.numel() else 0.0
    return torch.allclose(left, right, rtol=close, atol=close * scale, equal_nan=True)
