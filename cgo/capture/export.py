"""Exporting a step with torch, quietly; and why that failed, with the line of the user's code."""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
import logging
import os
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import cgo
import cgo.passes
import cgo.runtime
from cgo.capture.stand_ins import stand_ins
from cgo.model import TrainingSpec
from cgo.runtime.data import Leaves, preserved_random_state
from cgo.runtime.step import Step, eval_mode
from cgo.user_code import told

log = logging.getLogger(__name__)


def export(module: nn.Module, training: TrainingSpec, name: str, leaves: Leaves) -> ExportedProgram:
    """Export one program of a module, which stays as it is.

    Raises:
        Exception: whatever the module, or torch, raises while it is traced; see `reason_of`.
    """
    evaluation = name.startswith("validation")
    probe = copy.deepcopy(module)
    step = Written(probe, training, tuple(leaves))
    with preserved_random_state(), stand_ins(probe):
        if evaluation:
            with torch.no_grad(), eval_mode(step):
                return torch.export.export(step, tuple(leaves.values()), strict=False)
        return torch.export.export(step, tuple(leaves.values()), strict=False)


class Written(Step):
    """A step that writes buffers which its module binds anew into those that were there before."""

    def forward(self, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        before = [
            (part, name, buffer)
            for part in self.module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        found = super().forward(*leaves)
        for part, name, buffer in before:
            bound = part._buffers.get(name)
            if bound is not None and bound is not buffer:
                with torch.no_grad():
                    buffer.copy_(bound)
                part._buffers[name] = buffer
        return found


class _ToDebug(logging.Filter):
    """Lets nothing pass, and notes it in the debug log."""

    def filter(self, record: logging.LogRecord) -> bool:
        log.debug("torch: %s", record.getMessage(), exc_info=record.exc_info)
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch says about a module that it cannot export or convert off the terminal.

    The reason is in the exception, and so in the model's report; the rest goes to the debug log.
    """
    names = [n for n in logging.root.manager.loggerDict if n == "torch" or n.startswith("torch.")]
    silent, printed = _ToDebug(), io.StringIO()
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(silent)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(silent)
        if printed.getvalue():
            log.debug("torch.export printed:\n%s", printed.getvalue())


# --- reasons --------------------------------------------------------------------------------------

#: What torch says where a value, or a shape that depends on values, is asked for; the operator.
_READS_DATA = (
    ("DynamicOutputShape", "a shape that depends on values", None),
    ("DataDependent", "a value that depends on data", "aten._local_scalar_dense"),
    ("GuardOnData", "a value that depends on data", "aten._local_scalar_dense"),
)

_OPERATOR = re.compile(r"aten\.\w+(\.\w+)?")

#: Folders of torch, and of this package, which is mapped from several places.
_NOT_USERS = tuple(
    os.path.join(os.path.realpath(folder), "")
    for package in (torch, cgo, cgo.passes, cgo.runtime)
    for folder in package.__path__
)

_LIBRARY = os.path.join(os.path.realpath(sysconfig.get_path("stdlib")), "")


def reason_of(error: Exception) -> str:
    """Why a module was not captured, in a line: the error, and where in the user's code."""
    lines = [line.strip() for line in told(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
    for sign, what, usual in _READS_DATA:
        if sign in type(error).__name__:
            named = _OPERATOR.search(text)
            text = f"forward looks at {what} ({named.group() if named else usual})"
            break
    return text + at_line(source_of(error))


def source_of(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame that is neither torch's nor ours."""
    found: tuple[str, int] | None = None
    pending: BaseException | None = error
    while pending is not None and found is None:
        for frame, line in traceback.walk_tb(pending.__traceback__):
            file = frame.f_code.co_filename
            if is_users(file):
                found = file, line
        pending = pending.__cause__ or pending.__context__
    return found


def is_users(file: str) -> bool:
    """Whether a file is neither torch's, nor ours, nor of Python's own library."""
    path = os.path.realpath(file)
    if file.startswith("<") or path.startswith(_NOT_USERS):
        return False
    return not path.startswith(_LIBRARY) or "site-packages" in path


def at_line(source: tuple[str, int] | None) -> str:
    """A place as the end of a sentence; nothing where none is known."""
    if source is None:
        return ""
    file, line = source
    code = linecache.getline(file, line).strip()
    return f", at {Path(file).name}:{line}" + f": {code[:120]}" * bool(code)
