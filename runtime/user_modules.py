"""Modules of users, which a trial imports and the next one is to import anew.

A file may be edited between two trials, and a module's globals may have been written. So all that
comes from outside of Python's and its packages' folders is taken out of `sys.modules`; whether
something still holds it (a hook, a registry, a cache, a thread) is seen by a mark in its globals,
which ends with them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import linecache
import site
import sys
import sysconfig
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

_MARK = "__cgo_mark__"

#: Modules that libraries make when they are imported: of no file, or of one in a temporary folder.
#: Torch's compiler, which any of its optimizers imports at its first step, brings in both.
_MADE = frozenset({"cython_runtime", "_remote_module_non_scriptable"})


class _Mark:
    """Is there as long as the globals that it stands in."""

    __slots__ = ("__weakref__",)


class UserModules:
    """Takes out what was imported after this was made.

    Args:
        own: Packages that stay wherever they lie.
    """

    def __init__(self, own: Collection[str] = ("cgo",)) -> None:
        self._known = frozenset(sys.modules)
        self._own = frozenset(own)
        self._folders = tuple(_installed())
        self._marks: dict[str, weakref.ref[_Mark]] = {}

    def take_out(self) -> list[str]:
        """Forget users' modules; returns names of those that cannot be imported a second time."""
        compiled = []
        for name, module in self._found():
            if not _is_python(module):
                compiled.append(name)
            mark = _Mark()
            vars(module)[_MARK] = mark
            self._marks[name] = weakref.ref(mark)
            _unbind(name)
            del sys.modules[name]
        importlib.invalidate_caches()
        linecache.checkcache()
        return compiled

    def held(self) -> list[str]:
        """Names of modules taken out of which something is still there; after a collection."""
        return [name for name, mark in self._marks.items() if mark() is not None]

    def _found(self) -> Iterator[tuple[str, ModuleType]]:
        for name in [name for name in sys.modules if name not in self._known]:
            module = sys.modules[name]
            if isinstance(module, ModuleType) and self._is_users(name, module):
                yield name, module

    def _is_users(self, name: str, module: ModuleType) -> bool:
        top = name.partition(".")[0]
        if top in _MADE:
            return False
        if top in self._own or top.startswith(_SHARED):
            return False
        file = getattr(module, "__file__", None)
        places = [file] if isinstance(file, str) else _folders_of(module)
        if not places:  # made by a program: it belongs where its package does
            return top == name or self._is_users(top, sys.modules.get(top, module))
        return not all(map(self._is_installed, places))

    def _is_installed(self, place: str) -> bool:
        path = Path(place).resolve()
        return str(path).startswith(self._folders) or not _PACKAGES.isdisjoint(path.parts)


def _folders_of(module: ModuleType) -> list[str]:
    if getattr(getattr(module, "__spec__", None), "origin", None) in ("built-in", "frozen"):
        return [sysconfig.get_path("stdlib")]
    try:
        return [str(place) for place in getattr(module, "__path__", ())]
    except Exception:  # of something that only looks like a module
        return []


def _is_python(module: ModuleType) -> bool:
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return not isinstance(loader, importlib.machinery.ExtensionFileLoader)


def _unbind(name: str) -> None:
    """Take a module out of its package, which may stay."""
    package, _, own = name.rpartition(".")
    if package in sys.modules:
        vars(sys.modules[package]).pop(own, None)


def _installed() -> Iterator[str]:
    """Where Python and its packages lie."""
    found = [*site.getsitepackages(), *(sysconfig.get_path(key) for key in _PATHS)]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    for folder in found:
        yield f"{Path(folder).resolve()}/"


#: Folders of packages, wherever a file of paths makes Python look for them.
_PACKAGES = frozenset({"site-packages", "dist-packages"})

#: Without a file: what modules that Cython has compiled share.
_SHARED = "_cython_"

_PATHS = ("purelib", "platlib", "stdlib", "platstdlib")
