"""Forms of a step and of its parts: run as they are, visited on the way, compared and timed."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cgo.runtime.regions import is_view_only
from cgo.runtime.streams import memory_of, written_by
from cgo.runtime.structure import Part, Structure
from cgo.runtime.tape import Call, Replay, Tape, Value, interpreted, invoke, refuse_recording

#: Rounds of timing two forms against each other.
_ROUNDS = 5

#: Largest relative difference between the forms that rounding explains.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass
class Kind:
    """Parts of one structure."""

    key: str
    structure: Structure
    numbers: list[int]  # of the pieces
    moved: tuple[int, int]  # bytes, call by call and at once
    before_s: float = 0.0  # measured


@dataclass
class Plan:
    """A tape's pieces, and the structures among them."""

    tape: Tape
    pieces: list[Call | Part]
    device_type: str
    kinds: dict[str, Kind] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)


def visited(plan: Plan, inputs: Sequence[Tensor]) -> Iterator[tuple[int, Part, Sequence[Tensor]]]:
    """Run a plan's tape; gives each part with its number, and what it reads, before it is run."""
    values = dict(zip(plan.tape.inputs, inputs)) | dict(plan.tape.constants)
    kept = {*plan.tape.inputs, *plan.tape.constants}
    last: dict[Value, int] = {}
    for number, piece in enumerate(plan.pieces):
        for call in (piece,) if isinstance(piece, Call) else piece.calls:
            last |= dict.fromkeys(call.reads(), number)
    for number, piece in enumerate(plan.pieces):
        calls = (piece,) if isinstance(piece, Call) else piece.calls
        if isinstance(piece, Part):
            yield number, piece, [values[value] for value in piece.reads]
        with torch.no_grad():
            for call in calls:
                invoke(call, values)
        for value in [v for v in values if last.get(v, 0) <= number and v not in kept]:
            del values[value]


def plain(part: Part) -> Replay:
    """A part as its calls, from Python."""
    return interpreted(Tape(part.reads, {}, part.calls, part.gives, {}))


def running(tape: Tape) -> Replay:
    """A tape with compiled parts, whose work no recorder sees."""
    replay = interpreted(tape)

    def run(*values: Tensor) -> Sequence[Tensor]:
        refuse_recording()
        return replay(*values)

    return run


def stands_alone(tape: Tape, inputs: Sequence[Tensor]) -> bool:
    """Whether a compiler sees all of the memory that is written: under one name only."""
    memory = memory_of(tape, inputs)
    given = Counter(memory[value] for value in (*tape.inputs, *tape.constants))
    return all(given[memory[v]] <= 1 for call in tape.calls for v in written_by(call))


def overwritten(part: Part) -> set[Value]:
    """What a part writes of what it reads, directly or through views."""
    bases: dict[Value, Value] = {value: value for value in part.reads}
    found: set[Value] = set()
    for call in part.calls:
        base = next(iter(call.reads()), None)
        if base in bases and is_view_only(call):
            bases |= {value: bases[base] for value in call.outputs if value is not None}
        found |= {bases[value] for value in written_by(call) if value in bases}
    return found & set(part.reads)


def copied(value: Tensor) -> Tensor:
    """A copy that lies in memory as the tensor does, where elements share memory, too."""
    if not value.numel():
        return value.detach().clone()
    extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride()))
    flat = value.detach().as_strided((extent,), (1,)).clone()
    return flat.as_strided(value.shape, value.stride())


def difference(one: Replay, other: Replay, inputs: Sequence[Tensor]) -> str:
    """Why two forms do not give and write the same; empty where they do."""
    found = []
    for form in (one, other):
        own = [copied(value) for value in inputs]
        try:
            found.append([*form(*own), *own])
        except Exception as error:  # of compiled code, whatever it raises
            return f"{type(error).__name__}: {str(error)[:500]}"
    for a, b in zip(*found, strict=True):
        close = _CLOSE.get(b.dtype, 0.05)
        if a.shape != b.shape or not torch.allclose(a, b, rtol=close, atol=close, equal_nan=True):
            return "what Inductor made gives other values"
    return ""


def seconds_of(functions: Sequence[Replay], inputs: Sequence[Tensor]) -> list[float]:
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
