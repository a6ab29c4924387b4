"""Resolving `package.module:name` import paths, and finding where user code lives."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import site
import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from cgo.allowed import check_found, check_module
from cgo.errors import ImportPathError
from cgo.user_code import contained, told

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def search_first(roots: Iterable[str]) -> None:
    """Find modules in these folders before all others; those that are searched already stay."""
    sys.path[:0] = [root for root in roots if root and root not in sys.path]


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `package.module:name`."""
    return bool(IMPORT_PATH.fullmatch(text))


def resolve(path: str, *, field: str = "import path") -> Any:
    """Import and return what `package.module:name` names.

    Args:
        path: The import path; `name` may be dotted (a class attribute).
        field: What the path was given for; named in errors.

    A name of the script that runs stands for that script: it is not imported a second time.

    Raises:
        ImportPathError: bad form, `__main__`, a script without a guard, module not importable or
            not allowed (see `cgo.allowed`), or no such name.
    """
    if not is_import_path(path):
        raise ImportPathError(f"{field}: {path!r} is not of the form 'package.module:name'")
    module_name, _, attribute = path.partition(":")
    if module_name == "__main__":
        raise ImportPathError(
            f"{field}: {path!r} lives in the script being run, which a trial cannot import; "
            "move it to a module of its own and name that"
        )
    check_module(path, field)
    names = attribute.split(".")
    try:
        with contained:
            found: Any = _module(module_name, names[0])
            for name in names:
                found = getattr(found, name, _MISSING)
                check_found(path, found, field)
    except ImportPathError:
        raise
    except Exception as error:
        raise ImportPathError(
            f"{field}: cannot import {module_name!r} of {path!r}: {told(error)}"
        ) from error
    if found is _MISSING:
        raise ImportPathError(f"{field}: module {module_name!r} has no {attribute!r}")
    if _is_running(module_name) and not _has_guard(_running_file()):
        raise ImportPathError(
            f"{field}: {path!r} lives in the script being run, {_running_file()}, which would run "
            "again when a trial imports it; put what runs the search under `if __name__ == "
            f'"__main__":`, or move {attribute!r} to a module of its own and name that'
        )
    return found


_MISSING = object()


def _module(name: str, attribute: str) -> Any:
    """The module, without waiting for an import of it that has come as far as the attribute.

    Another thread may be importing it: one that waits for a search that the module itself runs.
    """
    module = loaded(name)
    if module is None or not (hasattr(module, attribute) or _is_running(name)):
        return importlib.import_module(name)
    return module


def loaded(name: str) -> ModuleType | None:
    """The module that has a name, if it is there already: also the script that runs, by its own."""
    return sys.modules["__main__"] if _is_running(name) else sys.modules.get(name)


def _running_file() -> str | None:
    """The file of the script that runs; None in notebooks and of `python -c`."""
    return getattr(sys.modules.get("__main__"), "__file__", None)


def _is_running(name: str) -> bool:
    """Whether a module's name means the script that runs."""
    file = _running_file()
    if file is None:
        return False
    if getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) == name:
        return True  # python -m
    try:
        with contained:
            module = sys.modules.get(name)
            spec = None if module is not None else importlib.util.find_spec(name)
            found = getattr(module, "__file__", None) if spec is None else spec.origin
            return found is not None and os.path.samefile(found, file)
    except Exception:  # there is no such module, or no such file: importing it will say so
        return False


@functools.cache
def _has_guard(file: str | None) -> bool:
    """Whether a script does anything depending on its name's being `__main__`, outside functions.

    One that cannot be read as Python is taken to.
    """
    try:
        with tokenize.open(str(file)) as stream:
            pending: list[ast.AST] = [ast.parse(stream.read())]
    except (OSError, SyntaxError, ValueError):
        return True
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Compare):
            parts = list(ast.walk(node))
            named = any(isinstance(part, ast.Name) and part.id == "__name__" for part in parts)
            if named and any(getattr(part, "value", None) == "__main__" for part in parts):
                return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return False


def _spec_of(name: str) -> Any:
    """Where a module comes from; None where nothing says so, as of one made by a program."""
    module = sys.modules.get(name)
    try:
        return getattr(module, "__spec__", None) or importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def import_roots(paths: Iterable[str]) -> tuple[str, ...]:
    """Folders that must be on a trial's `sys.path` so that it finds the named user modules.

    Installed packages and the standard library need none and are left out.
    """
    tops = (path.partition(":")[0].partition(".")[0] for path in paths)
    return tuple(dict.fromkeys(root for top in tops for root in _roots_of(top)))


def _roots_of(top: str) -> list[str]:
    """The folders of a module or package that is not installed."""
    spec = _spec_of(top)
    if spec is None:
        return []
    places = list(spec.submodule_search_locations or ()) or [spec.origin]
    found = [str(Path(p).resolve().parent) for p in places if p and Path(p).exists()]
    return [root for root in found if root not in _installed()]


@functools.cache
def _installed() -> frozenset[str]:
    """Where installed packages and the standard library lie."""
    paths = (sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib"))
    return frozenset(str(Path(p).resolve()) for p in (*site.getsitepackages(), *paths))


def libraries_of(modules: Iterable[str]) -> tuple[str, ...]:
    """What modules of users import of installed packages, as far as they hold names of it.

    Args:
        modules: Names of modules, or of something within one. Those that are not imported yet, or
            are no users', hold nothing.

    Returns:
        Names of modules, in order; those of Python's own and of torch's are not among them.
    """
    pending, seen = [_imported(name) for name in sorted(modules)], set[str]()
    found: set[str] = set()
    while pending:
        name = pending.pop()
        top = name.partition(".")[0]
        if name in seen or not top or top in _EVERYWHERE or top in sys.stdlib_module_names:
            continue
        seen.add(name)
        if not _roots_of(top):
            found.add(name)
            continue
        values = list(vars(sys.modules[name]).values())
        names = (v.__name__ if isinstance(v, ModuleType) else _module_of(v) for v in values)
        pending += dict.fromkeys(map(_imported, names))
    return tuple(sorted(found))


#: What each trial imports anyway.
_EVERYWHERE = frozenset({"torch", "numpy", "cgo"})


def _imported(name: str) -> str:
    """The module that a name is of, or is itself; nothing if that is not imported."""
    while name and name not in sys.modules:
        name = name.rpartition(".")[0]
    return name


def _module_of(value: Any) -> str:
    """The module that a function or class is defined in, or the class of another object."""
    defined = value if issubclass(type(value), (type, FunctionType)) else type(value)
    name = defined.__module__
    return name if isinstance(name, str) else ""
