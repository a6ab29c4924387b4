"""A tape compiled by Inductor: operators fused vertically, for trainings long enough to repay it.

Compiling takes seconds for a step of linear layers and minutes for one of hundreds of operators. It
gains half as much again where small products stand between elementwise operators, and next to
nothing where convolutions take the time. So it is done where it is asked for, or where the planned
steps repay what it is expected to cost, and kept where it is faster by measurement.
"""

from __future__ import annotations

import logging
import math
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cgo.errors import CgoError
from cgo.private.inductor import compiled
from cgo.runtime.accelerator import (
    Accelerator,
    captured_seconds,
    leaves_eager,
)
from cgo.runtime.tape import Replay, Tape, Value, refuse_recording

log = logging.getLogger(__name__)

#: Expected seconds of compiling, for each call on the tape, and expected gain of what it compiles.
_CALL_S = 0.15
_GAIN = 0.25

#: Rounds of timing a tape's two forms against each other.
_ROUNDS = 5

#: On a CPU Inductor would give channels last to all convolutions, and lowering keeps them off some.
_AS_LOWERED: dict[str, Any] = {"layout_optimization": False}

#: Largest relative difference between the forms that rounding explains.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}


class CompileError(CgoError):
    """A tape that is not compiled; it is replayed as it is."""


@dataclass(frozen=True)
class Compiler:
    """Decides which steps are compiled.

    Args:
        wanted: True: all; False: none; None: those that the planned steps repay.
        steps: Planned.
        known: Tells the earlier decision on a step, by its name, which is followed; None: none.
        settled: Hears of each decision.
        tell: Hears what each compilation took and gained, as JSON values.
        accelerator: Times steps as captured; None: as they are called.
    """

    wanted: bool | None
    steps: int
    known: Callable[[str], bool | None]
    settled: Callable[[str, bool], None]
    tell: Callable[..., None] = lambda what, **figures: None
    accelerator: Accelerator | None = None

    def __call__(
        self, name: str, tape: Tape, replay: Replay, inputs: Sequence[Tensor]
    ) -> Replay | None:
        """The compiled form of a step, or None where its replay is to be kept.

        Args:
            name: The step's, for decisions.
            tape: Its tape.
            replay: By the interpreter.
            inputs: Of one step. Tensors that it writes are written, several times.
        """
        known = self.known(name)
        if known is None and self.wanted is None and not self._repays(tape, replay, inputs):
            known = False
        if known is False or self.wanted is False:
            self.settled(name, False)
            return None
        started = time.perf_counter()
        try:
            found = compile_step(tape, inputs)
            _check(found, replay, inputs)
        except CompileError as error:
            log.warning("a step is not compiled: %s", error)
            self.settled(name, False)
            return None
        spent = time.perf_counter() - started
        plain_s, compiled_s = self._seconds([replay, found], inputs)
        faster = compiled_s < plain_s if known is None else True
        self.tell(
            "compiled", calls=len(tape.calls), seconds=spent, before_s=plain_s, after_s=compiled_s
        )
        self.settled(name, faster)
        return found if faster else None

    def _repays(self, tape: Tape, replay: Replay, inputs: Sequence[Tensor]) -> bool:
        """As `repays`; where no length of the step could speak for it, it is not timed."""
        kind = "cpu" if self.accelerator is None else self.accelerator.device.type
        if not repays(tape, math.inf, self.steps, kind):
            return False
        return repays(tape, self._seconds([replay], inputs)[0], self.steps, kind)

    def _seconds(self, forms: Sequence[Replay], inputs: Sequence[Tensor]) -> list[float]:
        if self.accelerator is None:
            return _seconds(forms, inputs)
        try:
            return [captured_seconds(self.accelerator, form, inputs) for form in forms]
        except Exception as error:
            if not leaves_eager(error):
                raise
            log.info("steps are timed as they are called: %s", error)
            return _seconds(forms, inputs)


def repays(tape: Tape, step_s: float, steps: int, device_type: str = "cpu") -> bool:
    """Whether compiling is expected to cost less than it gains in so many steps."""
    convolves = any("convolution" in call.op._schema.name for call in tape.calls)
    if device_type == "cpu" and convolves:
        return False
    return _CALL_S * len(tape.calls) < _GAIN * step_s * steps


def compile_step(tape: Tape, inputs: Sequence[Tensor]) -> Replay:
    """The tape as Inductor compiles it.

    Args:
        tape: What to compile.
        inputs: Of one step.

    Raises:
        CompileError: Inductor cannot, for want of a C++ compiler, say.
    """
    constants = list(tape.constants.values())
    try:
        with torch.no_grad():
            given = [value.detach() for value in (*inputs, *constants)]
            on_cpu = all(value.device.type == "cpu" for value in given)
            function = compiled(_module(tape), given, _AS_LOWERED if on_cpu else None)
            function(*_copies(given))
    except Exception as error:  # Inductor raises what its many parts raise
        raise CompileError(f"Inductor: {type(error).__name__}: {str(error)[:500]}") from error

    def run(*values: Tensor) -> Sequence[Tensor]:
        refuse_recording()
        with torch.no_grad():
            results: Sequence[Tensor] = function(*values, *constants)
        return results

    return run


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors to try on, that may be written."""
    return [torch.empty_like(value).copy_(value) for value in values]


def _module(tape: Tape) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[Value, fx.Node] = {}
    for value in (*tape.inputs, *tape.constants):
        nodes[value] = graph.placeholder(value.name)

    def given(argument: Any) -> Any:
        if isinstance(argument, Value):
            return nodes[argument]
        return [given(item) for item in argument] if isinstance(argument, tuple) else argument

    for call in tape.calls:
        keywords = {a.name for a in call.op._schema.arguments if a.kwarg_only}
        named = {name: given(value) for name, value in call.arguments.items()}
        args = tuple(value for name, value in named.items() if name not in keywords)
        kwargs = {name: value for name, value in named.items() if name in keywords}
        result = graph.call_function(call.op, args, kwargs)
        several = call.listed or len(call.outputs) > 1
        for index, output in enumerate(call.outputs):
            if output is not None and output not in nodes:
                part = graph.call_function(operator.getitem, (result, index))
                nodes[output] = part if several else result
    graph.output([nodes[result] for result in tape.results])
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


def _check(compiled: Replay, replay: Replay, inputs: Sequence[Tensor]) -> None:
    left, right = (function(*_copies(inputs)) for function in (compiled, replay))
    for a, b in zip(left, right, strict=True):
        close = _CLOSE.get(b.dtype, 0.05)
        if a.shape != b.shape or not torch.allclose(a, b, rtol=close, atol=close, equal_nan=True):
            raise CompileError("what Inductor made gives other values")


def _seconds(functions: Sequence[Replay], inputs: Sequence[Tensor]) -> list[float]:
    """Median seconds of each, in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(_ROUNDS):
        for function, found in zip(functions, times):
            started = time.perf_counter()
            results = function(*inputs)
            if results and results[0].is_cuda:
                torch.cuda.synchronize(results[0].device)
            found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]
