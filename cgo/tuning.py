"""How a trial chooses kernels, layouts and group sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cgo.errors import SpecError
from cgo.text import printable

#: How the values of a group lie: as tensors of their own, as (M, ...), or as (N, M*C, ...).
LANES, STACKED, CHANNELS = "lanes", "stacked", "channels"

_LAYOUTS = (LANES, STACKED, CHANNELS)


@dataclass(frozen=True)
class Tuning:
    """How a trial chooses kernels, layouts and group sizes.

    Args:
        measure: Measure what the table of costs does not hold. Without, the choice is by known
            costs, and where there are none by rules.
        most_s: Seconds that measuring may take, at most a tenth of the planned training.
        share: Of the planned training: measuring may take that much, if it is longer.
        record: A trial's `lowering.json`: choose as that trial did, which gives the same bits on
            the same device. A trial of other models, or on another device, chooses anew.
        anew: Measure and choose anew where an equal search has chosen on this device before, whose
            choices are taken otherwise, so that the same search gives the same bits again.
        layout: Execute every group so, as far as its operator can: "lanes" (one by one), "stacked"
            or "channels". For tests and measurements.
        width: Execute so many members of a group at once, at most. For tests and measurements.
        tape: Record a step's operator calls, forward and backward, and replay them by an
            interpreter, without Python and autograd; the bits are the same. None: where enough
            steps are planned.
        compile: Compile that record, or the parts of it that a compiler can fuse, with Inductor:
            True, or "inductor": before training goes on. None: where the planned steps are expected
            to repay it, by another process, while training goes on as it is. Either way it is kept
            only where it is faster, and on disk for other trials, with the table of costs.
        capture: Capture whole training steps, optimizers included, and replay them: as CUDA graphs,
            with what can overlap on several streams, or as one tape. None: where enough steps are
            planned; on a CPU only training steps by SGD that draw nothing. True on a CPU: all
            steps, by a GPU's rules, for tests. False: none.
        kernels: Kernels of our own, in Triton. None: on a GPU where Triton is; norms and
            convolutions wherever they are faster by measurement, optimizers' steps and draws
            always, as they replace one launch for each model. True: by Triton's interpreter on a
            CPU, too, which is for tests. False: nowhere.
        streams: Where the random tensors of merged models come from: "generator", a generator for
            each model, as in a plain loop after `torch.manual_seed(seed)`; or "keyed", streams that
            are functions of model, operator, step and element alone, drawn for all models by one
            kernel (docs/random.md). None: keyed on a GPU, generators on a CPU.
        search: Whether cuDNN may time its kernels for convolutions before the first step, half a
            second each. None: on a GPU, where the planned steps are expected to repay it, unless
            torch is set to deterministic algorithms. What is found may differ from run to run, and
            bits with it: False keeps the same search to the same bits.
        tf32: Whether CUDA may compute float32 products and convolutions in TF32, with a mantissa
            of 10 bits, while the trial trains. None: as torch is set, which is convolutions only.
        memory_bytes: Of each device, for what training takes on top of parameters and buffers:
            models are divided into programs that take turns where a step is estimated to take more.
            None: nine tenths of what is free on a GPU; no limit on a CPU.
        store_stems: Compute frozen stems over un-augmented data once and store their values for
            later epochs, where memory allows. None: where it repays, which takes two epochs or
            more. True: whatever it repays, for tests and measurements.
        checkpoint: Keep few activations for the backward and compute the others once more there:
            less memory in deep models, the same bits, steps 1.6 to 2 times as long. They are not
            replayed: the interpreter would take the second computing for a repetition
            that it can leave out.

    Raises:
        SpecError: a value makes no sense.

    Example:
        >>> from cgo import Tuning
        >>> Tuning(most_s=2.0).share
        0.02
    """

    measure: bool = True
    most_s: float = 10.0
    share: float = 0.02
    record: str | None = None
    anew: bool = False
    layout: str | None = None
    width: int | None = None
    tape: bool | None = None
    compile: bool | Literal["inductor"] | None = None
    capture: bool | None = None
    kernels: bool | None = None
    streams: Literal["generator", "keyed"] | None = None
    search: bool | None = None
    tf32: bool | None = None
    memory_bytes: int | None = None
    store_stems: bool | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            _check_type(name, kind, getattr(self, name))
        if self.most_s < 0 or not 0 <= self.share <= 1:
            raise SpecError(
                f"tuning: most_s {self.most_s} and share {self.share}; seconds, and a part of 1"
            )
        if self.layout not in (None, *_LAYOUTS):
            raise SpecError(f"tuning: layout {self.layout!r} is none of {', '.join(_LAYOUTS)}")
        if self.compile not in (None, True, False, "inductor"):
            raise SpecError(f"tuning: compile {self.compile!r}; True, False, None or 'inductor'")
        if self.memory_bytes is not None and not 1 <= self.memory_bytes < 2**63:
            raise SpecError(f"tuning: memory_bytes {self.memory_bytes}; at least 1")
        if self.width is not None and self.width < 1:
            raise SpecError(f"tuning: width {self.width}; at least 1")

        if self.checkpoint and (self.tape or self.compile):
            raise SpecError(
                "tuning: checkpoint with tape or compile; steps that compute once more for the "
                "backward are neither replayed nor compiled, so leave these unset"
            )

    @property
    def forced(self) -> bool:
        """Whether layout or width are given."""
        return self.layout is not None or self.width is not None

    def budget_s(self, planned_s: float) -> float:
        """Seconds that measuring may take before a training of so many seconds."""
        if not self.measure:
            return 0.0
        return max(self.share * planned_s, min(self.most_s, planned_s / 10))

    def as_json(self) -> dict[str, Any]:
        """As JSON values, for a trial's document."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tuning:
        """From what `as_json` gave.

        Raises:
            SpecError: no object, unknown settings, or values of other types than they have.
        """
        if not isinstance(values, Mapping):
            raise SpecError(f"tuning: expected an object of settings, got {values!r:.60}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known, key=str):
            named = printable(", ".join(map(str, unknown)), 200)
            raise SpecError(f"tuning: {named} is none of {', '.join(sorted(known))}")
        return cls(**values)


@cache
def _kinds() -> dict[str, TypeAdapter[Any]]:
    """What validates each setting, by its annotation."""
    config = ConfigDict(strict=True)
    return {name: TypeAdapter(kind, config=config) for name, kind in get_type_hints(Tuning).items()}


def _check_type(name: str, kind: TypeAdapter[Any], value: Any) -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(item["msg"] for item in error.errors()))
        raise SpecError(f"tuning: {name} {value!r:.60}: {wanted}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"tuning: {name} {value}: no finite number")
