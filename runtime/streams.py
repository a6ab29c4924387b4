"""What a tape could do side by side: sections of independent branches, forked and joined.

A kernel over a few small tensors leaves most of a GPU idle. What could not be fused can still
overlap: the calls of a tape are cut into sections, in order, and those of one section that do not
depend on each other become branches, which run on streams of their own. The next section begins
when all branches have ended, so memory that one of them frees is never taken by another that still
runs: what crosses branches is freed between sections.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgo.runtime.accelerator import (
    SIDE_STREAMS,
    Accelerator,
    captured_seconds,
    leaves_eager,
    without_frames,
)
from cgo.runtime.tape import Call, Replay, Tape, Value, invoke, written_unsaid
from cgo.runtime.taped import agree

#: What launching a kernel weighs, in bytes that it could have moved.
_LAUNCH_BYTES = 2**20

#: Branches of fewer calls are not waited for: a section goes on when they meet.
_SHORT = 3

#: A section is forked where its longest branch is at most so much of the whole.
_WORTH = 0.8


@dataclass(frozen=True)
class Section:
    """Calls by branch, in order; branches do not depend on each other."""

    branches: tuple[tuple[Call, ...], ...]


def divide(tape: Tape, inputs: Sequence[Tensor], width: int = SIDE_STREAMS + 1) -> list[Section]:
    """Cut a tape into sections of at most `width` branches.

    Args:
        tape: What to cut. Its calls appear once, each after all that it depends on.
        inputs: Of one step; they tell which tensors share memory.
        width: Branches that may run at once.
    """
    before = dependencies(tape, memory_of(tape, inputs))
    return [_section(tape, part, before, width) for part in _parts(tape, before)]


def dependencies(tape: Tape, memory: Mapping[Value, object]) -> list[set[int]]:
    """For each call, the earlier ones that it must follow.

    Those that made what it reads; those that wrote the same memory, which views share; and before
    it writes, those that read it. Draws from one generator keep their order.

    Args:
        tape: Whose calls.
        memory: As `memory_of` has it.
    """
    made: dict[Value, int] = {}
    written: dict[object, int] = {}
    read: dict[object, set[int]] = defaultdict(set)
    found: list[set[int]] = []
    for index, call in enumerate(tape.calls):
        before = {made[value] for value in call.reads() if value in made}
        targets = {memory[value] for value in written_by(call)}
        targets |= {g for g in call.arguments.values() if isinstance(g, torch.Generator)}
        for place in {memory[value] for value in call.reads()} | targets:
            before |= {written[place]} if place in written else set()
            if place in targets:
                before |= read.pop(place, set())
                written[place] = index
            else:
                read[place].add(index)
        for value in call.outputs:
            if value is not None:
                made.setdefault(value, index)
        found.append(before - {index})
    return found


def memory_of(tape: Tape, inputs: Sequence[Tensor]) -> dict[Value, object]:
    """What tells the memory of each value: of the first value that it is a view of."""
    given = [*zip(tape.inputs, inputs), *tape.constants.items()]
    found: dict[Value, object] = {
        value: ("given", tensor.untyped_storage().data_ptr()) for value, tensor in given
    }
    for call in tape.calls:
        base = next(iter(call.reads()), None)
        for value in call.outputs:
            if value is not None and value not in found:
                shares = is_view(call) and base is not None
                found[value] = found[base] if shares and base is not None else value
    return found


def is_view(call: Call) -> bool:
    """Whether what a call gives shares memory with what it reads."""
    return any(item.alias_info is not None for item in call.op._schema.returns)


def written_by(call: Call) -> Iterable[Value]:
    """What a call writes in place, said or unsaid."""
    yield from call.writes()
    for name in written_unsaid(call.op):
        given = call.arguments.get(name)
        if isinstance(given, Value):
            yield given


def _parts(tape: Tape, before: Sequence[set[int]]) -> list[list[int]]:
    """Calls by section: one ends where branches of some length meet, or where they part."""
    after: list[set[int]] = [set() for _ in before]
    for index, earlier in enumerate(before):
        for other in earlier:
            after[other].add(index)
    met = _cut(range(len(tape.calls)), before)
    parted = [part[::-1] for whole in met for part in _cut(whole[::-1], after)[::-1]]
    return [part for whole in parted for part in _cut(whole, before)]


def _cut(order: Sequence[int], linked: Sequence[set[int]]) -> list[list[int]]:
    """Cut an order before each call that links branches which are not short."""
    from networkx.utils import UnionFind  # on demand: trials without side streams need none

    parts: list[list[int]] = []
    branches: UnionFind[int] = UnionFind()
    length: dict[int, int] = {}
    for index in order:
        met = {branches[other] for other in linked[index] if other in length}
        if not parts or sum(length[root] >= _SHORT for root in met) > 1:
            parts.append([])
            branches, length, met = UnionFind(), {}, set()
        total = 1 + sum(length[root] for root in met)
        branches.union(index, *met)
        length[index] = 0
        length[branches[index]] = total
        parts[-1].append(index)
    return parts


def _section(tape: Tape, part: Sequence[int], before: Sequence[set[int]], width: int) -> Section:
    """The components of a part, on streams of about equal weight; or one, where that gains little.

    Source: longest processing time first, Graham, SIAM J. Appl. Math. 17 (1969).
    """
    import networkx

    own = set(part)
    ties: networkx.Graph[int] = networkx.Graph()
    ties.add_nodes_from(part)
    ties.add_edges_from((index, other) for index in part for other in before[index] & own)
    weights = {index: _weight(tape, tape.calls[index]) for index in part}
    branches = sorted(
        (sorted(found) for found in networkx.connected_components(ties)),
        key=lambda found: (-sum(weights[index] for index in found), found),
    )
    loads = [(0, number) for number in range(width)]
    streams: list[list[int]] = [[] for _ in range(width)]
    for branch in branches:
        load, number = heapq.heappop(loads)
        streams[number] += branch
        heapq.heappush(loads, (load + sum(weights[index] for index in branch), number))
    longest = max(load for load, _ in loads)
    if longest > _WORTH * sum(weights.values()):
        streams = [list(part)]
    chosen = (tuple(tape.calls[index] for index in sorted(s)) for s in streams if s)
    return Section(tuple(chosen))


def _weight(tape: Tape, call: Call) -> int:
    """About what a call takes, in bytes moved."""
    if is_view(call) and not call.op._schema.is_mutable:
        return 0
    moved = [*call.reads(), *(value for value in call.outputs if value is not None)]
    return _LAUNCH_BYTES + sum(tape.sizes[value] for value in moved)


def forked(tape: Tape, sections: Sequence[Section], accelerator: Accelerator) -> Replay:
    """The tape as a function of its inputs that runs sections one after another.

    Meant to be captured: called from Python, it launches kernel by kernel.
    """
    prepared = plans(tape, sections)

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        values = dict(zip(tape.inputs, inputs)) | dict(tape.constants)
        with torch.no_grad():
            for branches, gone in prepared:
                accelerator.side_by_side([_branch(calls, values) for calls in branches])
                for value in gone:
                    del values[value]
        return [values[result] for result in tape.results]

    return run


#: The calls of a branch, with what is freed after each.
_Branch = Sequence[tuple[Call, Sequence[Value]]]


def _branch(calls: _Branch, values: dict[Value, Tensor]) -> Callable[[], None]:
    def run() -> None:
        for call, gone in calls:
            invoke(call, values)
            for value in gone:
                del values[value]

    return run


def plans(tape: Tape, sections: Sequence[Section]) -> list[tuple[list[_Branch], Sequence[Value]]]:
    """Sections with what each call frees: what its own branch made; and what each section frees."""
    kept = {*tape.results, *tape.inputs, *tape.constants}
    found: list[tuple[list[_Branch], Sequence[Value]]] = []
    for section in reversed(sections):
        late: dict[Value, None] = {}
        branches: list[_Branch] = []
        fresh: set[Value] = set()
        for calls in section.branches:
            made = {value for call in calls for value in call.outputs if value is not None}
            ended: list[tuple[Call, Sequence[Value]]] = []
            for call in reversed(calls):
                touched = dict.fromkeys(
                    [*call.reads(), *(v for v in call.outputs if v is not None)]
                )
                over = [v for v in touched if v not in kept and v not in fresh and v not in late]
                ended.append((call, [value for value in over if value in made]))
                fresh.update(value for value in over if value in made)
                late |= dict.fromkeys(value for value in over if value not in made)
            branches.append(ended[::-1])
        kept |= fresh | late.keys()
        found.append((branches, list(late)))
    return found[::-1]


def forked_calls(sections: Sequence[Section]) -> int:
    """How many calls have others beside them."""
    return sum(sum(map(len, s.branches)) for s in sections if len(s.branches) > 1)


def _overwritten(tape: Tape, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors from outside that a tape writes."""
    memory = memory_of(tape, inputs)
    written = {memory[value] for call in tape.calls for value in written_by(call)}
    given = [*zip(tape.inputs, inputs), *tape.constants.items()]
    return [tensor for value, tensor in given if memory[value] in written]


def _alike(
    left: Replay, right: Replay, inputs: Sequence[Tensor], written: Sequence[Tensor]
) -> bool:
    """Whether two forms give the same results, and leave the same in what they write."""
    before = [tensor.clone() for tensor in written]
    found = []
    with torch.no_grad():
        for form in (left, right):
            for tensor, value in zip(written, before):
                tensor.copy_(value)
            results = [result.clone() for result in form(*inputs)]
            found.append([*results, *(tensor.clone() for tensor in written)])
    return agree(*found)


@dataclass(frozen=True)
class Overlap:
    """Decides which steps run on several streams: those that are faster so, captured and timed.

    Args:
        accelerator: Captures and times.
        tell: Hears of each decision, as JSON values.
    """

    accelerator: Accelerator
    tell: Callable[..., None] = lambda what, **figures: None

    def __call__(
        self, name: str, tape: Tape, replay: Replay, inputs: Sequence[Tensor]
    ) -> Replay | None:
        """The forked form of a step, or None where its replay is to be kept.

        Args:
            name: The step's, for reports.
            tape: Its tape.
            replay: As it is run otherwise.
            inputs: Of one step. Tensors that it writes are written, several times.
        """
        sections = divide(tape, inputs)
        several = forked_calls(sections)
        if not several:
            return None
        found = forked(tape, sections, self.accelerator)
        try:
            plain_s, forked_s = (
                captured_seconds(self.accelerator, form, inputs) for form in (replay, found)
            )
            right = _alike(replay, found, inputs, _overwritten(tape, inputs))
        except Exception as error:
            if not leaves_eager(error):
                raise
            self.tell("overlap", step=name, forked=0, reason=str(without_frames(error)))
            return None
        if not right:
            self.tell("overlap", step=name, forked=0, reason="streams give other values")
            return None
        faster = forked_s < plain_s
        self.tell(
            "overlap", step=name, calls=len(tape.calls), forked=several if faster else 0,
            before_s=plain_s, after_s=forked_s,
        )  # fmt: skip
        if not faster:
            return None

        def run(*given: Tensor) -> Sequence[Tensor]:
            # Called from Python, a launch at a time, the interpreter is the faster one.
            return (found if self.accelerator.capturing else replay)(*given)

        return run
