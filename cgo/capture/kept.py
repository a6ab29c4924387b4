"""Putting a module back as it was, which takes no copy of it."""

from __future__ import annotations

import contextlib
import operator
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cgo.capture.disturb import tensors_of

#: Levels of containers and objects that are looked into.
_DEPTH = 4

#: Values that are compared and set by others, or that nothing is written into.
_WHOLE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType,
          types.BuiltinFunctionType, str, bytes, int, float, torch.dtype, torch.device)  # fmt: skip


#: Whether values of a type are looked into: most are of few types.
_KNOWN: dict[type, bool] = {}


def _is_whole(kind: type) -> bool:
    found = _KNOWN.get(kind)
    if found is None:
        found = _KNOWN[kind] = issubclass(kind, _WHOLE) or kind is type(None)
    return found


class Kept:
    """What a module is, and what Python keeps of it, at the moment when this is made.

    Tensors keep their identity and get their values back; attributes, and lists, dictionaries, sets
    and plain objects behind them, their content.

    Args:
        module: With all its parts.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 2)
        >>> kept = Kept(net)
        >>> net.steps = 1
        >>> kept.put_back()
        >>> hasattr(net, "steps")
        False
    """

    def __init__(self, module: nn.Module) -> None:
        distinct = {id(tensor): tensor for tensor in tensors_of(module).values()}.values()
        self._values = [(t, t.detach().clone(), t.requires_grad) for t in distinct]
        self._contents: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for part in module.modules():
            self._look(vars(part), 0, seen)

    def _look(self, value: Any, depth: int, seen: set[int]) -> None:
        """Write down what is in a container, and in those within it."""
        if _is_whole(type(value)) or depth == _DEPTH or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            self._contents.append((value, dict(value)))
            inner: Any = list(value.values())
        elif isinstance(value, (list, deque)):
            inner = list(value)
            self._contents.append((value, inner))
        elif isinstance(value, set):
            self._contents.append((value, set(value)))
            return
        elif isinstance(value, tuple):
            inner = value
        else:
            inner = [found] if isinstance(found := getattr(value, "__dict__", None), dict) else []
        for item in inner:
            self._look(item, depth + 1, seen)

    def put_back(self) -> None:
        """Make the module what it was; its gradients are gone."""
        for container, content in self._contents:
            if not _same(container, content):
                _refill(container, content)
        self.put_values_back()

    def put_values_back(self) -> None:
        """Let parameters and buffers hold what they held; attributes stay as they are."""
        with torch.no_grad():
            for tensor, value, trained in self._values:
                tensor.grad = None
                if tensor.requires_grad != trained:
                    tensor.requires_grad_(trained)
                if tensor.shape != value.shape or tensor.dtype is not value.dtype:
                    tensor.data = value.clone()  # in memory of its own
                else:
                    tensor.copy_(value)

    @contextlib.contextmanager
    def afterwards(self) -> Iterator[None]:
        """Put the module back after a block, however that ends."""
        try:
            yield
        finally:
            self.put_back()


def _same(container: Any, content: Any) -> bool:
    """Whether the very objects are in it, in their places."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):  # whose order counts as well
        if not all(map(operator.is_, container.values(), content.values())):
            return False
        return list(container) == list(content)
    if isinstance(container, set):
        return bool(container == content)
    return all(map(operator.is_, container, content))


def _refill(container: Any, content: Any) -> None:
    add: Callable[[Any], None] = getattr(container, "extend", None) or container.update
    container.clear()
    add(content)
