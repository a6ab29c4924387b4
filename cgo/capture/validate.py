"""Every capture is compared with the eager module before it is trusted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cgo.capture.convert import Program
from cgo.errors import CaptureError
from cgo.graph import Graph, Output, prune
from cgo.model import TrainingSpec, loss_function
from cgo.runtime.data import Leaves, preserved_random_state, seed_all
from cgo.runtime.lower import lower
from cgo.runtime.operators import empty, filler
from cgo.runtime.step import autocast, compute, eval_mode

#: Largest difference allowed, relative to the largest magnitude of the eager tensor. The captured
#: program runs the same kernels, so these leave room for a reordered sum, not for another result.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}

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
    *,
    seeds: Sequence[int] = (0, 1),
) -> None:
    """Run captured and eager side by side, for each seed in another order of the batch.

    Losses, predictions, gradients (which are there at all, and their values), buffers and the place
    in the random stream must agree.

    Args:
        program: What was captured.
        name: The program's.
        module: What it was captured from, or one that is built alike.
        training: How it is trained.
        leaves: A batch.
        seeds: One tells whether a module is built alike; what is baked into a program, such as
            random numbers, takes two to show.

    Raises:
        CaptureError: they do not; says what differs.
    """
    eager, mirror = copy.deepcopy(module), copy.deepcopy(module)
    graph = program_graph(program, name)
    runs = [(seed, {key: leaf.roll(seed, 0) for key, leaf in leaves.items()}) for seed in seeds]
    for number, (seed, rolled) in enumerate(runs):
        expected = _eager(eager, name, training, rolled, seed)
        found = _captured(graph, program, name, mirror, training, rolled, seed)
        gaps = _gaps(expected, found, name)
        allowed = dict.fromkeys(gaps, TOLERANCES[training.precision])
        if any(not gaps[what] <= allowed[what] for what in gaps):
            moved = _moved_by_an_ulp(module)
            others = [_eager(moved, name, training, again, s) for s, again in runs[: number + 1]]
            spread = _gaps(expected, others[-1], name)
            allowed = {what: max(allowed[what], _SPREAD * spread[what]) for what in gaps}
        _refuse(gaps, allowed, name)


#: A captured value may be so many times as far from the eager one as that goes when each parameter
#: moves by an ulp: what is chaotic, or is nothing but rounding, says nothing about the capture.
_SPREAD = 10.0


def _moved_by_an_ulp(module: nn.Module) -> nn.Module:
    """A copy whose parameters have each moved to a neighbouring number."""
    moved = copy.deepcopy(module)
    coins = torch.Generator().manual_seed(_UNSEEN)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=coins) * 2 - 1
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs.double())
    return moved


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
    scale = _FLOAT16_SCALE if training.precision == "float16" else 1.0
    loss.backward(torch.full_like(loss, scale))


def _captured(
    graph: Graph,
    program: Program,
    name: str,
    module: nn.Module,
    training: TrainingSpec,
    leaves: Leaves,
    seed: int,
) -> dict[str, Tensor | None]:
    module.zero_grad()
    lowered = lower(graph, name, _CPU, images_last=False)
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
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
    return found | _state(module)


def _state(module: nn.Module) -> dict[str, Tensor | None]:
    state: dict[str, Tensor | None] = {
        f"{_GRADIENT}{path}": parameter.grad for path, parameter in module.named_parameters()
    }
    return state | {f"buffer {path}": buffer for path, buffer in module.named_buffers()}


#: Gradients are compared on a scale of at least so much of the model's largest one: a parameter
#: whose true gradient is zero has nothing but rounding.
_FLOOR = 1e-3

_GRADIENT = "the gradient of "


def _gaps(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], name: str
) -> dict[str, float]:
    """How far apart tensors are, relative to their magnitude.

    Raises:
        CaptureError: one of them is missing, or of another type.
    """
    largest = max((_scale(t) for what, t in expected.items() if what.startswith(_GRADIENT)
                   and t is not None), default=0.0)  # fmt: skip
    gaps: dict[str, float] = {}
    for what, right in expected.items():
        left = found.get(what)
        if (left is None) != (right is None):
            raise CaptureError(
                f"captured and eager differ in {name}: {what} is "
                f"{'missing' if left is None else 'there'} in the captured graph"
            )
        if left is None or right is None:
            continue
        if left.shape != right.shape or left.dtype != right.dtype:
            raise CaptureError(f"captured and eager differ in {name}: {what} has another type")
        floor = _FLOOR * largest if what.startswith(_GRADIENT) else 0.0
        gaps[what] = _gap(left, right, max(floor, 1e-12))
    return gaps


def _refuse(gaps: Mapping[str, float], allowed: Mapping[str, float], name: str) -> None:
    for what, gap in gaps.items():
        if not gap <= allowed[what]:
            raise CaptureError(
                f"captured and eager differ in {name}: {what} by {gap:.2g} relative "
                f"(allowed {allowed[what]:.2g})"
            )


def _scale(tensor: Tensor) -> float:
    """The largest magnitude of a finite element; 1 where there is none."""
    finite = tensor.detach().double()
    finite = finite[finite.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0


def _gap(left: Tensor, right: Tensor, floor: float) -> float:
    if torch.equal(left, right) or not right.numel():
        return 0.0
    left, right = left.detach().double(), right.detach().double()
    same = (left == right) | (left.isnan() & right.isnan())
    gap = torch.where(same, 0.0, (left - right).abs()).max()
    return float(gap) / max(_scale(right), floor)
