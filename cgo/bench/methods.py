"""Ways of training many models: the baselines, and ours.

A method takes models and gives a function that trains them a number of steps. Others can be plugged
in: an entry point of the group `cgo.bench` whose object is called with the models.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cgo import weights
from cgo.bench.jax_vmap import JaxSteps, refusal
from cgo.graph import ModelId
from cgo.graph_data import GraphData
from cgo.model import Model, loss_function, optimizer_class
from cgo.planner import Planner
from cgo.private import many_tensors
from cgo.runtime.accelerator import accelerator_for
from cgo.runtime.captured import CapturedLanes
from cgo.runtime.data import Leaves, Loader, open_data
from cgo.runtime.lanes import MergedLanes
from cgo.runtime.layouts import channels_last
from cgo.runtime.member import Member
from cgo.runtime.state import build_module
from cgo.runtime.tuning import make_tuner
from cgo.tuning import Tuning

#: Trains that many steps of all models.
Steps = Callable[[int], None]

#: The baseline of all ratios.
SERIAL = "serial"

_CPU = torch.device("cpu")

#: What a trial of this benchmark would train: a few epochs of a small data set. A GPU's steps are
#: some twenty times shorter, so that this is about as long.
_PLANNED_STEPS = {"cpu": 1000, "cuda": 20_000}


class NotApplicable(Exception):
    """A method that cannot train these models; says why."""


@dataclass(frozen=True)
class Method:
    """A way of training models."""

    prepare: Callable[[list[Model]], Steps]
    compiles: bool = False  # takes minutes to prepare; only on request


def all_methods() -> dict[str, Method]:
    """Ours, the baselines, and what other packages plug in, by name."""
    plugged = {e.name: Method(e.load()) for e in entry_points(group="cgo.bench")}
    return _METHODS | plugged


# --- the serial loop ----------------------------------------------------------------------------


class Solo:
    """One model by hand: its module, its optimizer, its batches.

    Args:
        model: Built by a factory.
        batches: What it goes round over; they lie on the device that it trains on.
        change: What is made of its module, once that lies on the device.
        optimizer: Further arguments of the optimizer.
    """

    def __init__(
        self,
        model: Model,
        batches: list[tuple[Tensor, Tensor]],
        change: Callable[[nn.Module], nn.Module] = lambda net: net,
        **optimizer: Any,
    ) -> None:
        assert isinstance(model.module, str)
        training = model.training
        net, _ = build_module(model.module, model.kwargs, model.seed, training.precision)
        self.net = change(net.to(batches[0][0].device))
        self.loss = loss_function(training.loss)
        kind = optimizer_class(training.optimizer)
        self.optimizer = kind(self.net.parameters(), **training.optimizer_kwargs, **optimizer)
        double = training.precision == "float64"
        self.batches = itertools.cycle([(_doubled(x) if double else x, y) for x, y in batches])

    def step(self) -> None:
        """Train one step, on the next batch."""
        self.learn(*next(self.batches))

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Train one step on this batch."""
        self.optimizer.zero_grad()
        self.objective(x, y).backward()
        self.optimizer.step()

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of this batch."""
        value: Tensor = self.loss(self.net(x), y)
        return value


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def batches_of(
    models: list[Model], device: torch.device = _CPU
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The batches of each data set that the models train on, by its digest, in memory."""
    found = {}
    for model in models:
        spec = model.data
        if spec.digest not in found:
            x, y = open_data(spec).train.tensors
            size = spec.batch_size
            found[spec.digest] = [
                (x[i : i + size].clone().to(device), y[i : i + size].clone().to(device))
                for i in range(0, len(y) - size + 1, size)
            ]
    return found


def loop(solos: list[Solo]) -> Steps:
    """Each model in turn, a number of steps."""

    def steps(count: int) -> None:
        for solo in solos:
            for _ in range(count):
                solo.step()

    return steps


def serial(models: list[Model], *, images_last: bool = False, **optimizer: Any) -> Steps:
    """Each model in turn; `optimizer` are further arguments, such as `fused=True`."""
    batches = batches_of(models)
    if images_last:
        batches = {key: [(channels_last(x), y) for x, y in found] for key, found in batches.items()}
    change = _last_module if images_last else lambda net: net
    return loop([Solo(m, batches[m.data.digest], change, **optimizer) for m in models])


def _last_module(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def compiled(models: list[Model]) -> Steps:
    """The serial loop over `torch.compile`d modules."""
    batches = batches_of(models)
    solos = [Solo(m, batches[m.data.digest], lambda net: _compiled(net)) for m in models]
    return loop(solos)


def _compiled(net: nn.Module) -> nn.Module:
    module: nn.Module = torch.compile(net)  # type: ignore[assignment]
    return module


# --- models that are alike ------------------------------------------------------------------------


def stacked(models: list[Model]) -> Steps:
    """`torch.func.stack_module_state` and `vmap`, with one vectorised SGD step."""
    if len({(m.module, str(m.kwargs), m.data.digest) for m in models}) > 1:
        raise NotApplicable("vmap takes models of one architecture only")
    (batches,) = batches_of(models).values()
    solos = [Solo(model, batches) for model in models]
    if any(buffer.ndim for solo in solos for buffer in solo.net.buffers()):
        raise NotApplicable("batch norm writes its statistics in place, which vmap refuses")
    parameters, buffers = torch.func.stack_module_state([solo.net for solo in solos])
    net, loss = solos[0].net, solos[0].loss

    def one(own: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = loss(torch.func.functional_call(net, (own, rest), (x,)), y)
        return value

    losses = torch.func.vmap(one, (0, 0, None, None), randomness="different")
    step = _Momentum(list(parameters.values()), models)
    cycle = itertools.cycle(batches)

    def steps(count: int) -> None:
        for _ in range(count):
            x, y = next(cycle)
            step(losses(parameters, buffers, x, y).sum())

    return steps


class _Momentum:
    """SGD with momentum over stacked parameters, a learning rate a model."""

    def __init__(self, parameters: list[Tensor], models: list[Model]) -> None:
        given = [model.training.optimizer_kwargs for model in models]
        self.parameters = parameters
        self.moments = [torch.zeros_like(parameter) for parameter in parameters]
        rates = torch.tensor([float(kwargs["lr"]) for kwargs in given])
        self.rates = [rates.view(-1, *[1] * (p.ndim - 1)) for p in parameters]
        self.momentum = float(given[0]["momentum"])

    def __call__(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            many_tensors.mul_(self.moments, self.momentum)
            many_tensors.add_(self.moments, gradients)
            many_tensors.addcmul_(self.parameters, self.moments, self.rates, value=-1.0)


def jax_vmap(models: list[Model]) -> Steps:
    """JAX's `jit(vmap(step))`, with donated buffers."""
    (batches, *_) = batches_of(models).values()
    nets = [Solo(model, batches).net for model in models]
    if (reason := refusal(models, nets[0])) is not None:
        raise NotApplicable(reason)
    try:
        return JaxSteps(models, nets, batches)  # type: ignore[arg-type]  # as `refusal` looked
    except ImportError as error:
        raise NotApplicable(
            f"JAX cannot be imported ({error}): pip install 'cgo-engine[jax]'"
        ) from error


# --- processes ------------------------------------------------------------------------------------


def processes(models: list[Model]) -> Steps:
    """The serial loop in as many processes as there are cores, side by side."""
    workers = min(len(os.sched_getaffinity(0)), len(models))
    if workers < 2:
        raise NotApplicable("one core, or one model")
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    for worker in range(workers):
        ours, theirs = context.Pipe()
        share = [_portable(model) for model in models[worker::workers]]
        process = context.Process(target=_serve, args=(theirs, share), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()  # ready

    def steps(count: int) -> None:
        for pipe in pipes:
            pipe.send(count)
        for pipe in pipes:
            pipe.recv()

    weakref.finalize(steps, _close, pipes)
    return steps


def _portable(model: Model) -> tuple[Any, ...]:
    return model.module, model.kwargs, model.data, model.training, model.seed


def _close(pipes: list[Connection]) -> None:
    for pipe in pipes:
        pipe.close()


def _serve(pipe: Connection, share: list[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    models = [
        Model(module, kwargs, data=data, training=training, seed=seed)
        for module, kwargs, data, training, seed in share
    ]
    steps = serial(models)
    steps(1)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            steps(pipe.recv())
            pipe.send(None)


# --- ours ---------------------------------------------------------------------------------------


def merged(
    models: list[Model],
    tuning: Tuning | None = None,
    *,
    device: torch.device = _CPU,
    data: GraphData | None = None,
    tell: Callable[..., None] = lambda what, **figures: None,
) -> Steps:
    """The merged trial's step, as a trial takes it.

    Args:
        models: What to train.
        tuning: How kernels are chosen.
        device: Where the models run.
        data: Their document, where they were planned before.
        tell: Hears what was chosen and captured, as a trial's events do.

    Raises:
        NotApplicable: a model was not captured.
    """
    temporary = tempfile.TemporaryDirectory(prefix="cgo-bench-")
    data = data or _planned(models, Path(temporary.name))
    constants = _constants(data, device)
    parts = []
    for key in data.data:
        entries = [entry for entry in data.models if entry.data == key]
        members = [Member(entry, data, device, data.base, lambda event: None) for entry in entries]
        tuner = make_tuner(tuning or Tuning(), device, _PLANNED_STEPS[device.type], tell=tell)
        given = data.graph, members, constants, device
        lanes = MergedLanes(*given, tuner, tell, tuner.tuning)
        captured = CapturedLanes(lanes, accelerator_for(device), tell)
        batches = itertools.cycle(list(Loader(open_data(data.data[key]), device).train(0)))
        parts.append((captured, [member.id for member in members], batches))

    def step(captured: CapturedLanes, ids: list[ModelId], size: int, leaves: Leaves) -> None:
        if captured.train(ids, leaves, size):
            failures = captured.finish(ids, size)
        else:
            failures = _eagerly(captured.lanes, ids, leaves, size)
        for failure in failures.values():
            raise failure

    def steps(count: int) -> None:
        for captured, ids, batches in parts:
            for size, leaves in itertools.islice(batches, count):
                step(captured, ids, size, leaves)

    weakref.finalize(steps, temporary.cleanup)
    return steps


def _eagerly(
    lanes: MergedLanes, ids: list[ModelId], leaves: Leaves, size: int
) -> dict[ModelId, Exception]:
    for id_ in ids:
        lanes.members[id_].updater.zero_grad()
    found = lanes.train(ids, leaves, size)
    failures = {id_: one for id_, one in found.items() if isinstance(one, Exception)}
    return failures or lanes.update(ids)


def _planned(models: list[Model], folder: Path) -> GraphData:
    planned = Planner().plan(models, folder)
    if planned.graph_data is None or planned.report.opaque:
        raise NotApplicable(f"not captured: {planned.failures or planned.report.opaque}")
    return planned.graph_data


def _constants(data: GraphData, device: torch.device) -> dict[str, Tensor]:
    if data.constants is None:
        return {}
    stored = weights.load(data.base / data.constants.file)
    return {content: value.to(device) for content, value in stored.items()}


_METHODS = {
    SERIAL: Method(serial),
    "serial-channels-last": Method(functools.partial(serial, images_last=True)),
    "serial-foreach": Method(functools.partial(serial, foreach=True)),
    "serial-fused": Method(functools.partial(serial, fused=True)),
    "serial-channels-last-fused": Method(functools.partial(serial, images_last=True, fused=True)),
    "serial-compile": Method(compiled, compiles=True),
    "vmap": Method(stacked),
    "jax": Method(jax_vmap),
    "processes": Method(processes),
    "cgo": Method(merged),
    "cgo-compiled": Method(functools.partial(merged, tuning=Tuning(compile=True)), compiles=True),
}
