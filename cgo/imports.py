"""Resolving `package.module:name` import paths, and finding where user code lives."""

from __future__ import annotations

import importlib
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cgo.allowed import check_found, check_module
from cgo.errors import ImportPathError

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `package.module:name`."""
    return bool(IMPORT_PATH.fullmatch(text))


def resolve(path: str, *, field: str = "import path") -> Any:
    """Import and return what `package.module:name` names.

    Args:
        path: The import path; `name` may be dotted (a class attribute).
        field: What the path was given for; named in errors.

    Raises:
        ImportPathError: bad form, `__main__`, module not importable or not allowed (see
            `cgo.allowed`), or no such name.
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
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ImportPathError(
            f"{field}: cannot import {module_name!r} of {path!r}: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportPathError(f"{field}: module {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
        check_found(path, found, field)
    return found


def import_roots(paths: Iterable[str]) -> tuple[str, ...]:
    """Folders that must be on a trial's `sys.path` so that it finds the named user modules.

    Installed packages and the standard library need none and are left out.
    """
    installed = {
        str(Path(folder).resolve())
        for folder in (
            *site.getsitepackages(),
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
            sysconfig.get_path("stdlib"),
        )
    }
    roots: dict[str, None] = {}
    for path in paths:
        top = path.partition(":")[0].partition(".")[0]
        module = sys.modules.get(top)
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(top)
        if spec is None:
            continue
        places = list(spec.submodule_search_locations or ()) or [spec.origin]
        for place in places:
            if place and Path(place).exists():
                root = str(Path(place).resolve().parent)
                if root not in installed:
                    roots.setdefault(root)
    return tuple(roots)
