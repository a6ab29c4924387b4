"""A tape cut into regions: what a compiler can fuse, between what it would only call.

Products, convolutions and attention are kernels of their own, and compiling them takes minutes for
nothing. Between them lie chains of elementwise operators, norms and reductions, each of which reads
and writes all of its values: as one kernel a chain reads what comes in and writes what goes out.
Views cost nothing, so that each region makes those that it needs itself, and shares no memory with
another but what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cgo.runtime.streams import dependencies, is_view, memory_of, written_by
from cgo.runtime.structure import Part
from cgo.runtime.tape import Call, Tape, Value

#: What is fused beside what torch marks as elementwise or as a reduction.
_FUSED = frozenset(
    """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data _to_copy amax amin
    avg_pool2d avg_pool2d_backward cat clone constant_pad_nd copy_ fill_ full full_like
    gelu_backward max_pool2d_with_indices max_pool2d_with_indices_backward mean
    native_batch_norm native_batch_norm_backward native_group_norm native_group_norm_backward
    native_layer_norm native_layer_norm_backward new_empty_strided new_full new_zeros
    nll_loss_backward nll_loss_forward ones ones_like select_backward sigmoid_backward
    slice_backward stack sum tanh_backward threshold_backward upsample_nearest2d var var_mean zero_
    zeros zeros_like _native_batch_norm_legit_functional _native_batch_norm_legit
    _native_batch_norm_legit_no_training
    """.split()  # noqa: SIM905
)

#: They fuse only among themselves: alone, they are a kernel at most.
_LEAST_CALLS = 2


def cut(tape: Tape, inputs: Sequence[Tensor]) -> list[Call | Part]:
    """A tape's calls in an order in which what can be fused stands together, as parts.

    Args:
        tape: What to cut.
        inputs: Of one step; they tell which tensors share memory.
    """
    cutter = _Cutter(tape, inputs)
    return cutter.pieces()


class _Cutter:
    def __init__(self, tape: Tape, inputs: Sequence[Tensor]) -> None:
        self._tape = tape
        memory = memory_of(tape, inputs)
        self._before = dependencies(tape, memory)
        self._maker: dict[Value, int] = {}
        for index, call in enumerate(tape.calls):
            for value in call.outputs:
                if value is not None:
                    self._maker.setdefault(value, index)
        self._views = [is_view_only(call) for call in tape.calls]
        given = [memory[value] for value in (*tape.inputs, *tape.constants)]
        several = {place for place in given if given.count(place) > 1}
        self._fused = [
            not view and _fuses(call) and several.isdisjoint(memory[v] for v in written_by(call))
            for call, view in zip(tape.calls, self._views)
        ]
        self._ranks = self._ranked()

    def _ranked(self) -> list[int]:
        """Even numbers for what is fused, odd ones for what is not; views follow what they show.

        Calls of one even rank depend on each other only, and on lower ranks.
        """
        ranks: list[int] = []
        for index, before in enumerate(self._before):
            least = max((ranks[other] for other in before), default=0)
            if not self._views[index]:
                least += least % 2 if self._fused[index] else 1 - least % 2
            ranks.append(least)
        return ranks

    def pieces(self) -> list[Call | Part]:
        """All calls, by rank."""
        by_rank: dict[int, list[int]] = {}
        for index, rank in enumerate(self._ranks):
            by_rank.setdefault(rank, []).append(index)
        grouped: list[list[int] | int] = []
        for _, members in sorted(by_rank.items()):
            chains = self._chains([index for index in members if self._fused[index]])
            inside = {index for chain in chains for index in chain}
            grouped += chains
            grouped += [index for index in members if index not in inside]
        return self._as_pieces(grouped)

    def _chains(self, members: Sequence[int]) -> list[list[int]]:
        """What depends on each other among calls of one rank, where that is several."""
        import networkx  # on demand: only a compiled step has regions

        ties: networkx.Graph[int] = networkx.Graph()
        ties.add_nodes_from(members)
        own = set(members)
        for index in members:
            ties.add_edges_from((index, other) for other in self._seen(index) & own)
        chains = (sorted(found) for found in networkx.connected_components(ties))
        return sorted(chain for chain in chains if len(chain) >= _LEAST_CALLS)

    def _seen(self, index: int) -> set[int]:
        """What a call follows, through views."""
        found: set[int] = set()
        waiting = list(self._before[index])
        while waiting:
            other = waiting.pop()
            if self._views[other] and other not in found:
                waiting += self._before[other]
            found.add(other)
        return found

    def _as_pieces(self, grouped: Sequence[list[int] | int]) -> list[Call | Part]:
        """Backwards, which tells what is needed later."""
        calls = self._tape.calls
        needed = set(self._tape.results)
        found: list[Call | Part] = []
        for group in reversed(grouped):
            if isinstance(group, int):
                call = calls[group]
                if self._views[group] and needed.isdisjoint(call.outputs):
                    continue
                needed.update(call.reads())
                found.append(call)
                continue
            part = self._part(group, needed)
            needed.update(part.reads)
            found.append(part)
        return found[::-1]

    def _part(self, group: Sequence[int], needed: set[Value]) -> Part:
        own = set(group)
        for index in group:
            own |= self._views_of(self._tape.calls[index].reads())
        calls = [self._tape.calls[index] for index in sorted(own)]
        made: set[Value] = set()
        reads: dict[Value, None] = {}
        for call in calls:
            reads |= dict.fromkeys(value for value in call.reads() if value not in made)
            made.update(v for v in call.outputs if v is not None and v not in reads)
        shown = {v for i in own if self._views[i] for v in self._tape.calls[i].outputs}
        gives = [v for v in dict.fromkeys(self._outputs(calls)) if v in made - shown]
        return Part(tuple(calls), tuple(reads), tuple(v for v in gives if v in needed))

    def _outputs(self, calls: Iterable[Call]) -> Iterable[Value]:
        return (value for call in calls for value in call.outputs if value is not None)

    def _views_of(self, values: Iterable[Value]) -> set[int]:
        """The views that stand between values and memory that was written."""
        found: set[int] = set()
        waiting = list(values)
        while waiting:
            maker = self._maker.get(waiting.pop())
            if maker is not None and self._views[maker] and maker not in found:
                found.add(maker)
                waiting += self._tape.calls[maker].reads()
        return found


#: Views whose schemas do not say so.
_UNSAID = frozenset({"aten::_unsafe_view"})


def is_view_only(call: Call) -> bool:
    """Whether a call computes nothing, and writes nothing."""
    return call.op._schema.name in _UNSAID or (is_view(call) and not call.op._schema.is_mutable)


def _fuses(call: Call) -> bool:
    space, _, name = call.op._schema.name.partition("::")
    if space != "aten" or torch.Tag.nondeterministic_seeded in call.op.tags:
        return False
    marked = not {torch.Tag.pointwise, torch.Tag.reduction}.isdisjoint(call.op.tags)
    given = call.arguments.values()
    return (marked or name in _FUSED) and not any(isinstance(g, torch.Generator) for g in given)


def moved_bytes(part: Part, sizes: Mapping[Value, int]) -> tuple[int, int]:
    """What the calls of a part read and write, one by one; and what one kernel would."""
    apart = 0
    shown: dict[Value, Value] = {}
    read: dict[Value, set[Value]] = {value: set() for value in part.reads}
    for call in part.calls:
        outputs = [value for value in call.outputs if value is not None]
        if is_view_only(call):
            base = next(iter(call.reads()))
            shown |= dict.fromkeys(outputs, shown.get(base, base))
            continue
        apart += sum(sizes[value] for value in (*call.reads(), *outputs))
        for value in call.reads():
            read.get(shown.get(value, value), set()).add(value)
    together = sum(min(sizes[base], sum(sizes[v] for v in seen)) for base, seen in read.items())
    given = sum(sizes[value] for value in part.gives)
    return apart, together + given


@dataclass(frozen=True)
class _Function:
    """A compiled part, where a tape has an operator."""

    run: Callable[..., Sequence[Tensor]]
    _schema: Any

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        return self.run(*given)


def joined(
    tape: Tape, pieces: Iterable[Call | Part], functions: Mapping[int, Callable[..., Any]]
) -> Tape:
    """A tape of the same values, in which functions stand for parts.

    Args:
        tape: Whose pieces these are.
        pieces: In order.
        functions: By the number of the piece; the calls of the other parts are made as they were.
    """
    calls: list[Call] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, Call):
            calls.append(piece)
        elif number in functions:
            calls.append(_called(functions[number], piece))
        else:
            calls += piece.calls
    return replace(tape, calls=tuple(calls))


def _called(run: Callable[..., Any], part: Part) -> Call:
    arguments = {f"i{number}": value for number, value in enumerate(part.reads)}
    parameters = [SimpleNamespace(name=name, kwarg_only=False) for name in arguments]
    op: Any = _Function(run, SimpleNamespace(name="cgo::compiled", arguments=parameters))
    return Call(op, arguments, part.gives, True)
