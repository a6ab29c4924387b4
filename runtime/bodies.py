"""Bodies: steps over tensors that stay where they are, written down and called again.

A body reads and writes the same tensors each time, and is handed none. So its tape says more than a
step's: views of what stays where it is are made once, and it is known from which call on a replay
writes what nobody puts back. A replay that raises before has done nothing: an operator that refuses
a value, a class that the model does not have, costs no more than running the step in another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cgo.errors import CgoError
from cgo.private.operators import OpOverload
from cgo.runtime.tape import (
    Call,
    Recorder,
    Tape,
    TapeError,
    Value,
    invoke,
    written,
    written_unsaid,
)
from cgo.runtime.taped import agree, fastest, restore

#: Larger tensors are not copied, to be compared.
_COPIED_BYTES = 2**22

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Undone(CgoError):
    """A replay that raised; what it had written is as it was before."""


def record_body(
    body: Callable[[], Sequence[Tensor]],
    undone: Sequence[Tensor] = (),
    generators: Sequence[torch.Generator] = (),
) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """Write down what a body calls, and undo what it wrote; gives its results and its replay.

    Args:
        body: Reads and writes tensors that are the same at every replay, and gives tensors.
        undone: Of what it writes, tensors that are put back where a replay raises; before anything
            else is written, that is.
        generators: Those that it draws from; they are put back, too.

    Returns:
        The results, and a function that calls it all again: values go into the same tensors. It
        raises `Undone` where it has left nothing behind.

    Raises:
        TapeError: as `cgo.runtime.tape.record`; or a replay does not give the same bits.
    """
    recorder = _Undoing()
    states = [generator.get_state() for generator in generators]
    try:
        with recorder:
            results = list(body())
        tape = recorder.tape(results)
        changed = [*results, *_lasting(tape)]
        expected = list(map(_seen, changed))
    finally:
        recorder.undo()
        _set_states(generators, states)
    kept = recorder.values(undone)
    tape = in_place(with_views_made(one_by_one(_writing(tape, results))))
    replay = _replay(tape, kept, list(undone), generators)
    try:
        replay()
        if not agree(expected, list(map(_seen, changed))):
            raise TapeError("a replay of the whole does not give the same bits")
    finally:
        recorder.undo()
        _set_states(generators, states)
    return results, replay


def _seen(tensor: Tensor) -> Tensor:
    """By what a tensor's bits are known again: a copy, or of large ones the sum of its words."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() * flat.element_size() <= _COPIED_BYTES or flat.element_size() not in _WORDS:
        return flat.clone()
    return flat.view(_WORDS[flat.element_size()]).sum(dtype=torch.int64)


def _set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states):
        generator.set_state(state)


def _lasting(tape: Tape) -> list[Tensor]:
    """The constants that a tape writes."""
    found = [tape.roots.get(value, value) for call in tape.calls for value in call.writes()]
    return [tape.constants[root] for root in dict.fromkeys(found) if root in tape.constants]


class _Undoing(Recorder):
    """Keeps what foreign tensors held before they were first written."""

    def __init__(self) -> None:
        super().__init__(())
        self._before: dict[Value, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = dict(zip((argument.name for argument in func._schema.arguments), args))
        named |= kwargs or {}
        for given in map(named.get, [*written(func), *written_unsaid(func)]):
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _keep(self, tensor: Tensor) -> None:
        value = self._value(tensor)
        if self._roots.get(value, value) in self._constants and value not in self._before:
            self._before[value] = tensor.detach(), tensor.detach().clone()

    def values(self, tensors: Sequence[Tensor]) -> set[Value]:
        """Of some tensors, the names of those that were seen."""
        return {self._known[tensor] for tensor in tensors if tensor in self._known}

    def undo(self) -> None:
        """Backwards: of two views of one memory, the earlier was kept before any was written."""
        with torch.no_grad():
            for tensor, before in reversed(self._before.values()):
                tensor.copy_(before)


def _writing(tape: Tape, results: Sequence[Tensor]) -> Tape:
    """The tape with its results written into tensors, instead of given."""
    constants, calls = dict(tape.constants), list(tape.calls)
    for index, (tensor, value) in enumerate(zip(results, tape.results)):
        if value in tape.constants:  # written in place
            continue
        place = Value(f"r{index}")
        constants[place] = tensor.detach()
        arguments = {"self": place, "src": value}
        calls.append(Call(torch.ops.aten.copy_.default, arguments, (place,), False))
    return replace(tape, constants=constants, calls=tuple(calls), results=())


_aten = torch.ops.aten

#: Calls over lists of tensors, and what they are for each: a CPU has no other kernel for them.
#: TorchScript drops those that write, as nobody reads their lists again.
_SINGLE = {
    _aten._foreach_add_.List: _aten.add_.Tensor,
    _aten._foreach_addcmul_.Scalar: _aten.addcmul_.default,
    _aten._foreach_copy_.default: _aten.copy_.default,
    _aten._foreach_mul_.List: _aten.mul_.Tensor,
}


def one_by_one(tape: Tape) -> Tape:
    """The tape with a call for each tensor, where a call over lists writes them in place."""
    calls: list[Call] = []
    for call in tape.calls:
        single = _SINGLE.get(call.op)
        if single is None:
            calls.append(call)
            continue
        for index, value in enumerate(call.arguments["self"]):
            own = {
                name: given[index] if isinstance(given, tuple) else given
                for name, given in call.arguments.items()
            }
            calls.append(Call(single, own, (value,), False))
    return replace(tape, calls=tuple(calls))


#: Calls that work element by element, and what writes their result over what they read first.
_OVER: Mapping[OpOverload, tuple[OpOverload, str | None]] = {
    _aten.relu.default: (_aten.relu_.default, None),
    _aten.threshold_backward.default: (_aten.threshold_backward.grad_input, "grad_input"),
}


def in_place(tape: Tape) -> Tape:
    """The tape with activations and their gradients written over what nobody reads again."""
    readers = Counter(value for call in tape.calls for value in call.reads())
    viewed = {*tape.roots, *tape.roots.values(), *tape.constants, *tape.inputs, *tape.results}
    calls: list[Call] = []
    for call in tape.calls:
        over, keyword = _OVER.get(call.op, (None, None))
        first = next(iter(call.arguments.values()), None)
        free = isinstance(first, Value) and first not in viewed and readers[first] == 1
        if over is None or not free or not _alike(tape, first, call.outputs[0]):
            calls.append(call)
            continue
        given = call.arguments if keyword is None else {**call.arguments, keyword: first}
        calls.append(Call(over, given, call.outputs, False))
    return replace(tape, calls=tuple(calls))


def _alike(tape: Tape, left: Value | None, right: Value | None) -> bool:
    """Whether two values lie alike in memory."""
    if left is None or right is None:
        return False
    same = tape.sizes[left] == tape.sizes[right]
    return same and tape.strides[left] == tape.strides[right]


def with_views_made(tape: Tape) -> Tape:
    """The tape without calls that give views of constants: these are constants themselves."""
    constants, calls = dict(tape.constants), []
    for call in tape.calls:
        reads = list(call.reads())
        views = all(output is not None and output in tape.roots for output in call.outputs)
        if call.op._schema.is_mutable or not (reads and views and constants.keys() >= set(reads)):
            calls.append(call)
            continue
        values = {value: constants[value] for value in reads}
        with torch.no_grad():
            invoke(call, values)
        constants |= values
    return replace(tape, constants=constants, calls=tuple(calls))


def _replay(
    tape: Tape,
    kept: Collection[Value],
    undone: list[Tensor],
    generators: Sequence[torch.Generator],
) -> Callable[[], None]:
    first, last = map(fastest, divided(tape, kept))
    before = [torch.empty_like(tensor.detach()) for tensor in undone]

    def replay() -> None:
        restore(before, undone)
        states = [generator.get_state() for generator in generators]
        try:
            values = first()
        except Exception as error:
            restore(undone, before)
            _set_states(generators, states)
            raise Undone(f"{type(error).__name__}: {error}") from error
        last(*values)

    return replay


def divided(tape: Tape, kept: Collection[Value]) -> tuple[Tape, Tape]:
    """What a tape does before it writes any constant but some, and the rest, which is given more.

    Args:
        tape: Of a body: without inputs and results.
        kept: Constants that may be written by the first part.
    """
    end = next((i for i, c in enumerate(tape.calls) if _lasts(c, tape, kept)), len(tape.calls))
    first, last = tape.calls[:end], tape.calls[end:]
    given = {v for call in first for v in call.outputs if v is not None} - tape.constants.keys()
    wanted = dict.fromkeys(value for call in last for value in call.reads() if value in given)
    handed = tuple(wanted)
    return (
        replace(tape, constants=_read(tape, first), calls=first, results=handed),
        replace(tape, constants=_read(tape, last), calls=last, inputs=handed),
    )


def _read(tape: Tape, calls: Sequence[Call]) -> dict[Value, Tensor]:
    named = {value for call in calls for value in (*call.reads(), *call.writes())}
    return {value: tensor for value, tensor in tape.constants.items() if value in named}


def _lasts(call: Call, tape: Tape, kept: Collection[Value]) -> bool:
    """Whether a call writes into a constant that is not put back."""
    roots = {tape.roots.get(value, value) for value in call.writes()}
    return any(root in tape.constants and root not in kept for root in roots)
