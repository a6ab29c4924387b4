"""Augmentation by a module: on the device, once a batch for all models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cgo.errors import DataError
from cgo.imports import resolve
from cgo.model import DataSpec
from cgo.runtime.leaves import Leaves, call_arguments, named_leaves
from cgo.runtime.randomness import mixed_seed, seeded
from cgo.user_code import contained, told


class Augmentation:
    """What `DataSpec.augment` names, built once; its documentation says what a plain loop does.

    It draws from the process's streams, which it seeds and puts back: call it on the thread that
    trains, never beside another that draws.

    Args:
        spec: Names the callable; `augment` must be given.
        device: Where its module and the batches are.

    Raises:
        DataError: the callable raised, or returned no module.
    """

    def __init__(self, spec: DataSpec, device: torch.device) -> None:
        self._spec = spec
        self._module = _built(spec, device)

    def __call__(self, leaves: Leaves, epoch: int, batch: int) -> Leaves:
        """A training batch with its inputs augmented.

        Args:
            leaves: The batch; the module may write into its inputs.
            epoch: From 0.
            batch: Its number in the epoch, from 0.

        Raises:
            DataError: the module raised, or returned something else than it was given.
        """
        positional, named = call_arguments(leaves)
        try:
            with seeded(mixed_seed(self._spec.seed, epoch, batch)), torch.no_grad(), contained:
                output = self._module(*positional, **named)
        except Exception as error:
            raise DataError(
                f"augment {self._spec.augment}, in batch {batch} of epoch {epoch}, raised "
                f"{told(error)}"
            ) from error
        return {**leaves, **self._checked(output, leaves)}

    def _checked(self, output: Any, leaves: Leaves) -> dict[str, Tensor]:
        try:
            changed = named_leaves("input", output)
        except DataError as error:
            raise DataError(f"what augment {self._spec.augment} returned: {error}") from error
        given = {name: leaf for name, leaf in leaves.items() if name.partition(".")[0] == "input"}
        if set(changed) != set(given):
            raise DataError(
                f"augment {self._spec.augment} returned {', '.join(changed) or 'nothing'}; it was "
                f"given {', '.join(given)} and must return the same"
            )
        for name, leaf in given.items():
            if changed[name].shape[:1] != leaf.shape[:1]:
                raise DataError(
                    f"augment {self._spec.augment} returned {name} of shape "
                    f"{list(changed[name].shape)}, was given {list(leaf.shape)}; the number of "
                    "samples must stay"
                )
        return changed


def _built(spec: DataSpec, device: torch.device) -> nn.Module:
    assert spec.augment is not None
    factory = resolve(spec.augment, field="augment")
    try:
        with seeded(spec.seed), contained:
            module = factory(**spec.augment_kwargs)
            placed = module.to(device) if isinstance(module, nn.Module) else None
    except Exception as error:
        raise DataError(f"augment {spec.augment} raised {told(error)}") from error
    if placed is None:
        raise DataError(f"augment {spec.augment} returned a {type(module).__name__}, no nn.Module")
    return placed
