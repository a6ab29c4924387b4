# ruff: noqa: SIM905  (one word an operator keeps the list readable)
"""Whether the shape of what an operator gives depends on nothing but shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cgo.passes.sharing import PURE
from cgo.private.fake_tensors import FakeTensorMode
from cgo.private.operators import OpOverload
from cgo.private.recording import run

#: Operators that may look at values for the shape that they give, or give no tensor; others of
#: `PURE` do not. Trying one costs a call, and of some an import of a third of a second.
_MAY_LOOK = frozenset(
    ("equal", "where", "index", "one_hot", "repeat_interleave", "tensor_split", "pad_sequence")
)

_STATIC = (PURE - _MAY_LOOK) | frozenset(
    "batch_norm instance_norm dropout feature_dropout alpha_dropout scaled_dot_product_attention "
    "rand randn rand_like randn_like randint normal uniform bernoulli exponential empty empty_like "
    "new_empty copy zero fill index_put scatter_add index_add".split()
)

#: Calls that were found to be static in this process; one that is not may just have had shapes that
#: do not fit. Numbers count by their sign alone: a size of -1 may stand for "as many as there are
#: values", which no other number does.
_KNOWN: set[object] = set()


def is_static(overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator gives tensors alone, of shapes that can be known without values.

    Args:
        overload: The operator.
        args: Its arguments, with real tensors; they are not read.
        kwargs: Those by name.
    """
    name = overload._schema.name.partition("::")[2].removesuffix("_")
    if name in _STATIC:
        return True
    key = (overload, _sign(args), tuple((name, _sign(v)) for name, v in kwargs.items()))
    if key in _KNOWN:
        return True
    found = _gives_tensors(overload) and any(
        _runs(overload, args, kwargs, mode, device) for mode, device in _WAYS
    )
    if found:
        _KNOWN.add(key)
    return found


def _sign(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, (tuple, list)):
        return tuple(map(_sign, value))
    if type(value) in (int, float):
        return type(value), value < 0
    return type(value), value if isinstance(value, (bool, str, torch.dtype)) else None


def _gives_tensors(overload: OpOverload) -> bool:
    return all("Tensor" in str(value.type) for value in overload._schema.returns)


#: Tensors without values: on the meta device, and where an operator is not known there, torch's
#: fakes of tensors on a CPU, which are slower and import torch's compiler.
_WAYS: tuple[tuple[Callable[[], AbstractContextManager[Any]], str], ...] = (
    (nullcontext, "meta"),
    (partial(FakeTensorMode, allow_non_fake_inputs=True), "cpu"),
)


def _runs(
    overload: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Callable[[], AbstractContextManager[Any]],
    device: str,
) -> bool:
    """Whether it runs on tensors that have no values: whatever asks for one raises."""
    with mode(), torch.no_grad():
        given = [_hollow(value, device) for value in args]
        try:
            run(overload, tuple(given), {k: _hollow(v, device) for k, v in kwargs.items()})
        except Exception:  # torch has an error of its own for each way of asking
            return False
    return True


def _hollow(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if isinstance(value, (tuple, list)):
        return [_hollow(item, device) for item in value]
    return torch.device(device) if isinstance(value, torch.device) else value
