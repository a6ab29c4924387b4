"""Model ids: one rule for all who make or read them, and a file name for any of them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from cgo.errors import SpecError

#: An id: plain to print, to quote in a shell and to put between the slashes of a node's name.
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

#: Names that are the same file for themselves alone, on any file system.
_PLAIN = re.compile(r"[a-z0-9](?:[a-z0-9_.-]{0,98}[a-z0-9_-])?")

#: What Windows takes for a device, whatever follows after a dot.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|clock\$|conin\$|conout\$|(?:com|lpt)[0-9])(?:\..*)?")

#: Readable characters of an id that are kept in a derived name.
_KEPT = 40


def is_model_id(value: Any) -> bool:
    """Whether a value is a model id.

    Example:
        >>> is_model_id("cnn-3.1"), is_model_id("../x"), is_model_id("a\\n")
        (True, False, False)
    """
    return isinstance(value, str) and MODEL_ID.fullmatch(value) is not None


def checked_id(value: Any, what: str = "model_id") -> str:
    """The id itself.

    Args:
        value: What is to be an id.
        what: What it was given for; named in the error.

    Raises:
        SpecError: it is none.
    """
    if not is_model_id(value):
        shown = value if not isinstance(value, str) or len(value) <= 120 else value[:120] + "..."
        raise SpecError(
            f"{what}: {shown!a} must be 1 to 100 letters, digits, '_', '.' or '-', the first of "
            "them a letter or digit"
        )
    assert isinstance(value, str)
    return value


def file_name(id_: str) -> str:
    """A file name for an id, without suffix: safe for any text, and another for every other id.

    An id stays as it is where no file system could take it for another one or for something else:
    lower case, no dot at its end, no name of a device (`con`, `lpt1.x`). Any other keeps what is
    readable of it, and a hash of all of it tells it apart (so `A` from `a` where case does not
    count). The result has at most 100 characters; anything that has no dot may be added behind one.

    Example:
        >>> file_name("cnn-3"), file_name("CON")
        ('cnn-3', 'con~a3dbc4b644a9a2c51e74509ded5c46cc')
    """
    if _PLAIN.fullmatch(id_) and not _DEVICE.fullmatch(id_):
        return id_
    digest = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = re.sub(r"[^a-z0-9_-]+", "_", id_[: 2 * _KEPT].lower()).strip("_-")[:_KEPT]
    return f"{kept or 'model'}~{digest}"
