"""Which modules documents may name: a setting of the process, written into no document.

A document names code: factories, data sources, losses and the like are imported and called. What a
process may import for a document is limited by its environment, or its command line; without a
limit it is whatever the document names.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from cgo.errors import ImportPathError, SpecError

#: The environment variable of a trial: modules with commas between them. Unset: no limit.
ALLOWED_MODULES = "CGO_ALLOWED_MODULES"

#: Whose names stay usable under any limit. They build data sets, modules, optimizers and losses;
#: the rest of these packages can do more, such as end processes, run files or change all modules.
OWN = frozenset(
    {"cgo.zoo", "cgo.bench.networks", "cgo.nni.data", "cgo.nni.spaces", "torch.nn",
     "torch.nn.functional", "torch.optim", "torch.optim.lr_scheduler"}
)  # fmt: skip

#: Where torch defines the classes that `torch.nn` and `torch.optim` hold.
_CLASSES = ("torch.nn.modules.", "torch.optim.")

_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.ASCII)


def checked_modules(modules: Iterable[str] | None) -> tuple[str, ...] | None:
    """An engine's setting, checked.

    Raises:
        SpecError: something in it is no name of a module.
    """
    if modules is None:
        return None
    if isinstance(modules, str):
        raise SpecError(f"allowed_modules: {modules!r} is one text; give a tuple of names")
    found = tuple(modules)
    for name in found:
        if not isinstance(name, str) or not _MODULE.fullmatch(name):
            raise SpecError(f"allowed_modules: {name!r} is no name of a module, such as 'my.nets'")
    return found


def as_text(modules: Iterable[str]) -> str:
    """The value of the environment variable."""
    return ",".join(modules)


def allowed_modules(environment: Mapping[str, str] = os.environ) -> tuple[str, ...] | None:
    """What this process may import for documents; None where nothing limits it.

    Raises:
        SpecError: the environment variable holds something else than names of modules.
    """
    text = environment.get(ALLOWED_MODULES)
    if text is None:
        return None
    return checked_modules(name.strip() for name in text.split(",") if name.strip())


def is_allowed(module: str, allowed: Iterable[str] | None) -> bool:
    """Whether a module, or a package that it is in, is among the allowed ones."""
    if allowed is None or module in OWN:
        return True
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def check_module(path: str, field: str) -> None:
    """Check the module of `package.module:name` before it is imported.

    Raises:
        ImportPathError: this process may not import it for a document.
    """
    allowed = allowed_modules()
    module = path.partition(":")[0]
    if not is_allowed(module, allowed):
        raise ImportPathError(f"{field}: {refusal(path, module, allowed)}")


def check_found(path: str, found: Any, field: str) -> None:
    """Check what a path leads to, part by part: an allowed module may hold names of others.

    Raises:
        ImportPathError: it is a module, or a function or class of a module, that is not allowed.
    """
    allowed = allowed_modules()
    if allowed is None:
        return
    if isinstance(found, ModuleType):
        home: Any = found.__name__
    elif inspect.isroutine(found) or inspect.isclass(found):
        home = getattr(found, "__module__", None)
        if _is_torchs(path, found, str(home)):
            return
    else:
        return
    if not isinstance(home, str) or not is_allowed(home, allowed):
        raise ImportPathError(f"{field}: {refusal(path, str(home), allowed)}")


def _is_torchs(path: str, found: Any, home: str) -> bool:
    """A class of torch's that builds a module or an optimizer, or a function written in C++."""
    if inspect.isclass(found):
        return home.startswith(_CLASSES)
    module, _, name = path.partition(":")
    return (home == "None" or home.startswith("torch._C")) and "." not in name and module in OWN


def refusal(path: str, module: str, allowed: Iterable[str] | None) -> str:
    """Why a name is refused, and the way out."""
    names = ", ".join(allowed or ()) or "none but cgo's and torch's own"
    return (
        f"{path!a:.200} is of module {module!a:.100}, which this process may not import for a "
        f"document (allowed: {names}); name it in CGOEngine(allowed_modules=...), or in "
        f"{ALLOWED_MODULES}, if you trust it"
    )
