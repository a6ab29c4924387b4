"""The settings of a process that a trial may change, and that the next one is to find unchanged.

Each is read before a process has run any trial, and again after each trial. What differs then is
written back where that undoes it for certain; of the rest it is only told that it differs.
"""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Reads a setting as a value that can be compared.
Read = Callable[[], Any]

#: Writes what was read.
Write = Callable[[Any], object]


@dataclass(frozen=True)
class Setting:
    """One setting, by the name under which it is told of; without `write` it cannot be undone."""

    name: str
    read: Read
    write: Write | None = None


class Settings:
    """How settings were at one moment.

    Args:
        settings: In the order in which they are put back.
    """

    def __init__(self, settings: tuple[Setting, ...]) -> None:
        self._values = [(setting, setting.read()) for setting in settings]

    def put_back(self) -> list[str]:
        """Write back what differs; returns the names of what still does."""
        left = []
        for setting, value in self._values:
            if setting.write is not None and not _is(setting, value):
                with suppress(Exception):  # it is looked at again
                    setting.write(value)
            if not _is(setting, value):
                left.append(setting.name)
        return left


def _is(setting: Setting, value: Any) -> bool:
    try:
        return bool(setting.read() == value)
    except Exception:  # what was changed cannot even be read
        return False


def python_settings() -> tuple[Setting, ...]:
    """Those of Python, of its standard library, of NumPy and of the operating system."""
    return (
        *(_of_list(name) for name in ("path", "meta_path", "path_hooks", "argv")),
        *(_stream(name) for name in ("stdin", "stdout", "stderr")),
        Setting("os.environ", lambda: dict(os.environ), _set_environment),
        Setting("the current directory", _current_directory, os.chdir),
        Setting("umask", _umask, os.umask),
        Setting("signal handlers", _handlers, _set_handlers),
        Setting("blocked signals", _blocked, lambda v: signal.pthread_sigmask(_SETMASK, v)),
        Setting("alarms", _alarms),
        Setting("limits of resources", _limits),
        Setting("niceness", lambda: os.nice(0)),
        Setting("cores", _cores),
        Setting("locale", lambda: locale.setlocale(locale.LC_ALL), _set_locale),
        Setting("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        Setting("tracing", lambda: (sys.gettrace(), sys.getprofile())),
        Setting("garbage collector", _collector, _set_collector),
        Setting("warnings", lambda: list(warnings.filters), _set_warnings),
        Setting("logging", _loggers, _set_loggers),
        Setting("numpy.seterr", np.geterr, lambda v: np.seterr(**v)),
        Setting("numpy.seterrcall", np.geterrcall),
        Setting("numpy.set_printoptions", np.get_printoptions, lambda v: np.set_printoptions(**v)),
        Setting("numpy's bit generator", _bit_generator),
        Setting("decimal", lambda: repr(decimal.getcontext())),
    )


def reseed() -> None:
    """Seed Python's and NumPy's global streams from the system's entropy, as at a start."""
    random.seed()
    np.random.seed()


def _bit_generator() -> int:
    generators: Any = np.random
    return id(generators.get_bit_generator())


def _of_list(name: str) -> Setting:
    """A list of `sys`: another may stand in its place, or other things in it."""
    found = getattr(sys, name)

    def write(items: list[Any]) -> None:
        found[:] = items
        setattr(sys, name, found)

    return Setting(f"sys.{name}", lambda: list(getattr(sys, name)), write)


def _stream(name: str) -> Setting:
    found = getattr(sys, name)

    def read() -> tuple[Any, bool]:
        stream = getattr(sys, name)
        return stream, bool(stream.closed)

    return Setting(f"sys.{name}", read, lambda _: setattr(sys, name, found))


def _set_environment(value: dict[str, str]) -> None:
    for name in os.environ.keys() - value.keys():
        del os.environ[name]
    os.environ.update(value)


def _current_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


def _umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


_SETMASK = getattr(signal, "SIG_SETMASK", 0)

#: What nobody can handle is not asked for.
_SIGNALS = tuple(
    sorted(
        signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}, key=lambda number: int(number)
    )
)


def _handlers() -> dict[int, Any]:
    return {int(number): signal.getsignal(number) for number in _SIGNALS}


def _set_handlers(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _blocked() -> set[Any]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def _alarms() -> list[bool]:
    kinds = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    return [any(signal.getitimer(kind)) for kind in kinds]


def _limits() -> dict[str, tuple[int, int]]:
    names = (name for name in dir(resource) if name.startswith("RLIMIT_"))
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _set_locale(value: str) -> None:
    locale.setlocale(locale.LC_ALL, value)


def _collector() -> tuple[bool, tuple[int, int, int], int]:
    return gc.isenabled(), gc.get_threshold(), len(gc.callbacks)


def _set_collector(value: tuple[bool, tuple[int, int, int], int]) -> None:
    enabled, threshold, _ = value
    gc.set_threshold(*threshold)
    (gc.enable if enabled else gc.disable)()


def _set_warnings(value: list[Any]) -> None:
    warnings.filters[:] = value  # type: ignore[index]
    warnings.simplefilter("default", append=True)  # where a warning was shown is forgotten by this
    warnings.filters[:] = value  # type: ignore[index]


#: How a logger is that nobody has set.
_PLAIN: tuple[Any, ...] = (logging.NOTSET, [], [], True, False)


def _loggers() -> dict[str, tuple[Any, ...]]:
    """How each logger is set; one that is made later is not among them."""
    root = logging.getLogger()
    found = {"": root} | {
        name: logger
        for name, logger in root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    states = {name: _state(logger) for name, logger in found.items() if _is_set(logger)}
    return {**states, ".disable": (root.manager.disable,)}


def _is_set(logger: logging.Logger) -> bool:
    return _state(logger)[1:] != _PLAIN


def _state(logger: logging.Logger) -> tuple[Any, ...]:
    return (
        logger, logger.level, list(logger.handlers), list(logger.filters),
        logger.propagate, logger.disabled,
    )  # fmt: skip


def _set_loggers(value: dict[str, tuple[Any, ...]]) -> None:
    for name, (logger, *_) in _loggers().items():
        if name not in value and name != ".disable":
            _set_logger(logger, *_PLAIN)
    for name, state in value.items():
        if name == ".disable":
            logging.disable(state[0])
        else:
            _set_logger(*state)


def _set_logger(logger: Any, level: int, handlers: Any, filters: Any, *flags: bool) -> None:
    logger.setLevel(level)
    logger.handlers[:], logger.filters[:] = handlers, filters
    logger.propagate, logger.disabled = flags
