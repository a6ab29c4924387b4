"""Seeing each operator that a module calls, before autograd and autocast take it apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

from cgo.private.operators import OpOverload

__all__ = ["is_wrapped", "recording", "run"]

NAMES = (
    "torch._dispatch.python.enable_python_dispatcher",
    "torch.fx.experimental.proxy_tensor.ProxyTorchDispatchMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch._C.DispatchKey",
    "torch._C._TorchDispatchModeKey.PROXY",
    "torch._C._DisablePythonDispatcher",
    "torch._C._functorch.is_functorch_wrapped_tensor",
)

#: What is told of a call: the operator, its arguments by position and by name; gives the results.
Call = Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]


class _Recorder(ProxyTorchDispatchMode):
    """A mode of the pre-dispatch key, which takes no others than torch's own kinds."""

    def __init__(self, call: Call) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.pre_dispatch = True
        self._call = call

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to be told that it is skipped, torch's compiler would be imported, for a second."""
        return False

    __enter__ = TorchDispatchMode.__enter__
    __exit__ = TorchDispatchMode.__exit__

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._call(func, args, kwargs or {})


@contextlib.contextmanager
def recording(call: Call) -> Iterator[None]:
    """Let every operator that this thread calls in a block be called by `call`, which may `run` it.

    What an operator is composed of is not seen; nor is what reads a tensor's memory.
    """
    with enable_python_dispatcher(), _Recorder(call):
        yield


def run(overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Within `call`: what the operator gives, at the speed that it has elsewhere."""
    with torch._C._DisablePythonDispatcher():
        return overload(*args, **kwargs)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether it is one of `torch.func`'s, which stand for others."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
