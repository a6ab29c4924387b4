"""Recording a step: the module runs once, on a real batch, and each operator it calls is noted.

A recording takes the time of the forward that it watches. What it cannot show, it refuses: a
value that Python reads of a tensor, a result whose shape depends on values, tensors that stand for
others. Where it is refused, a module is exported instead (`cgo.capture.export`).

What a recording holds of one run and not of the next (numbers that Python drew or counted) shows
when it is compared with the module at another state, as every capture is.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from cgo.capture.export import Written, at_line, is_users
from cgo.capture.stand_ins import stand_ins
from cgo.capture.static import is_static
from cgo.capture.traced import Setting, Source, Traced, release
from cgo.errors import CaptureError
from cgo.model import TrainingSpec
from cgo.private.operators import OpOverload
from cgo.private.recording import is_wrapped, recording, run
from cgo.private.storages import identity
from cgo.runtime.data import Leaves, preserved_random_state
from cgo.runtime.step import autocast, eval_mode

_ATEN = torch.ops.aten


def record(module: nn.Module, training: TrainingSpec, name: str, leaves: Leaves) -> Traced:
    """Run one program of a module and note what it calls.

    Args:
        module: Called once; what that moves (buffers, attributes) has moved.
        training: Its loss and precision.
        name: The program's.
        leaves: A batch.

    Raises:
        CaptureError: something cannot be recorded; says what, and at which line.
        Exception: whatever the module raises.
    """
    step = Written(module, training, tuple(leaves))
    own = {key: leaf.clone() for key, leaf in leaves.items()}
    evaluation = name.startswith("validation")
    modes: Any = contextlib.ExitStack()
    with preserved_random_state(), autocast(training, "cpu"), modes:
        torch.manual_seed(0)
        if evaluation:
            modes.enter_context(torch.no_grad())
            modes.enter_context(eval_mode(step))
        recorder = _Recording(module, own)
        try:
            with stand_ins(module), _unread(recorder), recording(recorder.call):
                drawn = _drawn()
                loss, prediction = step(*own.values())
            if _drawn() != drawn:
                raise CaptureError("forward draws random numbers of Python's or NumPy's")
            return recorder.finish(loss, prediction)
        except Exception:
            release(recorder.graph)
            raise


def _drawn() -> object:
    """Where Python's and NumPy's streams are."""
    return random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]


class _Recording:
    """Writes calls into a graph while they are made."""

    def __init__(self, module: nn.Module, leaves: Leaves) -> None:
        self.graph = fx.Graph()
        self.sources: dict[str, Source] = {}
        self.refused: CaptureError | None = None
        self.calling = False  # an operator, which may read what it likes
        self._nodes: dict[int, fx.Node] = {}  # by the identity of tensors that are kept
        self._made: dict[object, fx.Node] = {}  # by where they lie: what factories gave
        self._kept: list[Any] = []
        self._lifted = 0
        self._read: list[tuple[_Attribute, Tensor]] = []  # of those: what a call read
        self._module = module
        self._places: dict[int, _Attribute] | None = None  # of tensors that modules keep besides
        self._grad, self._cast = torch.is_grad_enabled(), _autocast_setting()
        self._dtype = torch.get_default_dtype()
        self._own: dict[int, tuple[str, Source]] = {}  # what may be read, by identity
        for path, tensor in module.named_parameters():
            source = Source("parameter", path, tensor, tensor)
            self._own[id(tensor)] = f"p_{_snake(path)}", source
        for path, buffer in module.named_buffers():
            self._own[id(buffer)] = f"b_{_snake(path)}", Source("buffer", path, buffer, buffer)
        for key, leaf in leaves.items():
            self._own[id(leaf)] = key, Source("input", key, leaf, leaf)

    def _source(self, name: str, tensor: Tensor, source: Source) -> fx.Node:
        node = self.graph.create_node("placeholder", name, name=name)
        self.sources[node.name] = source
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)
        return node

    def refuse(self, reason: str) -> None:
        """Raise, and remember: user code may catch what is raised in it."""
        self.refused = self.refused or CaptureError(f"{reason}{at_line(_users_line())}")
        raise self.refused

    def call(self, overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator and write it down."""
        self.calling = True
        try:
            return self._call(overload, args, kwargs)
        finally:
            self.calling = False

    def _call(self, overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(overload, OpOverload):
            self.refuse(f"higher-order operator {overload}")
        if torch.get_default_dtype() is not self._dtype:
            self.refuse("forward changes the default dtype")
        if overload is _ATEN.lift_fresh.default and not self._is_known(args[0]):
            return self._lift(args[0])
        given = (
            tuple(map(self._argument, args)),
            {key: self._argument(v) for key, v in kwargs.items()},
        )
        if not is_static(overload, args, kwargs):
            self.refuse(f"forward looks at a value that depends on data ({overload})")
        result = run(overload, args, kwargs)
        self._write_down(overload, *given, result)
        return result

    def _write_down(self, overload: OpOverload, args: Any, kwargs: Any, result: Any) -> None:
        name = overload._schema.name.partition("::")[2]
        node = self.graph.create_node("call_function", overload, args, kwargs, name)
        node.meta["val"] = result
        node.meta["line"] = _users_line()
        self._note_setting(node)
        self._kept.append(result)
        if isinstance(result, Tensor):
            self._learn(result, node, overload)
            if result.layout is torch.strided and _is_factory(overload):
                self._made[_place(result)] = node
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta["val"] = item
                    self._learn(item, part, overload)

    def _learn(self, result: Tensor, node: fx.Node, overload: OpOverload) -> None:
        """A result is known by its node; one that was known before stays what it was."""
        if overload._schema.is_mutable or not self._is_known(result):
            self._nodes[id(result)] = node

    def _note_setting(self, node: fx.Node) -> None:
        detached = self._grad and not torch.is_grad_enabled()
        cast = _autocast_setting()
        if detached or cast != self._cast:
            node.meta["setting"] = Setting(detached, None if cast == self._cast else cast)

    def _is_known(self, tensor: Tensor) -> bool:
        return id(tensor) in self._nodes or id(tensor) in self._own

    def _lift(self, tensor: Tensor) -> Tensor:
        """A tensor made of Python's numbers: a constant, of which each call makes a new one."""
        node = self._constant(tensor)
        result: Tensor = run(_ATEN.lift_fresh.default, (tensor,), {})
        del self._nodes[id(tensor)]  # the result may be the same object
        self._write_down(_ATEN.lift_fresh_copy.default, (node,), {}, result)
        return result

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return [self._argument(item) for item in value]
        return value

    def _tensor(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        if (own := self._own.get(id(tensor))) is not None:
            return self._source(own[0], tensor, own[1])
        # Torch hands out what a factory made as another object, as somebody else (we) keeps it.
        if tensor.layout is torch.strided and (node := self._made.get(_place(tensor))) is not None:
            self._nodes[id(tensor)] = node
            self._kept.append(tensor)
            return node
        if type(tensor) not in (Tensor, nn.Parameter) or is_wrapped(tensor):
            self.refuse(f"a tensor of type {type(tensor).__name__}")
        if tensor.grad_fn is not None:
            self.refuse("a tensor that carries a gradient from outside of the step")
        return self._constant(tensor)

    def _constant(self, tensor: Tensor) -> fx.Node:
        if self._places is None:
            self._places = _kept_tensors(self._module)
        if (place := self._places.get(id(tensor))) is not None:
            name = _snake(f"{place.path}.{place.name}" if place.path else place.name)
            self._read.append((place, tensor))
        else:
            name, self._lifted = f"lifted_tensor_{self._lifted}", self._lifted + 1
        value = run(_ATEN.clone.default, (run(_ATEN.detach.default, (tensor,), {}),), {})
        return self._source(f"c_{name}", tensor, Source("constant", "", value, tensor))

    def finish(self, loss: Any, prediction: Any) -> Traced:
        """The graph, with its results.

        Raises:
            CaptureError: something was refused, whatever user code made of it.
        """
        if self.refused is not None:
            raise self.refused
        for place, tensor in self._read:
            if vars(place.part).get(place.name) is not tensor:
                raise CaptureError(
                    f"forward reads the tensor in attribute `{place.name}` of {_named(place.path)} "
                    "and puts another one there; register it as a buffer"
                )
        found = [
            self._tensor(value) if isinstance(value, Tensor) and self._is_known(value) else None
            for value in (loss, prediction)
        ]
        self.graph.output(tuple(found))
        return Traced(self.graph, self._sorted_sources())

    def _sorted_sources(self) -> dict[str, Source]:
        """Sources in the order of the module's own, with constants before the inputs."""
        places = {(s.kind, s.key): place for place, (_, s) in enumerate(self._own.values())}
        last = len(places)

        def order(item: tuple[str, Source]) -> tuple[bool, int]:
            source = item[1]
            return source.kind == "input", places.get((source.kind, source.key), last)

        return dict(sorted(self.sources.items(), key=order))


def _is_factory(overload: OpOverload) -> bool:
    """Whether an operator makes a tensor of nothing, or like another."""
    name = overload._schema.name.partition("::")[2]
    if name.endswith("_like") or name.startswith("new_"):
        return True
    return not any("Tensor" in str(argument.type) for argument in overload._schema.arguments)


def _place(tensor: Tensor) -> object:
    """What two objects have in common that are one tensor."""
    where = identity(tensor), tensor.storage_offset()
    return (*where, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _named(path: str) -> str:
    return f"part {path!r}" if path else "the module"


def _snake(path: str) -> str:
    return path.replace(".", "_")


def _autocast_setting() -> tuple[str, Any, bool]:
    return "cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")


@dataclass(frozen=True, slots=True)
class _Attribute:
    """An attribute of a part of a module."""

    path: str  # the part's
    part: nn.Module
    name: str


def _kept_tensors(module: nn.Module) -> dict[int, _Attribute]:
    """Where tensors are that parts keep which are neither parameters nor buffers."""
    return {
        id(value): _Attribute(path, part, name)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }


#: Whether files are of users, by their names.
_USERS: dict[str, bool] = {}


def _users_line() -> tuple[str, int] | None:
    """File and line of the user's code that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _USERS:
            _USERS[file] = is_users(file)
        if _USERS[file]:
            return file, frame.f_lineno
        frame = frame.f_back
    return None


#: Methods that give Python, or somebody else, what a tensor holds, and are no operators; and hooks,
#: which no operator shows.
_READS = ("numpy", "tolist", "__array__", "__dlpack__", "__repr__", "data_ptr", "storage",
          "untyped_storage", "register_hook")  # fmt: skip


@contextlib.contextmanager
def _unread(recorder: _Recording) -> Iterator[None]:
    """Refuse what reads a tensor's memory behind the operators' back, in this thread."""
    owner = threading.get_ident()
    own = vars(Tensor)
    before = {name: own[name] for name in _READS if name in own}

    def refusing(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == owner and not recorder.calling:
                what = "hangs on hooks" if "hook" in name else "reads a tensor's values"
                recorder.refuse(f"forward {what} ({name})")
            return plain(tensor, *args, **kwargs)

        return method

    try:
        for name in _READS:
            setattr(Tensor, name, refusing(name, getattr(Tensor, name)))
        yield
    finally:
        for name in _READS:
            if name in before:
                setattr(Tensor, name, before[name])
            else:
                delattr(Tensor, name)
