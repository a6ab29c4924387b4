"""Running a model as it is, before it is captured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cgo.capture.export import at_line, source_of
from cgo.capture.first_call import lazy, materialise, registered
from cgo.capture.kept import Kept
from cgo.errors import ModelError
from cgo.model import Model, TrainingSpec
from cgo.runtime.data import Leaves, preserved_random_state
from cgo.runtime.state import RandomState
from cgo.runtime.step import Step, autocast, eval_mode
from cgo.user_code import contained, told


def timed(module: nn.Module, training: TrainingSpec, leaves: Leaves) -> float:
    """Seconds of a forward and a backward on one thread.

    Counted of this thread alone: while workers start beside it, others have the cores meanwhile.
    """
    step = Step(module, training, tuple(leaves))
    with preserved_random_state(), autocast(training, "cpu"):
        torch.manual_seed(0)
        own = [leaf.clone() for leaf in leaves.values()]
        started = time.thread_time()
        loss, _ = step(*own)
        loss.backward()  # type: ignore[no-untyped-call]
        return time.thread_time() - started


def materialised(
    model: Model, module: nn.Module, random: RandomState | None, leaves: Leaves
) -> Mapping[str, Tensor] | None:
    """Give lazy parameters what a first call gives them, and a trial what it needs to do so."""
    paths = lazy(module)
    if not paths:
        return None
    if random is None:
        raise ModelError(
            f"model {model.model_id!r}: this nn.Module instance has lazy parameters "
            f"({', '.join(paths[:3])}); call it once before it is submitted, or give a factory "
            "('package.module:callable' with kwargs)"
        )
    try:
        with contained:
            return materialise(module, model.training, leaves, random)
    except Exception as error:
        raise ModelError(_raised(model, leaves, error)) from error


def registered_buffers(
    model: Model, module: nn.Module, random: RandomState | None, leaves: Leaves
) -> Mapping[str, Tensor] | None:
    """Give a factory's module the buffers that its first call registers; None: there are none."""
    if random is None:
        return None
    try:
        with contained:
            return registered(module, model.training, leaves, model.seed)
    except Exception as error:
        raise ModelError(_raised(model, leaves, error)) from error


def run_eagerly(model: Model, module: nn.Module, name: str, leaves: Leaves) -> None:
    """Find out whether the model runs at all; what fails here fails training alone as well."""
    step, kept = Step(module, model.training, tuple(leaves)), Kept(module)
    context = autocast(model.training, "cpu")
    try:
        with contained, kept.afterwards(), preserved_random_state(), context:
            torch.manual_seed(model.seed)
            if name.startswith("validation"):
                with torch.no_grad(), eval_mode(step):
                    loss, _ = step(*(leaf.clone() for leaf in leaves.values()))
            else:
                loss, _ = step(*(leaf.clone() for leaf in leaves.values()))
    except Exception as error:
        raise ModelError(_raised(model, leaves, error)) from error
    check_loss(model, name, loss)


def check_loss(model: Model, name: str, loss: Any) -> None:
    """See that a loss can be trained on.

    Raises:
        ModelError: it is no scalar, or carries no gradient.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ModelError(
            f"model {model.model_id!r}: loss {model.training.loss} must return a scalar tensor, "
            f"it returned {list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
        )
    if name.startswith("train") and not loss.requires_grad:
        raise ModelError(
            f"model {model.model_id!r}: its loss carries no gradient, so training would change "
            "nothing: backward() would raise 'element 0 of tensors does not require grad'. Look "
            "for a detach(), a no_grad(), an argmax or .item() between parameters and loss, or for "
            "parameters that are all frozen"
        )


def _raised(model: Model, leaves: Leaves, error: Exception) -> str:
    shapes = ", ".join(f"{key} {list(leaf.shape)}" for key, leaf in leaves.items())
    return (
        f"model {model.model_id!r}: a batch ({shapes}) through the module and its loss "
        f"{model.training.loss} raised {told(error)}{at_line(source_of(error))}"
    )
