"""TorchScript's interpreter, which runs a record of operator calls without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled", "unoptimised"]

NAMES = (
    "torch._C.CompilationUnit",
    "torch._C._get_graph_executor_optimize",
    "torch._C._set_graph_executor_optimize",
)


def compiled(source: str, name: str, names: Callable[[str], Any]) -> Any:
    """A function from its source in TorchScript.

    Args:
        source: Of the function.
        name: Its name there.
        names: Gives what its free names stand for.

    Raises:
        RuntimeError: TorchScript refuses it.
        AttributeError: this torch has no TorchScript any more, or not all that is needed of it.
    """
    for needed in NAMES:
        getattr(torch._C, needed.rpartition(".")[2])
    unit = torch._C.CompilationUnit()
    unit.define(source, names)
    return unit.find_function(name)


class unoptimised:
    """Run functions as they are written: another order would give other bits."""

    def __enter__(self) -> None:
        self._before = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_graph_executor_optimize(self._before)
