"""Texts of unknown origin, made fit for a terminal and for one line of an error."""

from __future__ import annotations

import re

#: What moves the cursor, changes colours or hides text: controls, bidirectional marks, separators
#: of lines, halves of characters, private and unassigned ones are left to the terminal.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(text: str, most: int | None = None) -> str:
    """A text in which everything that a terminal would obey is spelled out.

    Line feeds and tabs stay.

    Args:
        text: Of unknown origin.
        most: Characters that are kept of it; None: all.

    Example:
        >>> printable("\\x1b[31mred\\r\\n")
        '\\\\x1b[31mred\\\\x0d\\n'
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]} ..."
    return _HIDDEN.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
