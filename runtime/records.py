"""A record of lowering choices, looked at before it is obeyed: it may come from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cgo.errors import TrialError
from cgo.paths import read_plain
from cgo.tuning import CHANNELS, LANES, STACKED

_MOST_BYTES = 2**26


def check_record(path: Path) -> None:
    """Check that a file is a trial's `lowering.json`.

    Raises:
        TrialError: it is no plain file, too large, or of another form.
    """
    try:
        document = json.loads(read_plain(path, _MOST_BYTES))
        if not _is_record(document):
            raise ValueError("it has another form")
    except (OSError, ValueError, RecursionError) as error:
        raise TrialError(
            f"{path} is no record of lowering choices: {type(error).__name__}: {error}; give a "
            "trial's lowering.json, or none"
        ) from error


def _is_record(document: Any) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("device"), str):
        return False
    choices = document.get("choices")
    flags = [document.get("compiled", {}), document.get("images_last", {})]
    if not all(isinstance(found, dict) for found in (choices, *flags)):
        return False
    if not all(value is None or type(value) is bool for found in flags for value in found.values()):
        return False
    assert isinstance(choices, dict)
    return all(
        isinstance(groups, dict) and all(map(_is_option, groups.values()))
        for groups in choices.values()
    )


def _is_option(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4:
        return False
    form, layout, width, seconds = row
    known = isinstance(form, str) and layout in (LANES, STACKED, CHANNELS)
    return known and type(width) is int and width >= 1 and type(seconds) in (int, float)
