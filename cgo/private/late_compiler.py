"""Torch's compiler, imported when something is compiled and not before.

Some functions of torch's are kept from being compiled. To be told so, the compiler is imported at
their first call, by every optimizer and every mode: a second of each process. Until somebody has
imported it there is nothing to be told, and they are called as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import _compile
from torch.optim import Optimizer

__all__ = ["import_late"]

NAMES = ("torch._compile._disable_dynamo", "torch._subclasses.fake_tensor.FakeTensorMode")

_COMPILER = "torch._dynamo"

#: What such a function looks for, and keeps once the compiler was imported.
_TOLD = "__dynamo_disable"


def import_late() -> None:
    """Let the compiler wait; nothing where this torch does it in another way."""
    if _COMPILER in sys.modules:
        return
    for wrapper in _kept_from_compiling():
        function = getattr(wrapper, "__wrapped__", None)
        if function is not None and getattr(function, _TOLD, None) is None:
            setattr(function, _TOLD, _plain(function))


def _kept_from_compiling() -> Iterator[Any]:
    """Functions that optimizers, fake tensors and the tracing of operators call."""
    for class_ in (Optimizer, torch._subclasses.fake_tensor.FakeTensorMode):
        yield from (value for value in vars(class_).values() if callable(value))
    yield vars(torch.fx.experimental.proxy_tensor)["dispatch_trace"]


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called as it is until the compiler is there, and then as torch would."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _COMPILER not in sys.modules:
            return function(*args, **kwargs)
        setattr(function, _TOLD, None)
        return _compile._disable_dynamo(function)(*args, **kwargs)

    return call
