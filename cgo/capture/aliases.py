"""Memory that several tensors of a graph share, made functional.

A tensor that views another sees what is written there. So each tensor of an exported graph has a
handle: whose memory it is, and by which views it is seen. A write gives the whole memory another
value, by the inverse of the views; who reads it later through views of its own takes them anew.

Source: functionalization in PyTorch, `aten/src/ATen/FunctionalInverses.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from cgo.errors import CaptureError
from cgo.graph import Argument, Ref, Symbol


@dataclass(frozen=True)
class View:
    """One call that gives a view: of its first argument, and which of its results."""

    op: str
    args: tuple[Argument, ...]  # behind the first
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    index: int | None = None  # of a list of results
    detached: bool = False  # no gradient goes through it


@dataclass(eq=False)
class Memory:
    """What is written once is seen by all handles.

    What is fixed must not be written: a tensor that the module keeps beside parameters and buffers
    would be another one at the next call.
    """

    value: Ref
    version: int = 0
    fixed: bool = False


@dataclass(eq=False)
class Handle:
    """A tensor of the exported graph: some memory, seen through views."""

    memory: Memory
    views: tuple[View, ...] = ()
    ref: Ref | None = None  # its value at that version of the memory
    version: int = 0


class Writer(Protocol):
    """What nodes are emitted with."""

    def emit(self, op: str, *args: Argument, name: str | None = None, **kwargs: Argument) -> Any:
        """Append a node; its reference, or a tuple of several."""

    def detach(self, ref: Ref) -> Ref:
        """The value without its gradient."""

    def fake(self, ref: Argument) -> Tensor:
        """The fake tensor behind a reference."""

    def attached(self) -> AbstractContextManager[None]:
        """Emit nodes through which gradients go, wherever the module is."""


def read(handle: Handle, writer: Writer) -> Ref:
    """The present value of a tensor."""
    memory = handle.memory
    if handle.ref is None or handle.version != memory.version:
        value = memory.value
        for view in handle.views:
            value = _apply(view, value, writer)
        handle.ref, handle.version = value, memory.version
    return handle.ref


def write(handle: Handle, value: Ref, writer: Writer, *, detached: bool) -> None:
    """Give a tensor another value, and with it all that share its memory.

    Args:
        handle: The tensor that is written.
        value: Of its shape; another dtype is cast, as in-place operators do.
        writer: Emits nodes.
        detached: Autograd does not see the write: gradients go on as if the memory had held this
            from the beginning.

    Raises:
        CaptureError: a view in between has no inverse.
    """
    memory = handle.memory
    value = _like(read(handle, writer), value, writer)
    seen, whole = [memory.value], value
    for view in handle.views[:-1]:
        seen.append(_apply(view, seen[-1], writer))
    for view, base in zip(reversed(handle.views), reversed(seen)):
        whole = _put_back(view, base, whole, writer)
    hidden = detached or any(view.detached for view in handle.views)
    if hidden and writer.fake(memory.value).requires_grad:
        whole = _unseen(memory.value, whole, writer)
    memory.value, memory.version = whole, memory.version + 1
    if not handle.views:
        value = whole
    handle.ref, handle.version = value, memory.version


def _like(old: Ref, new: Ref, writer: Writer) -> Ref:
    was, now = writer.fake(old), writer.fake(new)
    if was.dtype != now.dtype:
        dtype = Symbol("dtype", str(was.dtype).removeprefix("torch."))
        new = writer.emit("aten.to.dtype", new, dtype)
    if was.shape != now.shape:
        new = writer.emit("aten.expand.default", new, tuple(was.shape))
    return new


def _unseen(old: Ref, new: Ref, writer: Writer) -> Ref:
    """The new value with the gradient of the old: new + (old - old), whose bits are the new's."""
    with writer.attached():
        nothing = writer.emit("aten.sub.Tensor", old, writer.detach(old))
        found: Ref = writer.emit("aten.add.Tensor", writer.detach(new), nothing)
        return found


def _apply(view: View, base: Ref, writer: Writer) -> Ref:
    found = writer.emit(view.op, base, *view.args, **view.kwargs)
    found = found if view.index is None else found[view.index]
    assert isinstance(found, Ref)
    return writer.detach(found) if view.detached else found


#: Emits what a base becomes when one view of it has become `part`.
_Inverse = Callable[[Writer, View, Ref, Ref], Ref]


def _put_back(view: View, base: Ref, part: Ref, writer: Writer) -> Ref:
    name = view.op.split(".")[1]
    inverse = _INVERSES.get(name)
    if inverse is None:
        raise CaptureError(f"a write through {view.op}, a view that cannot be undone")
    return inverse(writer, view, base, part)


def _same(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    return part


def _reshaped(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    found: Ref = writer.emit("aten.reshape.default", part, tuple(writer.fake(base).shape))
    return found


def _transposed(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    dims = view.args or (-2, -1)
    if writer.fake(base).dim() < 2:
        return part
    found: Ref = writer.emit("aten.transpose.int", part, *dims)
    return found


def _permuted(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    (dims,) = view.args
    assert isinstance(dims, tuple)
    order = [int(d) % len(dims) for d in dims]  # type: ignore[arg-type]
    back = tuple(order.index(i) for i in range(len(order)))
    found: Ref = writer.emit("aten.permute.default", part, back)
    return found


def _selected(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    dim, index = view.args
    found: Ref = writer.emit("aten.select_scatter.default", base, part, dim, index)
    return found


def _sliced(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    given = (*view.args, *(0, None, None, 1)[len(view.args) :])
    return _scatter(writer, base, part, *given)


def _narrowed(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    dim, start, length = view.args
    assert isinstance(start, int)
    assert isinstance(length, int)
    return _scatter(writer, base, part, dim, start, start + length)


def _scatter(writer: Writer, base: Ref, part: Ref, *where: Argument) -> Ref:
    found: Ref = writer.emit("aten.slice_scatter.default", base, part, *where)
    return found


def _unbound(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    dim = view.args[0] if view.args else 0
    found: Ref = writer.emit("aten.select_scatter.default", base, part, dim, view.index)
    return found


def _split(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    """One of several slices; where it begins follows from those before."""
    dim = next(iter(view.args[1:]), view.kwargs.get("dim", 0))
    assert isinstance(dim, int)
    assert view.index is not None
    before = writer.emit(view.op, base, *view.args, **view.kwargs)[: view.index]
    start = sum(writer.fake(ref).shape[dim] for ref in before)
    return _scatter(writer, base, part, dim, start, start + writer.fake(part).shape[dim])


def _diagonal(writer: Writer, view: View, base: Ref, part: Ref) -> Ref:
    found: Ref = writer.emit("aten.diagonal_scatter.default", base, part, *view.args, **view.kwargs)
    return found


def _table(rows: Sequence[tuple[str, _Inverse]]) -> dict[str, _Inverse]:
    return {name: inverse for names, inverse in rows for name in names.split()}


_INVERSES = _table(
    [
        ("alias detach view_as contiguous to type_as lift lift_fresh dropout feature_dropout "
         "alpha_dropout expand_as clone positive", _same),
        ("view _unsafe_view reshape reshape_as flatten unflatten ravel squeeze unsqueeze",
         _reshaped),
        ("transpose t swapaxes swapdims mT numpy_T", _transposed),
        ("permute", _permuted),
        ("select", _selected),
        ("slice", _sliced),
        ("narrow", _narrowed),
        ("unbind", _unbound),
        ("split split_with_sizes chunk tensor_split", _split),
        ("diagonal", _diagonal),
    ]
)  # fmt: skip
