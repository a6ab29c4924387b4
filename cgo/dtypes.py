"""The names of torch's constants that documents may use; no other is looked up in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from cgo.errors import GraphError

if TYPE_CHECKING:
    import torch

Dtype = Literal[
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "complex128", "complex64", "complex32",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
]  # fmt: skip
DTYPES: frozenset[str] = frozenset(get_args(Dtype))

#: Dtypes of autocast regions.
AutocastDtype = Literal["bfloat16", "float16"]

#: What a `Symbol` may stand for, by its kind.
SYMBOLS: dict[str, frozenset[str]] = {
    "dtype": DTYPES,
    "layout": frozenset({"strided"}),
    "memory_format": frozenset(
        {"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"}
    ),
    "device": frozenset({"trial"}),
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        GraphError: it is none of `DTYPES`.

    Example:
        >>> torch_dtype("float32")
        torch.float32
    """
    return torch_constant("dtype", name)  # type: ignore[no-any-return]


def torch_constant(kind: str, name: str) -> Any:
    """The torch constant of a kind and name; devices are no constants.

    Raises:
        GraphError: it is none of `SYMBOLS`.
    """
    import torch

    if kind == "device" or name not in SYMBOLS.get(kind, ()):
        raise GraphError(f"{kind} {name!r} is none that a graph can use")
    return getattr(torch, name)
