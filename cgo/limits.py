"""How large the parts of a document may be, checked before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cgo.errors import GraphDataError, GraphDataTooLargeError

#: Levels of objects and lists in a document.
MOST_DEPTH = 64

#: Models of a trial, aliases included, and nodes of its graph.
MOST_MODELS = 20_000
MOST_NODES = 2_000_000

#: Outputs of one node; `unbind` and `split` have many.
MOST_OUTPUTS = 65_536

#: Characters of a name (of a node, a parameter, a leaf), and of any other text.
MOST_NAME = 2_000
MOST_TEXT = 2**24

#: Bits of a whole number: the largest double has so many.
_MOST_BITS = 1024

#: Dimensions and elements of a tensor; no device holds more.
MOST_DIMENSIONS = 64
MOST_ELEMENTS = 2**36

Path = tuple[Any, ...] | None  # (path of the parent, key)


def check_values(document: Any) -> None:
    """Check that JSON values can be walked, printed and written again, whatever they mean.

    Raises:
        GraphDataTooLargeError: nested too deeply, or a text or a number is too long.
        GraphDataError: a number that is not finite, half a character, or no JSON value.
    """
    _check(document, None, 0)


def check_counts(document: dict[str, Any]) -> None:
    """Check the numbers of models and nodes.

    Raises:
        GraphDataTooLargeError: there are too many.
    """
    for fields, most in ((("models", "aliases"), MOST_MODELS), (("nodes",), MOST_NODES)):
        parts = [document.get(field) for field in fields]
        count = sum(len(part) for part in parts if isinstance(part, (list, tuple, dict)))
        if count > most:
            raise GraphDataTooLargeError(
                f"the document has {count:,} {fields[0]}; at most {most:,} are read; merge fewer "
                "models a trial"
            )


def _check(value: Any, path: Path, depth: int) -> None:
    if isinstance(value, dict):
        _check_keys(value, path)
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        items = ((None, value),)
    if depth > MOST_DEPTH:
        raise GraphDataTooLargeError(
            f"{_place(path)}: nested too deeply; at most {MOST_DEPTH} levels are read"
        )
    for key, item in items:
        kind = type(item)
        if kind is str:
            _check_text(item, path, key)
        elif kind is float:
            if not math.isfinite(item):
                raise GraphDataError(f"{_place((path, key))}: {item} is no finite number")
        elif kind is int:
            if item.bit_length() > _MOST_BITS:
                raise GraphDataTooLargeError(
                    f"{_place((path, key))}: a number of {item.bit_length():,} bits"
                )
        elif kind in (dict, list, tuple):
            _check(item, (path, key), depth + 1)
        elif item is not None and kind is not bool:
            raise GraphDataError(f"{_place((path, key))}: a {kind.__name__} is no JSON value")


def _check_keys(value: dict[Any, Any], path: Path) -> None:
    for key in value:
        if type(key) is not str:
            raise GraphDataError(f"{_place(path)}: the key {key!r:.60} is no text")
        _check_text(key, path, None)


def _check_text(text: str, path: Path, key: Any) -> None:
    if len(text) > MOST_TEXT:
        raise GraphDataTooLargeError(
            f"{_place((path, key))}: a text of {len(text):,} characters; at most {MOST_TEXT:,} are "
            "read"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise GraphDataError(
                f"{_place((path, key))}: {text!a:.60} has half a character (a lone surrogate)"
            ) from error


def _place(path: Path) -> str:
    """Where a value stands, as `models.0.factory`; long or odd names cut and quoted."""
    parts: list[str] = []
    while path is not None:
        path, key = path
        if key is not None:
            text = str(key)
            plain = text.isascii() and text.isprintable() and len(text) <= 60
            parts.append(text if plain else f"{text[:60]!a}")
    return ".".join(reversed(parts)) or "the document"


def storage_elements(shape: Sequence[int], stride: Sequence[int] | None) -> int:
    """The elements of the memory that a tensor reaches into."""
    if 0 in shape:
        return 0
    if stride is None:
        return math.prod(shape)
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride))


def check_tensor(where: str, shape: Sequence[int], stride: Sequence[int] | None = None) -> None:
    """Check what a document says of a tensor.

    Raises:
        GraphDataTooLargeError: it has more elements, or reaches further, than any device holds.
        GraphDataError: a negative size or stride, or not one stride for each dimension.
    """
    if len(shape) > MOST_DIMENSIONS:
        raise GraphDataTooLargeError(
            f"{where}: a tensor of {len(shape)} dimensions; at most {MOST_DIMENSIONS} are read"
        )
    if any(size < 0 for size in shape):
        raise GraphDataError(f"{where}: a negative size in shape {_shown(shape)}")
    if stride is not None:
        if len(stride) != len(shape):
            raise GraphDataError(
                f"{where}: {len(stride)} strides for {len(shape)} dimensions of {_shown(shape)}"
            )
        if any(step < 0 for step in stride):
            raise GraphDataError(f"{where}: a negative stride in {_shown(stride)}")
    # A size of none hides the others, which torch multiplies all the same.
    if math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise GraphDataTooLargeError(
            f"{where}: a tensor of {_shown(shape)}; at most {MOST_ELEMENTS:,} elements are read"
        )
    if stride and (max(stride) > MOST_ELEMENTS or storage_elements(shape, stride) > MOST_ELEMENTS):
        raise GraphDataTooLargeError(
            f"{where}: strides {_shown(stride)} reach over more than {MOST_ELEMENTS:,} elements"
        )


def _shown(numbers: Sequence[int]) -> str:
    return f"{list(numbers)}" if len(numbers) <= MOST_DIMENSIONS else f"{len(numbers)} numbers"
