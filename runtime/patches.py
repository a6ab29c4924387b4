"""Whether somebody has put something else in the place of what modules and classes hold.

A trial's code may replace functions of torch's, for instance, and the next trial must not meet
them. What modules and classes hold is therefore noted by identity, and compared later. It is only
told: nobody knows how to undo what was done on purpose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter, is_
from types import FunctionType, ModuleType
from typing import Any

#: What is looked at: packages that training runs through, and Python's own modules. `sys` is seen
#: to in `cgo.runtime.settings`.
_PACKAGES = frozenset({"torch", "cgo", "numpy", "torchmetrics", "safetensors"})
_PYTHONS = frozenset(sys.stdlib_module_names) - {"sys", "__main__", "__mp_main__"}

#: Whose classes are looked into.
_CLASSES = _PACKAGES | {"random", "collections", "threading", "contextlib", "functools"}

#: What Python writes by itself: notes of warnings shown, and of what was pickled.
_OWN = frozenset({"__warningregistry__", "__slotnames__", "_abc_impl"})


class Contents:
    """What modules hold at one moment, what their classes hold, and what functions are made of.

    Args:
        modules: Those looked at, by name.
    """

    def __init__(self, modules: Mapping[str, ModuleType]) -> None:
        self._modules = {
            name: module
            for name, module in modules.items()
            if isinstance(module, ModuleType) and _top(name) in _PACKAGES | _PYTHONS
        }
        self._held = {name: dict(vars(module)) for name, module in self._modules.items()}
        self._classes = {cls: dict(vars(cls)) for cls in _classes_of(self._held)}
        self._functions = list(dict.fromkeys(_functions_of(self._held, self._classes)))
        self._parts = {part: list(map(part, self._functions)) for part in _PARTS}

    def changed(self) -> Iterator[str]:
        """Names of what is another by now."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is not module:
                yield name
            for key in _differences(self._held[name], vars(module)):
                yield f"{name}.{key}"
        for cls, held in self._classes.items():
            for key in _differences(held, vars(cls)):
                yield f"{cls.__module__}.{cls.__qualname__}.{key}"
        for function in dict.fromkeys(self._changed_functions()):
            yield f"{function.__module__}.{function.__qualname__}"

    def _changed_functions(self) -> Iterator[FunctionType]:
        for part, before in self._parts.items():
            now = list(map(part, self._functions))
            if not all(map(is_, before, now)):  # tens of thousands: looked through only if so
                rows = zip(self._functions, before, now)
                yield from (function for function, old, new in rows if old is not new)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _differences(held: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    if len(held) == len(now) and all(map(is_, held.values(), now.values())):
        return ()
    return [
        key
        for key in {**held, **now}
        if key not in _OWN and not _is_harmless(held.get(key, _NONE), now.get(key, _NONE))
    ]


_NONE = object()


def _is_harmless(before: Any, after: Any) -> bool:
    """Whether nothing happened; or a submodule was imported, a counter went on, a text was made."""
    if before is after or (before is _NONE and isinstance(after, ModuleType)):
        return True
    if type(before) is not type(after):
        return False
    return (type(before) is int and after > before) or (type(before) in _PLAIN and before == after)


_PLAIN = (str, bytes, tuple, frozenset)


def _classes_of(held: Mapping[str, Mapping[str, Any]]) -> Iterator[type]:
    seen: set[type] = set()
    for values in held.values():
        for value in values.values():
            if issubclass(type(value), type) and value not in seen:
                seen.add(value)
                if _top(str(getattr(value, "__module__", ""))) in _CLASSES:
                    yield value


def _functions_of(
    held: Mapping[str, Mapping[str, Any]], classes: Mapping[type, Mapping[str, Any]]
) -> Iterator[FunctionType]:
    for values in (*held.values(), *classes.values()):
        yield from (value for value in values.values() if type(value) is FunctionType)


#: What functions are made of.
_PARTS = tuple(map(attrgetter, ("__code__", "__defaults__", "__kwdefaults__")))
