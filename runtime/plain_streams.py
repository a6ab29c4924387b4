"""Keyed streams for plain PyTorch loops, to compare merged training with on any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cgo.errors import CgoError
from cgo.operators import draws, named_arguments
from cgo.private.dispatch_modes import TorchDispatchMode
from cgo.private.operators import OpOverload
from cgo.runtime.keyed_draws import DOMAINS, Draw, fill, stream_key

#: By operator without trailing underscore and "_like": the distribution, and for each of its
#: parameters what the operator calls it, or its value.
_DRAWING: dict[str, tuple[str, Mapping[str, str | float]]] = {
    "rand": ("uniform", {"low": 0.0, "high": 1.0}),
    "randn": ("normal", {"mean": 0.0, "std": 1.0}),
    "uniform": ("uniform", {"low": "from", "high": "to"}),
    "normal": ("normal", {"mean": "mean", "std": "std"}),
    "bernoulli": ("bernoulli", {"p": "p"}),
    "exponential": ("exponential", {"rate": "lambd"}),
    "log_normal": ("log_normal", {"mean": "mean", "std": "std"}),
    "cauchy": ("cauchy", {"median": "median", "scale": "sigma"}),
    "geometric": ("geometric", {"p": "p"}),
    "random": ("randint", {"low": "from", "high": "to"}),
    "randint": ("randint", {"low": "low", "high": "high"}),
    "randperm": ("randperm", {}),
}


class KeyedStreams:
    """The random numbers of one model in merged training on a GPU, for a plain loop.

    Inside `forward` torch's operators draw what the model's operators draw in a trial: dropout of
    any kind, `torch.rand_like` and its like. docs/random.md says what numbers these are.

    Args:
        seed: The model's.

    Attributes:
        steps: How many forwards of each kind there were; the next one's number.

    Example:
        >>> import torch
        >>> from cgo import KeyedStreams
        >>> streams = KeyedStreams(seed=1)
        >>> net, x = torch.nn.Dropout(0.5), torch.ones(4)
        >>> with streams.forward("train"):
        ...     first = net(x)
        >>> first
        tensor([2., 2., 2., 0.])
        >>> with streams.forward("train"):
        ...     second = net(x)
        >>> bool((first == second).all())
        False
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.steps = dict.fromkeys(DOMAINS, 0)

    @contextmanager
    def forward(self, split: Literal["train", "validation"] = "train") -> Iterator[None]:
        """Around one forward of one batch, and its loss; the backward may follow outside.

        Args:
            split: Whether it is of training or of evaluation.

        Raises:
            CgoError: inside, of an operator that draws what keyed streams do not have, such as
                `torch.multinomial`; such models are opaque lanes, and draw from torch's generator.
        """
        step, self.steps[split] = self.steps[split], self.steps[split] + 1
        # Other forms of attention draw inside of their kernels.
        with sdpa_kernel(SDPBackend.MATH), _Drawing(self.seed, DOMAINS[split], step):
            yield


class _Drawing(TorchDispatchMode):
    """Operators that would draw from torch's generators draw from the streams of one step."""

    def __init__(self, seed: int, domain: int, step: int) -> None:
        super().__init__()
        self._seed, self._domain, self._step = seed, domain, step
        self._order = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = named_arguments(str(func), args, kwargs)
        if name == "native_dropout":  # as CUDA has it
            noise = self._drawn("dropout", given["input"], {"p": float(given["p"])})
            return given["input"] * noise, noise != 0
        kind = name.removesuffix("_").removesuffix("_like")
        if kind not in _DRAWING:
            raise CgoError(f"{func} draws what keyed streams do not have")
        out = args[0] if name.endswith("_") else func(*args, **kwargs)
        if kind == "bernoulli" and not isinstance(given.get("p"), float):
            return out.copy_(self._by_tensor(given))
        distribution, names = _DRAWING[kind]
        return out.copy_(self._drawn(distribution, out, _parameters(names, given)))

    def _by_tensor(self, given: Mapping[str, Any]) -> Tensor:
        """Events of the probabilities in a tensor: uniform numbers below them."""
        p = given["self"] if given.get("p") is None else given["p"]
        return self._drawn("uniform", p.expand(given["self"].shape), {}) < p

    def _drawn(self, distribution: str, like: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        draw = Draw(distribution, parameters, stream_key(self._seed, self._order, self._domain))
        self._order += 1
        flat = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        fill(flat, draw, torch.tensor(self._step, device=like.device))
        return flat.view(like.shape)


def _parameters(names: Mapping[str, str | float], given: Mapping[str, Any]) -> dict[str, Any]:
    found = {own: given.get(its) if isinstance(its, str) else its for own, its in names.items()}
    if "low" in found:  # of integers, it may be left out
        found["low"] = found["low"] or 0
    return found
