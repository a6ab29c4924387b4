"""What NNI's texts name: spaces and data sets as `nni.dump` writes them."""

from __future__ import annotations

import json
from typing import Any

from cgo.allowed import allowed_modules, is_allowed, refusal
from cgo.errors import ImportPathError
from cgo.imports import resolve

#: Keys under which NNI finds a class or function by name, and one under which it unpickles.
_NAMES = ("__symbol__", "__nni_type__", "__instance_type__")
_PICKLE = "__nni_obj__"


def check_text(text: str, field: str) -> None:
    """Check what loading a text would import, where that is limited (`cgo.allowed`).

    NNI's own modules have to be allowed like any other. Pickles, and graphs that NNI turns into
    source code, cannot be looked into: under a limit they are refused.

    Raises:
        ImportPathError: it names something that may not be imported, or cannot be looked into.
    """
    allowed = allowed_modules()
    if allowed is None:
        return
    if not isinstance(text, str):
        raise ImportPathError(f"{field}: expected a text of nni.dump's, got {type(text).__name__}")

    found: list[tuple[str, Any]] = []  # all pairs, also those that a later one of the key hides
    try:
        json.loads(text, object_pairs_hook=found.extend)
    except (ValueError, RecursionError) as error:
        raise ImportPathError(f"{field}: not a text of nni.dump's: {error}") from error
    for key, value in found:
        if key in _NAMES:
            _check_name(value, allowed, field)
        elif key in (_PICKLE, "framework"):
            raise ImportPathError(
                f"{field}: {key!r} in an NNI text holds code, which allowed_modules cannot limit; "
                "wrap classes in nni.trace in a module that can be imported"
            )


def _check_name(name: Any, allowed: tuple[str, ...], field: str) -> None:
    if not isinstance(name, str) or name.startswith("bytes:"):
        raise ImportPathError(
            f"{field}: a pickled class or function in an NNI text, which allowed_modules cannot "
            "limit; define it in a module that can be imported"
        )
    path = name.removeprefix("path:")
    module, _, own = path.rpartition(".")
    if not is_allowed(module, allowed):
        raise ImportPathError(f"{field}: {refusal(path, module, allowed)}")
    resolve(f"{module}:{own}", field=field)  # what it is must be of an allowed module, too
