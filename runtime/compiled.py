"""A tape compiled by Inductor: operators fused vertically, for trainings long enough to repay it.

Compiling takes seconds for a step of linear layers and minutes for one of hundreds of operators. So
it is done by another process while the step is trained as it is, for parts of the tape
(`cgo.runtime.regions`), once for equal ones, and kept for other trials. It gains half as much again
where small products stand between elementwise operators; on a GPU, what chains of elementwise
operators and norms save in memory traffic; and on a CPU next to nothing where convolutions take the
time. So it is done where it is asked for, or where the planned steps repay it, and kept where it is
faster by measurement.

From which run of a step on it is compiled is written down with the choices of the trial: the same
search, run again, takes the other form after the same run, and computes the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cgo.errors import CgoError
from cgo.runtime.accelerator import (
    Accelerator,
    captured_seconds,
    leaves_eager,
    without_frames,
)
from cgo.runtime.artifacts import ArtifactError, Artifacts
from cgo.runtime.compiling import Compiling
from cgo.runtime.part_forms import (
    Kind,
    Plan,
    copied,
    difference,
    overwritten,
    plain,
    running,
    seconds_of,
    stands_alone,
    visited,
)
from cgo.runtime.regions import cut, joined, moved_bytes
from cgo.runtime.repaying import (
    CPU_GAIN,
    Expected,
    may_repay,
    repaying,
    saving,
    share_of_training,
)
from cgo.runtime.structure import Part, StructureError, structure_of, whole
from cgo.runtime.tape import Replay, Tape
from cgo.runtime.taped import Later
from cgo.runtime.verdicts import Decision, Swap, Verdict, Verdicts

log = logging.getLogger(__name__)

#: On a CPU, tapes of so many calls are compiled as a whole: what stands between products is small.
_WHOLE_CALLS = 400


class CompileError(CgoError):
    """A tape that is not compiled; it is replayed as it is."""


class Compilers:
    """What a trial's programs share: the process that compiles, and what it has compiled.

    Args:
        artifacts: Where that is kept.
        waited: Training waits for it.
    """

    def __init__(self, artifacts: Artifacts, *, waited: bool = False) -> None:
        self.artifacts = artifacts
        self.compiling = Compiling(artifacts, nice=0) if waited else Compiling(artifacts)
        self._loaded: dict[str, Callable[..., Any]] = {}

    def load(self, key: str) -> Callable[..., Any]:
        """A compiled part; raises `ArtifactError`."""
        if key not in self._loaded:
            self._loaded[key] = self.artifacts.load(key)
        return self._loaded[key]

    def has(self, key: str) -> bool:
        """Whether it is compiled."""
        return key in self._loaded or self.artifacts.has(key)

    def close(self) -> None:
        """End the process."""
        self.compiling.close()


@dataclass(frozen=True)
class Compiler:
    """Decides which steps are compiled.

    Args:
        wanted: True: all, before they go on; False: none; None: those that the planned steps repay.
        steps: Planned.
        known: Tells the earlier decision on a step, by its name, which is followed; None: none.
        settled: Hears of each decision.
        compilers: Make what is compiled; None, or an error: nothing is.
        verdicts: What compiled parts are known to gain.
        tell: Hears what each compilation took and gained, as JSON values.
        accelerator: Times steps as captured; None: as they are called.
    """

    wanted: bool | None
    steps: int
    known: Callable[[str], Decision | None]
    settled: Callable[[str, Decision], None]
    compilers: Callable[[], Compilers]
    verdicts: Verdicts
    tell: Callable[..., None] = lambda what, **figures: None
    accelerator: Accelerator | None = None

    def __call__(
        self, name: str, tape: Tape, replay: Replay, inputs: Sequence[Tensor]
    ) -> Later | None:
        """A form of a step that is to take its replay's place, or None where that is kept.

        Args:
            name: The step's, for decisions.
            tape: Its tape.
            replay: By the interpreter.
            inputs: Of one step. Tensors that it writes are written, several times.
        """
        known = self.known(name)
        kind = self._device_type(inputs)
        if known is None and self.wanted is None and not may_repay(tape, self.steps, kind):
            known = False
        if self.wanted is False or known is False or known == Swap(None):
            self.settled(name, known if isinstance(known, Swap) else False)
            return None
        try:
            compilers = self.compilers()
            plan = self._planned(tape, inputs, compilers, kind)
            self._choose(plan, known, replay, inputs, compilers)
        except Exception as error:
            if not _leaves_plain(error):
                raise
            self.refuse(name, tape, str(without_frames(error)))
            return None
        if not plan.chosen:
            self.settled(name, False)
            return None
        missing = [key for key in plan.chosen if not compilers.has(key)]
        for key in missing:
            compilers.compiling.ask(key, plan.kinds[key].structure)
        if isinstance(known, Swap):
            at = known.at
        else:
            at = 0 if self.wanted else None
            self.settled(name, Swap(None))  # where training ends before
        return _Compiled(self, name, plan, compilers, replay, missing, at, known is not None)

    def _device_type(self, inputs: Sequence[Tensor]) -> str:
        if self.accelerator is not None:
            return self.accelerator.device.type
        return "cuda" if any(value.is_cuda for value in inputs) else "cpu"

    def refuse(self, name: str, tape: Tape, reason: str) -> None:
        """Leave a step as it is, and say why."""
        log.warning("a step is not compiled: %s", reason)
        self.tell("compiled", step=name, calls=len(tape.calls), parts=0, reason=reason[:500])
        self.settled(name, False)

    # --- what is compiled -------------------------------------------------------------------------

    def _planned(
        self, tape: Tape, inputs: Sequence[Tensor], compilers: Compilers, device_type: str
    ) -> Plan:
        """Cut the tape; parts are of one kind where they have one structure."""
        short = device_type == "cpu" and len(tape.calls) <= _WHOLE_CALLS
        pieces = [whole(tape)] if short and stands_alone(tape, inputs) else cut(tape, inputs)
        plan = Plan(tape, list(pieces), device_type)
        for number, part, given in visited(plan, inputs):
            try:
                structure = structure_of(part, given)
            except StructureError as error:
                log.debug("a part of a step is not compiled: %s", error)
                continue
            key = compilers.artifacts.key(structure)
            if key not in plan.kinds:
                plan.kinds[key] = Kind(key, structure, [], moved_bytes(part, tape.sizes))
                if self.wanted is None and self.verdicts.find(key) is None:
                    plan.kinds[key].before_s = self.part_seconds([plain(part)], part, given)[0]
            plan.kinds[key].numbers.append(number)
        return plan

    def _choose(
        self,
        plan: Plan,
        known: Swap | None,
        replay: Replay,
        inputs: Sequence[Tensor],
        compilers: Compilers,
    ) -> None:
        if known is not None and known.parts is not None:
            plan.chosen = [key for key in plan.kinds if key in known.parts]
            if set(plan.chosen) != set(known.parts):
                raise CompileError("it has other parts than when it was compiled before")
            return
        lost = {key for key in plan.kinds if _lost(self.verdicts.find(key))}
        if known is not None or self.wanted:
            plan.chosen = [key for key in plan.kinds if known is not None or key not in lost]
            return
        step_s = self.timed([replay], inputs)[0]
        expected = {
            key: self._expected(kind, plan.device_type, compilers)
            for key, kind in plan.kinds.items()
            if key not in lost
        }
        plan.chosen = repaying(expected, step_s, self.steps, share_of_training(plan.device_type))

    def _expected(self, kind: Kind, device_type: str, compilers: Compilers) -> Expected:
        verdict = self.verdicts.find(kind.key)
        calls, compile_s = kind.structure.calls, 0.0
        if not compilers.has(kind.key):
            measured_s = 0.0 if verdict is None else verdict.compile_s
            compile_s = measured_s or self.verdicts.call_s * calls
        if verdict is None:
            share = CPU_GAIN if device_type == "cpu" else saving(*kind.moved, calls)
            gain_s = kind.before_s * share
        else:
            gain_s = verdict.before_s - verdict.after_s
        return Expected(len(kind.numbers) * gain_s, compile_s)

    # --- measuring --------------------------------------------------------------------------------

    def part_seconds(
        self, forms: Sequence[Replay], part: Part, given: Sequence[Tensor]
    ) -> list[float]:
        """Of forms of a part, called on what it reads; what it writes is a copy."""
        written = overwritten(part)
        own = [copied(v) if name in written else v for name, v in zip(part.reads, given)]
        for form in forms:
            form(*own)  # compiled kernels are chosen when they are called first
        return self.timed(forms, own)

    def timed(self, forms: Sequence[Replay], inputs: Sequence[Tensor]) -> list[float]:
        """Of forms of a step, as it is run; what they write is written several times."""
        if self.accelerator is None:
            return seconds_of(forms, inputs)
        try:
            return [captured_seconds(self.accelerator, form, inputs) for form in forms]
        except Exception as error:
            if not leaves_eager(error):
                raise
            log.info("steps are timed as they are called: %s", error)
            return seconds_of(forms, inputs)


@dataclass
class _Compiled(Later):
    """A step's compiled form, while it is being compiled."""

    compiler: Compiler
    name: str
    plan: Plan
    compilers: Compilers
    replay: Replay
    missing: list[str]  # that are being compiled
    at: int | None
    repeated: bool  # an earlier decision is followed
    meanwhile: Replay | None = None

    def due(self, run: int) -> bool:
        """After the recorded run; where none is recorded, as soon as it is compiled."""
        if self.at is not None:
            return run >= self.at
        while self.missing and self.compilers.compiling.outcome(self.missing[0]) is not None:
            self.missing.pop(0)
        return not self.missing

    def finish(self, run: int, inputs: Sequence[Tensor], current: Replay) -> Replay | None:
        """The compiled form, checked and timed; None where the current one is kept."""
        started = time.perf_counter()
        try:
            with self.compilers.artifacts.torchs_own():  # kernels are chosen in the first runs
                found, used = self._made(inputs)
                if reason := difference(found, self.replay, inputs):
                    raise CompileError(reason)
                before_s, after_s = self.compiler.timed([current, found], inputs)
        except Exception as error:
            if not _leaves_plain(error):
                raise
            self.compiler.refuse(self.name, self.plan.tape, str(without_frames(error)))
            return None
        spent = time.perf_counter() - started
        faster = self.repeated or after_s < before_s
        if len(self.plan.pieces) == 1 and self._verdict(used[0]) is None:
            self._learn(used[0], Verdict(before_s, after_s, self._outcome_seconds(used[0])))
        self.compiler.tell(
            "compiled",
            step=self.name,
            calls=len(self.plan.tape.calls),
            parts=sum(len(self.plan.kinds[key].numbers) for key in used),
            compiled=sum(self.compilers.compiling.outcome(key) is not None for key in used),
            compile_s=sum(self._outcome_seconds(key) for key in self.plan.chosen),
            seconds=spent,
            before_s=before_s,
            after_s=after_s,
            at=run,
        )
        self.compiler.settled(self.name, Swap(run, tuple(used)) if faster else False)
        return found if faster else None

    def _outcome_seconds(self, key: str) -> float:
        outcome = self.compilers.compiling.outcome(key)
        return 0.0 if outcome is None else outcome.seconds

    def _made(self, inputs: Sequence[Tensor]) -> tuple[Replay, list[str]]:
        """The step with what was compiled, and is faster where it stands."""
        self.compilers.compiling.wait(self.missing)
        functions: dict[str, Callable[..., Any]] = {}
        reasons: list[str] = []
        for key in self.plan.chosen:
            try:
                functions[key] = self._loaded(key)
            except ArtifactError as error:
                reasons.append(str(error))
        if self.repeated and reasons:
            raise CompileError(f"not as it was compiled before: {reasons[0]}")
        if not self.repeated and len(self.plan.pieces) > 1:
            self._judge(functions, inputs)
            functions = {k: f for k, f in functions.items() if not _lost(self._verdict(k))}
        if not functions:
            raise CompileError(reasons[0] if reasons else "no part is faster by itself")
        numbered = {n: f for k, f in functions.items() for n in self.plan.kinds[k].numbers}
        return running(joined(self.plan.tape, self.plan.pieces, numbered)), list(functions)

    def _verdict(self, key: str) -> Verdict | None:
        return self.compiler.verdicts.find(key)

    def _loaded(self, key: str) -> Callable[..., Any]:
        outcome = self.compilers.compiling.outcome(key)
        if outcome is not None and outcome.error is not None:
            if outcome.lasting:
                failed = Verdict(0.0, 0.0, outcome.seconds, outcome.error)
                self.compiler.verdicts.add(key, failed)
            raise ArtifactError(outcome.error)
        return self.compilers.load(key)

    def _judge(self, functions: Mapping[str, Callable[..., Any]], inputs: Sequence[Tensor]) -> None:
        """Time what has no verdict yet against its calls, where it stands for the first time."""
        left = {key: f for key, f in functions.items() if self._verdict(key) is None}
        first = {self.plan.kinds[key].numbers[0]: key for key in left}
        if not left:
            return
        for number, part, given in visited(self.plan, inputs):
            key = first.get(number)
            if key is None:
                continue
            try:
                forms = [plain(part), left[key]]
                before_s, after_s = self.compiler.part_seconds(forms, part, given)
                verdict = Verdict(before_s, after_s, self._outcome_seconds(key))
            except Exception as error:  # of compiled code, whatever it raises
                reason = f"{type(error).__name__}: {str(error)[:500]}"
                verdict = Verdict(0.0, 0.0, self._outcome_seconds(key), reason)
            self._learn(key, verdict)

    def _learn(self, key: str, verdict: Verdict) -> None:
        self.compiler.verdicts.add(key, verdict)
        if verdict.compile_s:
            self.compiler.verdicts.paid(verdict.compile_s, self.plan.kinds[key].structure.calls)


def _leaves_plain(error: Exception) -> bool:
    return isinstance(error, (ArtifactError, CompileError)) or leaves_eager(error)


def _lost(verdict: Verdict | None) -> bool:
    return verdict is not None and not verdict.faster
