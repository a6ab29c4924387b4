"""Capture: from a model and its data to a functional graph, checked against the eager module."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cgo.capture.bind import bind
from cgo.capture.convert import Program, convert
from cgo.capture.eager import (
    check_loss,
    materialised,
    registered_buffers,
    run_eagerly,
    timed,
)
from cgo.capture.evaluation import in_evaluation_mode
from cgo.capture.export import export, quiet, reason_of
from cgo.capture.kept import Kept
from cgo.capture.kinds import Kinds, skeleton
from cgo.capture.lightning import refuse_ignored_training
from cgo.capture.python_state import Watched, moved
from cgo.capture.record import record
from cgo.capture.traced import of_export, release
from cgo.capture.validate import program_graph, validate
from cgo.errors import CaptureError, ModelError, SpecError, UserExitError
from cgo.garbage import uncollected
from cgo.graph import Graph, dump
from cgo.graph_data import Factory, ModelEntry, StateEntry
from cgo.model import DataSpec, Model, TrainingSpec, as_json, digest_of, loss_function
from cgo.private.late_compiler import import_late
from cgo.runtime.data import Leaves, Loader, open_data
from cgo.runtime.optimizers import Updater
from cgo.runtime.state import RandomState, build_module
from cgo.user_code import contained
from cgo.weights import tensor_hash
from cgo.worth import Sample

log = logging.getLogger(__name__)

__all__ = ["Captured", "Capturer", "Examples"]


@dataclass(frozen=True)
class Examples:
    """One batch of each shape that a data spec's loader will give, by program name."""

    spec: DataSpec
    batches: Mapping[str, Leaves]
    epoch: tuple[int, int] = (0, 0)  # batches of an epoch's training, and of its evaluation

    @property
    def first(self) -> Leaves:
        """The first training batch."""
        return next(iter(self.batches.values()))

    @classmethod
    def of(cls, spec: DataSpec) -> Examples:
        """Open the data and take the batches.

        Raises:
            DataError: the source or a first batch is bad.
        """
        data = open_data(spec)
        loader = Loader(replace(data, spec=replace(spec, num_workers=0)), torch.device("cpu"))
        sizes = {"train": data.train_sizes, "validation": data.validation_sizes}
        batches = {
            f"{split}/{size}": loader.example(split, size)
            for split, found in sizes.items()
            for size in dict.fromkeys(found)
        }
        return cls(spec, batches, (len(data.train_sizes), len(data.validation_sizes)))

    @functools.cached_property
    def others(self) -> Mapping[str, Leaves]:
        """For each batch one of its shape with other samples, as far as there are any."""
        return {name: self._other(leaves) for name, leaves in self.batches.items()}

    def _other(self, leaves: Leaves) -> Leaves:
        """Samples of the batches that are shaped alike, the batch's own being the last of them.

        Where it is alone, the first half of it, each sample twice.
        """
        alike = [b for b in self.batches.values() if b is not leaves and _rows(b) == _rows(leaves)]
        places = [(b, row) for b in (*alike, leaves) for row in range(_size(b))]
        size = _size(leaves)
        taken = [places[i * len(places) // (2 * size)] for i in range(size)]
        return {key: torch.stack([b[key][row] for b, row in taken]) for key in leaves}


def _size(leaves: Leaves) -> int:
    return min(len(leaf) for leaf in leaves.values())


def _rows(leaves: Leaves) -> list[object]:
    """What samples are, but for their number."""
    return [(key, leaf.dtype, leaf.shape[1:]) for key, leaf in leaves.items()]


@dataclass(frozen=True)
class Captured:
    """One model, ready to be merged.

    `graph` is None for an opaque lane (`entry.opaque` says why). `state` holds the tensors of an
    `nn.Module` instance, which must travel as a file; a factory's are built again in the trial.
    """

    entry: ModelEntry
    graph: Graph | None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] | None = None
    digest: str = ""  # of an instance: equal for equal graphs and starting state
    begun: Mapping[str, Tensor] | None = None  # what a factory's module has after its first call


@dataclass(frozen=True)
class _Template:
    """What is the same for all models of one structure."""

    programs: Mapping[str, Program] | None  # None: it cannot be captured
    reason: str = ""  # why
    registers: bool = False  # its first call registers buffers

    def digest(self, state: Mapping[str, Tensor]) -> str:
        """Equal for models whose programs and starting state are equal."""
        programs = self.programs or {}
        texts = [dump(program_graph(program, name)) for name, program in programs.items()]
        return digest_of([texts, {path: tensor_hash(tensor) for path, tensor in state.items()}])


#: Ways of capturing, in the order in which they are tried.
Way = Literal["recording", "export"]
WAYS: tuple[Way, ...] = ("recording", "export")


#: A capture moves the process's random streams, and puts its own methods into torch, for a while.
_ALONE = threading.RLock()


#: Seconds of a capture from which on it is worth several threads.
_LONG_S = 3.0


class Capturer:
    """Captures models; equal structures over equal shapes are captured once.

    Args:
        ways: How a module's programs are found; the next where one fails.
    """

    def __init__(self, ways: Sequence[Way] | None = None) -> None:
        import_late()
        self._ways = tuple(WAYS if ways is None else ways)
        self._templates: dict[str, _Template] = {}
        self._kinds = Kinds()
        self._long = False  # a capture took long

    def capture(self, model: Model, examples: Examples) -> Captured:
        """Capture one model.

        Raises:
            ModelError: the model cannot be built or run at all, even eagerly.
        """
        with _ALONE, self._few_threads(), uncollected():
            module, random = self._module(model)
            refuse_ignored_training(model.model_id, module)
            with _watched(module, model.training).preserved():
                return self._captured(model, module, random, examples)

    @contextlib.contextmanager
    def _few_threads(self) -> Iterator[None]:
        """One thread, as long as captures are short: others are busy with workers that start.

        Operators of small models gain nothing from several, which wait for each other where
        processes share the cores.
        """
        threads, started = torch.get_num_threads(), time.perf_counter()
        if not self._long:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self._long |= time.perf_counter() - started > _LONG_S

    def plain(self, model: Model, examples: Examples, reason: str) -> Captured:
        """A factory's model as it is, to be trained by its own module.

        Args:
            model: Given as a factory.
            examples: Of its data.
            reason: Why it is not captured.

        Raises:
            ModelError: the model cannot be built.
        """
        with _ALONE:
            module, random = self._module(model)
            refuse_ignored_training(model.model_id, module)
            begun = _prepared(model, module, random, examples)
        return Captured(replace(_entry(model, module, random), opaque=reason), None, begun=begun)

    def sample(self, model: Model, examples: Examples) -> Sample:
        """How long a step of a model takes, called twice on its first training batch.

        Raises:
            Exception: whatever the model raises.
        """
        with _ALONE, self._few_threads():
            module, _ = self._module(model)
            layers = sum(not any(part.children()) for part in module.modules())
            with contained:
                seconds = [timed(module, model.training, examples.first) for _ in range(2)]
        return Sample(min(seconds), layers)

    def _captured(
        self, model: Model, module: nn.Module, random: RandomState | None, examples: Examples
    ) -> Captured:
        begun = _prepared(model, module, random, examples)
        found, fresh = self._template(model, module, random, examples)
        begun = begun or fresh
        entry = _entry(model, module, random)
        if found.programs is None:
            if random is None:
                raise ModelError(
                    f"model {model.model_id!r}: this nn.Module instance cannot be captured "
                    f"({found.reason}), so it cannot be sent to a trial; give a factory "
                    "('package.module:callable' with kwargs) instead"
                )
            return Captured(replace(entry, opaque=found.reason), None, begun=begun)
        constants: dict[str, Tensor] = {}
        for program in found.programs.values():
            constants |= program.constants
        graph = bind(found.programs, model, module)
        if random is not None:
            return Captured(entry, graph, constants, begun=begun)
        tensors = _tensors(module, entry.state)
        return Captured(entry, graph, constants, tensors, found.digest(tensors))

    def _module(self, model: Model) -> tuple[nn.Module, RandomState | None]:
        """The module, and the random streams after its factory; None of an instance."""
        if isinstance(model.module, str):
            try:
                return build_module(
                    model.module, copy.deepcopy(model.kwargs), model.seed, model.training.precision
                )
            except (ModelError, SpecError) as error:
                raise ModelError(f"model {model.model_id!r}: {error}") from error
        module = copy.deepcopy(model.module)
        return (module.double() if model.training.precision == "float64" else module), None

    def _template(
        self, model: Model, module: nn.Module, random: RandomState | None, examples: Examples
    ) -> tuple[_Template, Mapping[str, Tensor] | None]:
        """The model's programs, and the buffers that its first call registers, if any."""
        key = _structure(model, module, examples)
        known = self._templates.get(key)
        if known is None:
            known, fresh = self._found(model, module, random, examples)
            self._templates[key] = known
            return known, fresh
        fresh = (
            registered_buffers(model, module, random, examples.first) if known.registers else None
        )
        if known.programs is not None:
            # Another seed, or another call of the factory, may have drawn another structure that
            # its printed form does not show: the cached graph must fit this very module.
            name = _judged(known.programs)
            try:
                program, leaves = known.programs[name], examples.batches[name]
                with contained:
                    other = examples.others[name]
                    validate(program, name, module, model.training, leaves, other, seeds=(1,))
            except (CaptureError, UserExitError):
                known, more = self._found(model, module, random, examples)
                return known, fresh or more
        return known, fresh

    def _found(
        self, model: Model, module: nn.Module, random: RandomState | None, examples: Examples
    ) -> tuple[_Template, Mapping[str, Tensor] | None]:
        """Capture a structure that is new, in the first way that works."""
        if "recording" in self._ways:
            found, fresh = self._recorded(model, module, random, examples)
            if found.programs is not None:
                return found, fresh
        else:
            fresh = registered_buffers(model, module, random, examples.first)
        for name, leaves in examples.batches.items():
            run_eagerly(model, module, name, leaves)  # what fails here fails alone as well
        if "export" in self._ways:
            found = _tried(_export_all, model, module, examples)
        return replace(found, registers=fresh is not None), fresh

    def _recorded(
        self, model: Model, module: nn.Module, random: RandomState | None, examples: Examples
    ) -> tuple[_Template, Mapping[str, Tensor] | None]:
        """Record a structure, in a second attempt with what the first call registers."""
        before = len(dict(module.named_buffers()))
        found = _tried(_record_all, model, module, examples, self._kinds)
        if found.programs is not None or not found.registers:
            return found, None
        fresh = registered_buffers(model, module, random, examples.first)
        if len(dict(module.named_buffers())) > before:
            found = _tried(_record_all, model, module, examples, self._kinds)
        return replace(found, registers=fresh is not None), fresh


def _tried(way: Callable[..., Mapping[str, Program]], model: Model, *given: Any) -> _Template:
    """What a way of capturing gives, or the reason why it gives nothing."""
    try:
        with quiet(), contained:
            return _Template(way(model, *given))
    except CaptureError as error:
        reason = str(error)
        registers = isinstance(error, _RegistersBuffersError)
    except Exception as error:  # whatever a module can raise while it is watched or traced
        reason, registers = reason_of(error), False
    log.debug("%r: no %s: %s", model.model_id, way.__name__, reason)
    return _Template(None, reason, registers)


def _judged(names: Iterable[str]) -> str:
    """The training program that is compared: the smallest batch that is not too small to tell."""
    sizes = sorted(int(n.partition("/")[2]) for n in names if n.startswith("train/"))
    return f"train/{next((size for size in sizes if size >= _ENOUGH), sizes[-1])}"


#: Samples of a batch whose statistics tell one module from another.
_ENOUGH = 8


class _RegistersBuffersError(CaptureError):
    """A first call registered buffers."""


def _record_all(
    model: Model, module: nn.Module, examples: Examples, kinds: Kinds
) -> dict[str, Program]:
    """Record every program; what it takes to trust them is compared with the module.

    Args:
        model: Whose.
        module: Afterwards as it was.
        examples: Batches.
        kinds: Of calls that are known to be captured rightly; gets what is new.

    Raises:
        CaptureError: one of them cannot be recorded, or is not what the module computes.
    """
    kept, training = Kept(module), model.training
    watched = _watched(module, training)
    buffers, begun = [path for path, _ in module.named_buffers()], watched.snapshot()
    trained = [parameter.requires_grad for parameter in module.parameters()]
    found: dict[str, Program] = {}

    def program(
        name: str, leaves: Leaves, other: Leaves, proof: list[str] | None
    ) -> tuple[Program, list[str]]:
        split = name.partition("/")[0]
        with kept.afterwards():
            traced = record(module, training, name, leaves)
            try:
                if [path for path, _ in module.named_buffers()] != buffers:
                    raise _RegistersBuffersError("its first call registers buffers")
                if [parameter.requires_grad for parameter in module.parameters()] != trained:
                    raise CaptureError("forward sets which parameters are trained")
                check_loss(model, name, traced.loss())
                dtype, gradients = training.autocast_dtype, split == "train"
                made = convert(traced, autocast_dtype=dtype, gradients=gradients)
                shape = skeleton(traced)
                trusted = shape == proof or (
                    split != "train" and kinds.knows(traced, module, training, split)
                )
                # Of a call that moves what Python keeps, a next one may be of another kind.
                if not trusted or moved(begun, watched.snapshot()) is not None:
                    validate(made, name, module, training, leaves, other, seeds=(1,), called=kept)
                    kinds.learn(traced, module, training, split)
            finally:
                release(traced.graph)
        return made, shape

    proof: list[str] | None = None
    if (first := _proof(program, examples)) is not None:
        name, found[name], proof = first
    for name, leaves in examples.batches.items():
        if name not in found:
            found[name], shape = program(name, leaves, examples.others[name], proof)
            proof = proof or shape
    return {name: found[name] for name in examples.batches}


def _proof(
    program: Callable[[str, Leaves, Leaves, None], tuple[Program, list[str]]], examples: Examples
) -> tuple[str, Program, list[str]] | None:
    """Training on a few samples, and its skeleton, if that is what the module computes.

    Whatever differs from it in nothing but sizes need not be compared, which would take longer.

    Raises:
        CaptureError: it is not.
    """
    name = _judged(examples.batches)
    given = examples.batches[name], examples.others[name]
    size = int(name.partition("/")[2])
    if size >= 4 * _ENOUGH:
        name = f"train/{_ENOUGH}"
        given = _first(given[0]), _first(given[1])
    try:
        with contained:
            return name, *program(name, *given, None)
    except CaptureError:  # once more, and what Python kept of this call would pass for a constant
        raise
    except Exception as error:  # a module for batches of its own size
        log.debug("%s cannot be recorded: %s", name, error)
        return None


def _first(leaves: Leaves) -> Leaves:
    return {key: leaf[:_ENOUGH] for key, leaf in leaves.items()}


def _export_all(model: Model, module: nn.Module, examples: Examples) -> dict[str, Program]:
    """Export every program.

    Raises:
        CaptureError: one of them cannot be captured, or is not what the module computes.
        Exception: whatever the module, or torch, raises while it is traced.
    """
    exports: dict[str, ExportedProgram] = {}
    return {
        name: _program(module, model.training, name, leaves, examples.others[name], exports)
        for name, leaves in examples.batches.items()
    }


#: Runs of a validation; a guess has to hold at two states where nothing coincides.
_CHECK, _PROOF = (0, 1), (0, 1, 2)


def _program(
    module: nn.Module,
    training: TrainingSpec,
    name: str,
    leaves: Leaves,
    other: Leaves,
    exports: dict[str, ExportedProgram],
) -> Program:
    """Export one program and validate it; `exports` holds the first export of each split.

    Exporting is most of the cost. The smaller last batch usually differs in nothing but shapes, and
    evaluation in little else: so the split's first export is tried on the new shapes, and for the
    first evaluation that of training; what validates is kept.
    """
    split = name.partition("/")[0]

    def converted() -> Program:
        traced = of_export(exports[split], leaves, "module.")
        return convert(traced, autocast_dtype=training.autocast_dtype)

    guessed = split not in exports and "train" in exports
    if guessed:
        exports[split] = in_evaluation_mode(exports["train"])
    if split in exports:
        try:
            with contained:
                program = converted()
                seeds = _PROOF if guessed else _CHECK
                validate(
                    program, name, module, training, leaves, other, seeds=seeds, proven=guessed
                )
                return program
        except Exception as error:
            log.debug("%s is exported by itself: %s", name, error)
    exports[split] = export(module, training, name, leaves)
    program = converted()
    validate(program, name, module, training, leaves, other)
    return program


def _prepared(
    model: Model, module: nn.Module, random: RandomState | None, examples: Examples
) -> Mapping[str, Tensor] | None:
    """Give lazy parameters their shapes, and see that the optimizer takes the parameters."""
    begun = materialised(model, module, random, examples.first)
    try:
        Updater(model.training, list(module.parameters()))
    except ModelError as error:
        raise ModelError(f"model {model.model_id!r}: {error}") from error
    return begun


def _entry(model: Model, module: nn.Module, random: RandomState | None) -> ModelEntry:
    return ModelEntry(
        id=model.model_id,
        seed=model.seed,
        data=model.data.digest,
        training=model.training,
        state=_state_entries(module),
        factory=None if random is None else Factory(str(model.module), model.kwargs),
    )


def _printed(module: nn.Module) -> str:
    """The module as text; of one that cannot be printed (NNI's frozen spaces), its classes."""
    try:
        with contained:
            return str(module)
    except Exception as error:
        log.debug("%s cannot be printed: %s", type(module).__name__, error)
        return repr([(path, type(part).__qualname__) for path, part in module.named_modules()])


def _structure(model: Model, module: nn.Module, examples: Examples) -> str:
    """Key of the cache: what a capture depends on, but for values of weights."""
    tensors = [
        (path, str(t.dtype), list(t.shape), t.requires_grad)
        for path, t in (*module.named_parameters(), *module.named_buffers())
    ]
    shapes = {
        name: {key: [str(leaf.dtype), list(leaf.shape)] for key, leaf in leaves.items()}
        for name, leaves in examples.batches.items()
    }
    what: Any = [type(module).__module__, type(module).__qualname__]
    if isinstance(model.module, str):
        what = [model.module, model.kwargs]
    training = as_json(model.training)
    modes = [part.training for part in module.modules()]
    # What evaluation alone reads, or runs, would not show where the training program is tried.
    kept = [repr(place) for place in _watched(module, model.training).snapshot().items()]
    kept += [
        _content(value)
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, (Tensor, types.FunctionType))
    ]
    spec = [training["loss"], training["precision"]]
    return digest_of([what, _printed(module), tensors, modes, kept, shapes, *spec])


def _content(value: Tensor | types.FunctionType) -> str:
    if isinstance(value, Tensor):
        return tensor_hash(value) if value.layout is torch.strided else ""
    code = value.__code__
    return repr((code.co_code, code.co_consts, code.co_names))


def _watched(module: nn.Module, training: TrainingSpec) -> Watched:
    return Watched(module, (loss_function(training.loss),))


def _state_entries(module: nn.Module) -> tuple[StateEntry, ...]:
    first: dict[int, str] = {}
    entries = []
    persistent = set(module.state_dict(keep_vars=True))
    named: list[tuple[Literal["parameter", "buffer"], str, Tensor]] = []
    named += [("parameter", *item) for item in module.named_parameters(remove_duplicate=False)]
    named += [("buffer", *item) for item in module.named_buffers(remove_duplicate=False)]
    for kind, path, tensor in named:
        alias = first.get(id(tensor))
        first.setdefault(id(tensor), path)
        entries.append(
            StateEntry(
                path=path,
                kind=kind,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                trainable=kind == "parameter" and tensor.requires_grad,
                persistent=path in persistent,
                alias_of=alias,
            )
        )
    return tuple(entries)


def _tensors(module: nn.Module, state: tuple[StateEntry, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found |= dict(module.named_buffers(remove_duplicate=False))
    return {entry.path: found[entry.path] for entry in state if entry.alias_of is None}
