"""JAX's way of training many models alike: one step, batched by `vmap` and compiled by `jit`.

The same initial weights, batches, loss and optimizer as everywhere in this benchmark. On one thread
of torch's XLA gets one as well, for which its settings have to be there before JAX starts.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cgo.model import Model, TrainingSpec

#: What keeps XLA on one thread: neither its products nor its graphs start others.
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

#: Settings of `SGD` that the step below knows.
_KNOWN = {"lr", "momentum"}

#: Applies a layer: its parameters, and what it reads.
Layer = Callable[[list[Any], Any], Any]


def refusal(models: Sequence[Model], net: nn.Module) -> str | None:
    """Why these models are not trained here, or None; `net` is the module of one of them."""
    if len({(m.module, str(m.kwargs), m.data.digest) for m in models}) > 1:
        return "vmap takes models of one architecture only"
    if not isinstance(net, nn.Sequential):
        return f"{type(net).__name__} is no chain of layers"
    strange = sorted({type(part).__name__ for part in net if type(part) not in _LAYERS})
    if strange:
        return f"no translation of {', '.join(strange)}"
    if unusual := [str(part) for part in net if not _is_usual(part)]:
        return f"no translation of {unusual[0]}"
    for model in models:
        if not _by_momentum(model.training):
            return f"model {model.model_id!r} is trained in another way than by momentum"
    if len({model.training.optimizer_kwargs["momentum"] for model in models}) > 1:
        return "models differ in momentum"
    return None


def _by_momentum(training: TrainingSpec) -> bool:
    others = training.scheduler, training.grad_clip_norm
    known = training.optimizer == "SGD" and set(training.optimizer_kwargs) == _KNOWN
    plain = training.loss == "cross_entropy" and training.precision == "float32"
    return known and plain and others == (None, None)


def _is_usual(part: nn.Module) -> bool:
    """Whether a layer has no setting that its translation leaves out."""
    if isinstance(part, nn.Conv2d):
        return part.padding_mode == "zeros" and not isinstance(part.padding, str)
    if isinstance(part, nn.MaxPool2d):
        return part.dilation == 1 and not part.ceil_mode and not part.return_indices
    return not isinstance(part, nn.Flatten) or (part.start_dim, part.end_dim) == (1, -1)


def import_jax() -> Any:
    """JAX, on as many threads as torch where that is one.

    Raises:
        ImportError: it is not installed.
    """
    if torch.get_num_threads() == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        if _ONE_THREAD not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD}".strip()
        os.environ.setdefault("NPROC", "1")  # the size of XLA's pool
    jax = importlib.import_module("jax")
    if torch.get_num_threads() == 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # in the thread that calls
    return jax


class JaxSteps:
    """Trains models that are alike, a number of steps at each call.

    Args:
        models: What `refusal` takes.
        nets: Their modules, which give the architecture and the initial weights.
        batches: What it goes round over.

    Attributes:
        parameters: Of each layer, each with the models as its first axis.
        losses: Of each model, at the last step.

    Raises:
        ImportError: JAX is not installed.
    """

    def __init__(
        self,
        models: Sequence[Model],
        nets: Sequence[nn.Sequential],
        batches: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self._jax = jax = import_jax()
        given = [model.training.optimizer_kwargs for model in models]
        layers = [_LAYERS[type(part)](jax, part) for part in nets[0]]
        step = _step(jax, layers, float(given[0]["momentum"]))
        self._step = jax.jit(jax.vmap(step, (0, 0, 0, None, None)), donate_argnums=(0, 1))
        self.parameters = [
            [_array(jax, torch.stack(lanes)) for lanes in zip(*(n[i].parameters() for n in nets))]
            for i in range(len(layers))
        ]
        self._moments = jax.tree.map(jax.numpy.zeros_like, self.parameters)
        self._rates = _array(jax, torch.tensor([float(kwargs["lr"]) for kwargs in given]))
        self._batches = itertools.cycle([(_array(jax, x), _array(jax, y)) for x, y in batches])
        self.losses: Any = None

    def __call__(self, count: int) -> None:
        """Train so many steps, and wait for them."""
        for _ in range(count):
            x, y = next(self._batches)
            self.parameters, self._moments, self.losses = self._step(
                self.parameters, self._moments, self._rates, x, y
            )
        self._jax.block_until_ready((self.parameters, self._moments, self.losses))


def _array(jax: Any, value: Tensor) -> Any:
    """A copy; classes become int32, as JAX has integers."""
    return jax.numpy.array(value.detach().cpu().numpy())


def _step(jax: Any, layers: Sequence[Layer], momentum: float) -> Callable[..., Any]:
    """One model's step: forward, cross entropy, backward, and SGD with momentum."""

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        for layer, own in zip(layers, parameters):
            x = layer(own, x)
        logarithms = jax.nn.log_softmax(x)
        return -jax.numpy.take_along_axis(logarithms, y[:, None], axis=1).mean()

    def step(parameters: Any, moments: Any, rate: Any, x: Any, y: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, x, y)
        moments = jax.tree.map(lambda m, g: momentum * m + g, moments, gradients)
        moved = jax.tree.map(lambda p, m: p - rate * m, parameters, moments)
        return moved, moments, value

    return step


# --- layers ---------------------------------------------------------------------------------------


def _linear(jax: Any, part: nn.Module) -> Layer:
    def apply(own: list[Any], x: Any) -> Any:
        value = x @ own[0].T
        return value + own[1] if len(own) > 1 else value

    return apply


def _relu(jax: Any, part: nn.Module) -> Layer:
    return lambda own, x: jax.numpy.maximum(x, 0)


def _flatten(jax: Any, part: nn.Module) -> Layer:
    return lambda own, x: x.reshape(len(x), -1)


def _convolution(jax: Any, part: nn.Module) -> Layer:
    assert isinstance(part, nn.Conv2d)
    edges = [(int(edge), int(edge)) for edge in part.padding]
    settings = {
        "window_strides": part.stride,
        "padding": edges,
        "rhs_dilation": part.dilation,
        "feature_group_count": part.groups,
        "dimension_numbers": ("NCHW", "OIHW", "NCHW"),
    }

    def apply(own: list[Any], x: Any) -> Any:
        value = jax.lax.conv_general_dilated(x, own[0], **settings)
        return value + own[1][:, None, None] if len(own) > 1 else value

    return apply


def _max_pool(jax: Any, part: nn.Module) -> Layer:
    assert isinstance(part, nn.MaxPool2d)
    size, stride, padding = (
        (given, given) if isinstance(given, int) else given
        for given in (part.kernel_size, part.stride, part.padding)
    )
    edges = [(0, 0), (0, 0), *((edge, edge) for edge in padding)]

    def apply(own: list[Any], x: Any) -> Any:
        low = -jax.numpy.inf
        return jax.lax.reduce_window(x, low, jax.lax.max, (1, 1, *size), (1, 1, *stride), edges)

    return apply


_LAYERS: dict[type[nn.Module], Callable[[Any, nn.Module], Layer]] = {
    nn.Linear: _linear,
    nn.ReLU: _relu,
    nn.Flatten: _flatten,
    nn.Conv2d: _convolution,
    nn.MaxPool2d: _max_pool,
}
