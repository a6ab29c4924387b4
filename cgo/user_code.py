"""Calling user code: whatever it raises ends its model, never the process of all models.

Factories, forwards, losses, data sets, metrics, optimizers and listeners may raise anything.
`SystemExit`, `KeyboardInterrupt` and their like pass by `except Exception` and would take every
other model with them; so calls of user code stand in `contained`, inside the `try` that gives the
error its name::

    try:
        with contained:
            module = factory(**kwargs)
    except Exception as error:
        raise ModelError(f"factory {target} raised {told(error)}") from error
"""

from __future__ import annotations

import signal
import threading
import traceback
from types import FrameType, TracebackType
from typing import Literal

from cgo.errors import UserExitError


class Terminated(BaseException):
    """A signal asked this process to end; `contained` lets it pass, and nothing may catch it.

    Args:
        code: The exit code: 128 and the signal's number.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


#: Whether signals raise `Terminated` here, so that a KeyboardInterrupt is none of the terminal's.
_signals_terminate = False


def terminate_on_signals() -> None:
    """In a trial: let SIGTERM and SIGINT raise `Terminated`, wherever the main thread is."""
    global _signals_terminate
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    _signals_terminate = True


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(128 + signum)


class _Contained:
    """See `contained`."""

    __slots__ = ()

    def __enter__(self) -> None:
        """Nothing to prepare: one object serves all threads, however nested."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        if error is not None and _leaves(error):
            raise UserExitError(told(error)) from error
        return False


#: Around a call of user code: what would leave the process, or be taken for the end of an
#: iteration, is raised as `UserExitError` instead, an `Exception`; everything else as it is.
#: Never around a `yield`, which a closed generator leaves by GeneratorExit.
contained = _Contained()


def _leaves(error: BaseException) -> bool:
    if isinstance(error, Terminated):
        return False
    if isinstance(error, KeyboardInterrupt):
        return _signals_terminate or threading.current_thread() is not threading.main_thread()
    ends = isinstance(error, (StopIteration, StopAsyncIteration))
    return ends or not isinstance(error, Exception)


def told(error: BaseException) -> str:
    """An error as text, `Type: message`; also one whose own text cannot be made.

    Example:
        >>> told(KeyError("lr"))
        "KeyError: 'lr'"
    """
    if isinstance(error, UserExitError):
        return str(error)
    name = type(error).__name__
    try:
        with contained:
            text = str(error)
    except Exception:  # the one at hand matters more
        return f"{name}, whose message cannot be printed"
    return f"{name}: {text}" if text else name


def where(error: BaseException) -> str:
    """The line of Python that raised an error, as `file:line in function`."""
    if isinstance(error, UserExitError) and error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "raised nowhere"
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
