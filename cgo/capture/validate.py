"""Every capture is compared with the eager module before it is trusted.

Both are run from one state, several times in a row where a module was exported and once where it
was recorded, each time over other samples in another order, and before a run all parameters and
buffers are moved to where nothing coincides that only began equal: a copy of a weight, an average,
a gate of zero. What Python keeps between calls must not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cgo.capture.compare import GRADIENT, SPREAD, TOLERANCES, Found, beyond, gaps, refuse
from cgo.capture.convert import Program
from cgo.capture.disturb import AMOUNTS, disturb, restored, tensors_of
from cgo.capture.kept import Kept
from cgo.capture.python_state import Watched, moved
from cgo.errors import CaptureError
from cgo.graph import Graph, Output, prune
from cgo.model import TrainingSpec, loss_function
from cgo.runtime.data import Leaves, preserved_random_state, seed_all
from cgo.runtime.lower import Lowered, lower
from cgo.runtime.operators import empty, filler
from cgo.runtime.step import autocast, compute, eval_mode
from cgo.user_code import contained, told

#: Backwards start with it in float16, as in training: where gradients vanish, all look alike.
_FLOAT16_SCALE = 2.0**10

_CPU = torch.device("cpu")
_UNSEEN = 7_919  # no seed of note

# What the stream gives next. Draws that no result shows (a noise added to nothing, a dropout whose
# result nobody reads) would still leave the stream elsewhere than training alone leaves it.
_STREAM = "the random stream after it"


def program_graph(program: Program, name: str, model: str = "") -> Graph:
    """The program alone as a graph."""
    outputs = [Output(model, name, "loss", "", program.loss)]
    if program.prediction is not None and name.startswith("validation"):
        outputs.append(Output(model, name, "prediction", "", program.prediction))
    outputs += [Output(model, name, "update", path, ref) for path, ref in program.updates.items()]
    return prune(Graph(tuple(program.nodes), tuple(outputs)))


def validate(
    program: Program,
    name: str,
    module: nn.Module,
    training: TrainingSpec,
    leaves: Leaves,
    other: Leaves | None = None,
    *,
    seeds: Sequence[int] = (0, 1),
    proven: bool = False,
    called: Kept | None = None,
) -> None:
    """Run captured and eager side by side, for each seed in another order of the batch.

    Losses, predictions, gradients (which are there at all, and their values), buffers and the place
    in the random stream must agree: at the module's own state, then at disturbed ones.

    Args:
        program: What was captured.
        name: The program's.
        module: What it was captured from, or one that is built alike; afterwards it is as it was.
        training: How it is trained.
        leaves: A batch.
        other: One of the same shape that has other samples, for all states but the first of
            several: what was read off a batch as a whole, as its mean, no order of it shows.
        seeds: One, at a disturbed state, tells whether a module is built alike; what is baked into
            a program, such as random numbers, takes two to show, or a recording and one.
        proven: Refuse a module that does not run at any disturbed state.
        called: What the module was before it was called, so that nothing is set up any more; who
            gives it puts the module back.

    Raises:
        CaptureError: they do not agree; says what differs.
    """
    kept = called or Kept(module)
    if called:
        kept.put_values_back()
    with contextlib.nullcontext() if called else kept.afterwards():
        watched = Watched(module, (loss_function(training.loss),))
        sides = _Sides(program, name, module, training, kept, watched)
        before = sides.moved
        for number, seed in enumerate(seeds):
            disturbed = number > 0 or len(seeds) == 1
            given = other if disturbed and other is not None else leaves
            rolled = {key: leaf.roll(seed, 0) for key, leaf in given.items()}
            try:
                sides.compare(seed, rolled, disturbed=disturbed, proven=proven)
            except CaptureError:
                after = sides.moved
                if number == 0 and called is None:
                    before = watched.snapshot()
                    sides.call_again()
                    after = watched.snapshot()
                _refuse_moved(before, after, name)  # the better reason
                raise
            after = sides.moved
            if number or called is not None:  # what a first call sets up is not there before it
                _refuse_moved(before, after, name)
            before = after


def _refuse_moved(before: Mapping[str, object], after: Mapping[str, object], name: str) -> None:
    if (place := moved(before, after)) is not None:
        raise CaptureError(
            f"{place} changes with each call in {name}, and a graph would keep what it was"
        )


class _Sides:
    """A module, and what was captured of it, each time from one state."""

    def __init__(
        self,
        program: Program,
        name: str,
        module: nn.Module,
        training: TrainingSpec,
        kept: Kept,
        watched: Watched,
    ) -> None:
        self._watched, self.moved = watched, watched.snapshot()  # after the last eager run
        self._name, self._training, self._module, self._kept = name, training, module, kept
        lowered = lower(program_graph(program, name), name, _CPU, images_last=False)
        self._captured = partial(_captured, lowered, program, name, training)
        self._done: list[tuple[int, Leaves, float]] = []  # to be done again

    def compare(self, seed: int, leaves: Leaves, *, disturbed: bool, proven: bool) -> None:
        """Run both once.

        Raises:
            CaptureError: they do not agree.
        """
        amounts = (*(AMOUNTS if disturbed else ()), *(() if disturbed and proven else (0.0,)))
        for amount in amounts:
            try:
                with restored(self._module):
                    expected = self._run(seed, leaves, amount)
                    self._done.append((seed, leaves, amount))
                    break
            except _NoNumbers as error:
                reason = str(error)
        else:
            raise CaptureError(f"{self._name} does not run at other values of weights: {reason}")
        self.moved = self._watched.snapshot()
        self._judge(expected, self._captured(self._begun, leaves, seed))

    def call_again(self) -> None:
        """Run the eager side once more, as it was run last, for what Python keeps of it."""
        if self._done:
            self._run(*self._done[-1])

    def _run(self, seed: int, leaves: Leaves, amount: float) -> Found:
        """One eager run; what it begins with is kept for the captured side."""
        module = self._module
        if amount:
            disturb(module, amount, seed)
        self._begun = _copies(module)
        try:
            with contained:
                found = _eager(module, self._name, self._training, leaves, seed)
        except Exception as error:
            if not amount:
                raise
            raise _NoNumbers(told(error)) from error
        loss = found["the loss"]
        if amount and (loss is None or not loss.isfinite().all()):
            raise _NoNumbers("the loss is no number")
        return found

    def _judge(self, expected: Found, found: Found) -> None:
        try:
            apart = gaps(expected, found, self._name)
        except CaptureError as error:
            self._refuse_custom(expected, str(error))
            raise
        allowed = dict.fromkeys(apart, TOLERANCES[self._training.precision])
        if beyond(apart, allowed) is not None:
            spread = self._spread(expected, moved=True)
            if (what := beyond(self._spread(expected, moved=False), allowed)) is not None:
                raise CaptureError(
                    f"{what} in {self._name} is another one when the module is called again"
                )
            allowed = {what: max(allowed[what], SPREAD * spread[what]) for what in apart}
        what = beyond(apart, allowed)
        if what is not None:
            self._refuse_custom(expected, f"captured and eager differ in {self._name}, {what}")
        refuse(apart, allowed, self._name)

    def _spread(self, expected: Found, *, moved: bool) -> dict[str, float]:
        """How far the same calls are from themselves, at parameters that moved by an ulp or not."""
        self._kept.put_back()
        if moved:
            _move_by_an_ulp(self._module)
        again = [self._run(*done) for done in self._done]
        return gaps(expected, again[-1], self._name)

    @staticmethod
    def _refuse_custom(expected: Found, what: str) -> None:
        """Refuse with the better reason, where there is one."""
        if names := _custom_functions(expected["the loss"]):
            raise CaptureError(
                f"the backward of a custom autograd.Function ({', '.join(names)}) is in no graph: "
                f"{what}"
            )


def _custom_functions(loss: Tensor | None) -> list[str]:
    """Names of users' autograd functions that a loss was computed by."""
    pending = [] if loss is None or loss.grad_fn is None else [loss.grad_fn]
    seen: set[object] = set()
    found: dict[str, None] = {}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[type(node).__name__.removesuffix("Backward")] = None
        pending += [after for after, _ in node.next_functions if after is not None]
    return list(found)


class _NoNumbers(Exception):
    """A module that does not run at a disturbed state."""


def _copies(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors, as tensors of their own; tied ones are one."""
    found: dict[int, Tensor] = {}
    for tensor in tensors_of(module).values():
        if id(tensor) not in found:
            found[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return {path: found[id(tensor)] for path, tensor in tensors_of(module).items()}


def _move_by_an_ulp(module: nn.Module) -> None:
    """Let each parameter become a neighbouring number."""
    coins = torch.Generator().manual_seed(_UNSEEN)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=coins) * 2 - 1
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs.double())


def _eager(
    module: nn.Module, name: str, training: TrainingSpec, leaves: Leaves, seed: int
) -> dict[str, Tensor | None]:
    module.zero_grad()
    own = {key: leaf.clone() for key, leaf in leaves.items()}
    loss_of, double = loss_function(training.loss), training.precision == "float64"
    with preserved_random_state(), autocast(training, _CPU):
        # Python's and NumPy's streams differ from run to run and from what the export saw, so that
        # numbers baked into the graph show; torch's is the one that capture promises to follow.
        seed_all(_UNSEEN + seed)
        torch.manual_seed(seed)
        if name.startswith("train"):
            loss, _ = compute(module, loss_of, own, double=double)
            found: dict[str, Tensor | None] = {"the loss": loss}
        else:
            with torch.no_grad(), eval_mode(module):
                loss, prediction = compute(module, loss_of, own, double=double)
            found = {"the loss": loss}
            if isinstance(prediction, Tensor):
                found["the prediction"] = prediction
        found[_STREAM] = torch.rand(2)
    if name.startswith("train") and loss.requires_grad:
        _backward(loss, training)
    return found | _state(module)


def _backward(loss: Tensor, training: TrainingSpec) -> None:
    # Without a gradient of its own, for which torch would import its symbolic shapes.
    (loss * _FLOAT16_SCALE if training.precision == "float16" else loss).backward()


def _captured(
    lowered: Lowered,
    program: Program,
    name: str,
    training: TrainingSpec,
    tensors: Mapping[str, Tensor],
    leaves: Leaves,
    seed: int,
) -> Found:
    generator = torch.Generator().manual_seed(seed)
    values = []
    for source in lowered.sources:  # a graph without groups has single nodes only
        (node,) = source.nodes
        match node.op:
            case "cgo.input":
                values.append(leaves[str(node.keyword("leaf"))])
            case "cgo.constant":
                values.append(program.constants[str(node.keyword("content"))])
            case "cgo.random":
                type_ = node.types[0]
                assert type_ is not None
                values.append(empty(type_, _CPU))
                filler(node)(values[-1], generator)
            case _:
                values.append(tensors[str(node.keyword("path"))])
    with torch.set_grad_enabled(name.startswith("train")):
        results = lowered(values)
    named = [(result.outputs[0], value) for result, value in zip(lowered.results, results)]
    found: dict[str, Tensor | None] = {
        f"the {output.role}": value for output, value in named if output.role != "update"
    }
    found[_STREAM] = torch.rand(2, generator=generator)
    loss = found["the loss"]
    if loss is not None and name.startswith("train") and loss.requires_grad:
        _backward(loss, training)
    with torch.no_grad():
        for output, value in named:
            if output.role == "update" and value is not tensors[output.key]:
                tensors[output.key].copy_(value)
    gradients = {f"{GRADIENT}{path}": tensor.grad for path, tensor in tensors.items()}
    return found | gradients | {f"buffer {path}": tensor for path, tensor in tensors.items()}


def _state(module: nn.Module) -> dict[str, Tensor | None]:
    state: dict[str, Tensor | None] = {
        f"{GRADIENT}{path}": parameter.grad for path, parameter in module.named_parameters()
    }
    buffers = module.named_buffers()
    return state | {f"buffer {path}": buffer.detach().clone() for path, buffer in buffers}
