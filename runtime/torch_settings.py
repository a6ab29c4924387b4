"""Torch's settings of a process: what `cgo.runtime.settings` watches of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch.utils import deterministic

from cgo.private.modes import modes
from cgo.runtime.settings import Setting

#: Flags that can be read and set as attributes, by where they are.
_FLAGS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("cudnn", torch.backends.cudnn, ("enabled", "benchmark", "benchmark_limit", "deterministic")),
    ("mkldnn", torch.backends.mkldnn, ("enabled", "deterministic")),
    ("opt_einsum", torch.backends.opt_einsum, ("enabled", "strategy")),
    ("quantized", torch.backends.quantized, ("engine",)),
    ("deterministic", deterministic, ("fill_uninitialized_memory",)),
)

#: How exact products are. Whoever has set these by torch's newer names cannot make it forget that
#: (it then answers the older ones with errors), so they are read only.
_PRECISIONS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    (
        "cuda.matmul",
        torch.backends.cuda.matmul,
        ("fp32_precision", "allow_tf32", "allow_fp16_reduced_precision_reduction",
         "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"),
    ),
    ("cudnn", torch.backends.cudnn, ("fp32_precision", "allow_tf32")),
    *(
        (f"{name}.{part}", getattr(getattr(torch.backends, name), part, None), ("fp32_precision",))
        for name, parts in (("cudnn", ("conv", "rnn")), ("mkldnn", ("matmul", "conv", "rnn")))
        for part in parts
    ),
    ("backends", torch.backends, ("fp32_precision",)),
)  # fmt: skip

_SDP = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def torch_settings() -> tuple[Setting, ...]:
    """All that are looked at."""
    return (
        Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting("modes", modes, lambda _: torch.set_default_device(None)),
        Setting("default device", torch.get_default_device),
        Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("inference mode", torch.is_inference_mode_enabled),
        Setting("autocast", _autocast),
        Setting("anomaly", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Setting("deterministic algorithms", _deterministic, _set_deterministic),
        Setting("threads", torch.get_num_threads, torch.set_num_threads),
        Setting("threads of operators", torch.get_num_interop_threads),
        Setting("warn_always", torch.is_warn_always_enabled, torch.set_warn_always),
        Setting("fast path of attention", *_fastpath()),
        Setting("sharing", torch.multiprocessing.get_sharing_strategy),
        Setting("float32 precision", lambda: _answer(torch.get_float32_matmul_precision)),
        Setting("subnormal numbers", _keeps_subnormals, _keep_subnormals),
        Setting("distributed", _is_distributed),
        Setting("current device", _current, _set_current),
        Setting("share of a device's memory", _memory_shares),
        *(_flag(at, owner, name) for at, owner, names in _FLAGS for name in names),
        *(_flag(at, owner, name, fixed=True) for at, owner, names in _PRECISIONS for name in names),
        *(_sdp(name) for name in _SDP),
        *map(_preferred, ("linalg", "blas")),
    )


def _autocast() -> list[Any]:
    kinds = ("cpu", "cuda")
    enabled = [torch.is_autocast_enabled(kind) for kind in kinds]
    dtypes = [torch.get_autocast_dtype(kind) for kind in kinds]
    return [enabled, dtypes, torch.is_autocast_cache_enabled()]


def _deterministic() -> tuple[bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _fastpath() -> tuple[Callable[[], bool], Callable[[bool], None]]:
    return torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled


def _keeps_subnormals() -> bool:
    """There is nothing to be asked but a product."""
    return bool((torch.full((8,), 1e-38) * 0.01 != 0).all())


def _keep_subnormals(value: bool) -> None:
    torch.set_flush_denormal(not value)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _current() -> tuple[int, list[Any]] | None:
    """The device and the stream of each that are used where none is named."""
    if not torch.cuda.is_initialized():
        return None
    count = range(torch.cuda.device_count())
    return torch.cuda.current_device(), [torch.cuda.current_stream(index) for index in count]


def _set_current(value: tuple[int, list[Any]] | None) -> None:
    if value is not None:
        for stream in value[1]:
            torch.cuda.set_stream(stream)
        torch.cuda.set_device(value[0])


def _memory_shares() -> list[Any]:
    if not torch.cuda.is_initialized():
        return []
    share: Any = torch.cuda.get_per_process_memory_fraction
    return [_answer(partial(share, index)) for index in range(torch.cuda.device_count())]


def _answer(question: Callable[[], Any]) -> Any:
    """What is answered; an error is an answer, too."""
    try:
        return question()
    except (AttributeError, RuntimeError) as error:
        return type(error).__name__


def _flag(where: str, owner: Any, name: str, *, fixed: bool = False) -> Setting:
    read = partial(_answer, partial(getattr, owner, name))
    return Setting(f"{where}.{name}", read, None if fixed else partial(setattr, owner, name))


def _sdp(name: str) -> Setting:
    cuda: Any = torch.backends.cuda
    return Setting(name, getattr(cuda, f"{name}_enabled"), getattr(cuda, f"enable_{name}"))


def _preferred(kind: str) -> Setting:
    choose: Any = getattr(torch.backends.cuda, f"preferred_{kind}_library")
    return Setting(f"library of {kind}", partial(_answer, choose), choose)


class RandomStates:
    """Torch's global streams as they were when the process began.

    Those of devices that are opened later begin like all: at torch's own seed.
    """

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._seed = torch.initial_seed()

    def put_back(self) -> None:
        """Let the streams begin anew."""
        torch.set_rng_state(self._cpu)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(self._seed)


def release() -> None:
    """Give memory of devices back that nothing uses; raises where a device no longer answers."""
    if not torch.cuda.is_initialized():
        return
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
