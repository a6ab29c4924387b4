"""How a trial's process ended, and the end of its log."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cgo.paths import open_plain
from cgo.text import printable

#: Lines of a trial's log in its error, and characters of a line.
LAST_LINES, _WIDEST = 30, 300

#: Of a log, what is looked at for its last lines.
_TAIL_BYTES = 2**16


def how_ended(code: int) -> str:
    """An exit code in words; negative, it is the number of the signal that killed the process."""
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"signal {known.get(-code, -code)}"
    return f"exit code {code}" if code else "exit code 0, before its models had ended"


def last_lines(path: Path, count: int, start: int = 0) -> str:
    """The end of a log, in lines of bounded length, fit for a terminal; nothing where it is none.

    Args:
        path: The log.
        count: The most lines.
        start: The byte from which it counts.
    """
    try:
        with open_plain(path) as stream:  # of a log of any size
            stream.seek(max(start, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = stream.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    lines = text.splitlines()[-count:]
    cut = [f"{line[:_WIDEST]} ..." if len(line) > _WIDEST else line for line in lines]
    return printable("\n".join(cut))
