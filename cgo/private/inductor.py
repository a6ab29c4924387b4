"""Torch's compiler, called on a graph rather than on a function; its results can be kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

__all__ = ["Artifact", "compiled", "loaded", "settings"]

NAMES = (
    "torch._inductor.standalone_compile",
    "torch._inductor.CompiledArtifact.load",
    "torch._inductor.config.save_config_portable",
)


class Artifact(Protocol):
    """A compiled graph that can be kept in a file."""

    def __call__(self, *inputs: Tensor) -> Any:
        """The graph's results."""

    def save(self, *, path: str) -> None:
        """Write a file that `loaded` reads."""


def compiled(
    module: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any] | None = None
) -> Artifact:
    """A graph as compiled code, for inputs of the same shapes; options are Inductor's own."""
    patches = {"config_patches": dict(options or {})}
    return torch._inductor.standalone_compile(
        module, list(inputs), dynamic_shapes="from_example_inputs", options=patches
    )


def loaded(path: str) -> Callable[..., Any]:
    """What `save` wrote. It is unpickled: a file that somebody else wrote can run any code."""
    artifact: Any = torch._inductor.CompiledArtifact  # type: ignore[attr-defined]
    return artifact.load(path=path, format="binary")


def settings() -> str:
    """Inductor's settings, which a compiled graph depends on, as a text."""
    import torch._inductor.config as config

    return json.dumps(config.save_config_portable(), sort_keys=True, default=repr)
