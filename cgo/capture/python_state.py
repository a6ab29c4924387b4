"""What Python keeps from one call of a module to the next, and whether calls move it.

A forward may count its calls, keep a list, anneal a number or draw from a generator of its own; a
captured graph would hold the value that it saw. So what Python sees of a module is written down
between calls: attributes of the module and of its parts, what its functions close over, globals
that they read, and class attributes. Tensors are left to validation, which compares values; but a
tensor of one element that is neither parameter nor buffer is a counter like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cgo.user_code import contained

#: Levels of containers and objects that are looked into, and items of each.
_DEPTH = 4
_ITEMS = 1000

#: Functions that are looked at, those that are called included.
_FUNCTIONS = 300

#: What every module has: parameters and buffers are compared by value, parts are looked at.
_OWN = frozenset(vars(nn.Module())) | {"_parameters", "_buffers", "_modules"}

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

#: Types whose values never move, or are looked at elsewhere, or (loggers) give no numbers.
_FIXED = (nn.Module, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device,
          torch.Size, logging.Logger, logging.LoggerAdapter)  # fmt: skip

_PLAIN = (bool, int, float, complex, str, bytes, range, slice)


@dataclass
class Watched:
    """The places of one module's state in Python.

    Args:
        module: Looked at with all its parts.
        functions: Further ones that are called with it, such as its loss.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 2)
        >>> watched = Watched(net)
        >>> before = watched.snapshot()
        >>> net.steps = 1
        >>> moved(before, watched.snapshot())
        'attribute `steps` of the module'
    """

    module: nn.Module
    functions: tuple[Callable[..., Any], ...] = ()

    def snapshot(self) -> dict[str, object]:
        """Something for each place that differs where its content differs."""
        return {place: _print(value) for place, value, _ in self._places()}

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Put plain values back that calls move outside of the module, which copies share."""
        before = [
            (put, value)
            for _, value, put in self._places()
            if put is not None and (value is None or type(value) in (bool, int, float, str, tuple))
        ]
        try:
            yield
        finally:
            for put, value in before:
                put(value)

    def _places(self) -> Iterator[tuple[str, Any, Callable[[Any], None] | None]]:
        """Names of places, what is there, and for plain names outside of the module how to set."""
        classes: dict[type, None] = {}
        functions = dict.fromkeys(map(_plain, self.functions))
        for called in functions:
            if not isinstance(called, (types.FunctionType, type)) and not _is_torchs(called):
                yield f"an attribute of {type(called).__qualname__}", _attributes(called), None
                classes[type(called)] = None
        for path, part in self.module.named_modules():
            owner = f"part {path!r}" if path else "the module"
            for name, value in vars(part).items():
                if name not in _OWN:
                    yield f"attribute `{name}` of {owner}", value, None
            classes |= dict.fromkeys(c for c in type(part).__mro__ if _is_users(c))
            for hook in map(_plain, _hooks(part)):
                if not isinstance(hook, types.FunctionType):
                    yield f"an attribute of a hook of {owner}", _attributes(hook), None
                functions[hook] = None
        for class_ in classes:
            for name, value in vars(class_).items():
                if isinstance(found := getattr(value, "__func__", value), types.FunctionType):
                    functions[found] = None
                elif not name.startswith("__") and not callable(value):
                    where = f"class attribute `{name}` of {class_.__qualname__}"
                    yield where, value, _setter(class_, name)
        yield from _of_functions([f for f in functions if isinstance(f, types.FunctionType)])


def moved(before: Mapping[str, object], after: Mapping[str, object]) -> str | None:
    """The first place whose content differs, or None."""
    for place in {**before, **after}:
        if before.get(place, _NOTHING) != after.get(place, _NOTHING):
            return place
    return None


_NOTHING = object()


def _setter(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


def _hooks(part: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
        yield from getattr(part, name).values()


def _plain(function: Any) -> Any:
    """The function of Python's behind a method or a partial one."""
    while not isinstance(function, types.FunctionType):
        inner = getattr(function, "__func__", getattr(function, "func", None))
        if inner is None:
            return function
        function = inner
    return function


def _is_users(found: Any) -> bool:
    """Whether a class, function or module is neither Python's nor torch's."""
    name = found.__name__ if isinstance(found, types.ModuleType) else found.__module__
    package = str(name).partition(".")[0]
    return package not in _LIBRARIES and package not in sys.stdlib_module_names


#: Packages whose functions are taken to keep nothing, beside Python's own.
_LIBRARIES = frozenset({"torch", "numpy", "cgo", ""})


def _is_torchs(called: Any) -> bool:
    return not _is_users(type(called))


# --- functions ------------------------------------------------------------------------------------


def _of_functions(
    pending: list[types.FunctionType],
) -> Iterator[tuple[str, Any, Callable[[Any], None] | None]]:
    """What functions close over and which globals they read, those that they call included."""
    seen: set[int] = set()
    while pending and len(seen) < _FUNCTIONS:
        function = pending.pop(0)  # those nearest to the module first
        if id(function) in seen or not _is_users(function):
            continue
        seen.add(id(function))
        name = f"{function.__module__}.{function.__qualname__}"
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            pending += [value] if isinstance(value, types.FunctionType) else []
            yield f"variable `{variable}` around {name}", value, _setter(cell, "cell_contents")
        if kept := (function.__defaults__, function.__kwdefaults__, vars(function)):
            yield f"defaults or attributes of {name}", kept, None
        names = _names(function.__code__)
        for owner in _modules(function, names):
            for variable in names & vars(owner).keys():
                value = vars(owner)[variable]
                pending += [value] if isinstance(value, types.FunctionType) else []
                place = f"global `{variable}` of {owner.__name__}"
                yield place, value, _item_setter(vars(owner), variable)


def _modules(function: types.FunctionType, names: set[str]) -> list[types.ModuleType]:
    """The function's own module, and users' modules that it names."""
    own = sys.modules.get(function.__module__)
    found = [] if own is None or vars(own) is not function.__globals__ else [own]
    named = (function.__globals__.get(name) for name in sorted(names))
    return found + [m for m in named if isinstance(m, types.ModuleType) and _is_users(m)]


def _item_setter(owner: dict[str, Any], name: str) -> Callable[[Any], None]:
    return lambda value: owner.__setitem__(name, value)


def _names(code: types.CodeType) -> set[str]:
    """Names that code, and the code within it, may look up."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


# --- values ---------------------------------------------------------------------------------------


def _print(value: Any, depth: int = 0, seen: frozenset[int] = frozenset()) -> object:
    """Something that is equal for equal content, as far as it is looked into."""
    if value is None or isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    if isinstance(value, types.FunctionType):
        return "function", _print(vars(value), depth + 1, seen)
    if isinstance(value, Tensor):
        return "fixed" if isinstance(value, nn.Parameter) else _print_tensor(value)
    if isinstance(value, _FIXED):
        return "fixed"
    if isinstance(value, np.ndarray):
        return "array", hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if depth == _DEPTH or id(value) in seen:
        return type(value).__name__
    return _print_inside(value, depth + 1, seen | {id(value)})


def _print_tensor(value: Tensor) -> object:
    kind = "tensor", str(value.dtype), tuple(value.shape)
    plain = value.numel() == 1 and not value.requires_grad and value.device.type == "cpu"
    return (*kind, repr(value.tolist())) if plain else kind


def _print_inside(value: Any, depth: int, seen: frozenset[int]) -> object:
    def each(items: Any) -> tuple[object, ...]:
        return tuple(_print(item, depth, seen) for item, _ in zip(items, range(_ITEMS)))

    name = type(value).__name__
    if (state := _stream_state(value)) is not None:
        return name, hashlib.sha256(repr(state).encode()).hexdigest()
    if isinstance(value, Mapping):
        return name, len(value), each(value), each(value.values())
    if isinstance(value, (list, tuple, deque)):
        return name, len(value), each(value)
    if isinstance(value, (set, frozenset)):
        return name, frozenset(each(value))
    if vars_ := _attributes(value):
        return name, each(vars_), each(vars_.values())
    try:
        with contained:
            return name, _ADDRESS.sub("", repr(value))[:200]
    except Exception as error:
        return name, type(error).__name__


def _stream_state(value: Any) -> object:
    """Where a random generator's stream is; None of anything else."""
    match value:
        case random.Random():
            return value.getstate()
        case np.random.Generator():
            return value.bit_generator.state
        case np.random.RandomState():
            return value.get_state()
        case torch.Generator():
            return value.get_state().tolist()
    return None


def _attributes(value: Any) -> dict[str, Any]:
    slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ()) or ()]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return found | getattr(value, "__dict__", {})
