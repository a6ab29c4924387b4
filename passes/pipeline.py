"""Running passes one after another, each result verified."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from cgo.errors import PassError
from cgo.graph import Graph, verify

Pass = Callable[[Graph], Graph]
Observer = Callable[[str, Graph], None]


def run_pipeline(graph: Graph, passes: Iterable[Pass], observe: Observer | None = None) -> Graph:
    """Apply passes in order.

    Args:
        graph: A graph that verifies; left as it is.
        passes: Functions from graph to graph.
        observe: Called after each pass with its name and the graph it returned, changed or not.

    Returns:
        The last pass's graph; `graph` itself when no pass found anything to do.

    Raises:
        GraphError: `graph` does not verify.
        PassError: a pass raised, or its result does not verify; names the pass.
    """
    verify(graph)
    for pass_ in passes:
        try:
            result = pass_(graph)
            if result is not graph:
                verify(result)
        except Exception as error:
            raise PassError(
                f"pass {name_of(pass_)} failed: {type(error).__name__}: {error}"
            ) from error
        graph = result
        if observe is not None:
            observe(name_of(pass_), graph)
    return graph


def name_of(pass_: Pass) -> str:
    """A function's own name; of a pass with options, its class's name in the same style."""
    name = getattr(pass_, "__name__", None)
    return name or re.sub(r"(?<!^)(?=[A-Z])", "_", type(pass_).__name__).lower()
