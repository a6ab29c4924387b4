"""What forms build with: groups by columns, packed values, and the graph that is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from cgo.graph import Argument, Node, Ref, Symbol, TensorType
from cgo.operators import aten, named_arguments
from cgo.runtime.layouts import (
    IMAGES,
    channels_last,
    contiguous,
    gather,
    keep_images,
    to_channels,
    to_stacked,
    unstack,
)
from cgo.runtime.operators import symbol_value
from cgo.runtime.unsafe import needs_contiguous
from cgo.tuning import CHANNELS, STACKED

#: The value of a reference, as its own tensor or as a lane.
Types = Mapping[Ref, "TensorType | None"]


@dataclass(eq=False)
class Packed:
    """A value of a whole group: one tensor that holds every member's."""

    node: fx.Node
    layout: str
    refs: tuple[Ref, ...] = ()  # whose lanes they are, once it is somebody's value
    lanes: list[fx.Node] | None = None  # made when one is asked for


@dataclass(frozen=True)
class Column:
    """One tensor argument of a group: a reference for each member."""

    refs: tuple[Ref, ...]
    type: TensorType

    @property
    def shared(self) -> bool:
        """Whether all members read the same value."""
        return len(set(self.refs)) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """One member's shape."""
        return self.type.shape

    @property
    def ndim(self) -> int:
        """One member's number of dimensions."""
        return len(self.type.shape)


@dataclass(frozen=True)
class Group:
    """Nodes of one signature. `arguments` are by name, defaults filled in; tensors as columns."""

    nodes: tuple[Node, ...]
    arguments: Mapping[str, Any]

    @property
    def size(self) -> int:
        """M, the number of members."""
        return len(self.nodes)

    @property
    def types(self) -> tuple[TensorType | None, ...]:
        """What each member gives."""
        return self.nodes[0].types

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each member's first output."""
        type_ = self.types[0]
        assert type_ is not None
        return type_.shape

    @property
    def columns(self) -> list[Column]:
        """The tensor arguments, in order."""
        found: list[Column] = []
        pending = list(self.arguments.values())
        while pending:
            value = pending.pop(0)
            if isinstance(value, Column):
                found.append(value)
            elif isinstance(value, tuple):
                pending = [*value, *pending]
        return found

    @property
    def operator(self) -> str:
        """The operator without its overload."""
        return operator_of(self.nodes[0])

    def refs(self, output: int) -> tuple[Ref, ...]:
        """The members' references to one output."""
        return tuple(Ref(node.name, output) for node in self.nodes)


def operator_of(node: Node) -> str:
    """A node's operator without its overload: "aten.linear"."""
    return node.op.rpartition(".")[0] if node.op.startswith("aten.") else node.op


class Emitter:
    """Writes one region of a program as a `torch.fx` graph."""

    def __init__(
        self,
        device: torch.device,
        types: Types,
        readers: Counter[Ref],
        images_last: bool = False,
    ) -> None:
        self.graph = fx.Graph()
        self.device = device
        self.types = types
        self.readers = readers
        self.images_last = images_last  # convolutions have channels last in memory
        self.written: set[Ref] = set()  # updates that are written in place into their buffers
        self.sources: set[int] = set()  # ids of packed values that are leaves handed in
        self.preferred: str | None = None  # layout of the group that is being written
        self.leaving = False  # what is being written makes no images of images
        self.gathers = 0  # times that members' values were copied together
        self._plain: dict[Ref, fx.Node] = {}
        self._lane: dict[Ref, tuple[Packed, int]] = {}
        self._whole: dict[tuple[Ref, ...], Packed] = {}
        self._images: dict[fx.Node, fx.Node] = {}
        self._made: dict[tuple[tuple[Ref, ...], str], fx.Node] = {}

    # --- values ---------------------------------------------------------------------------------

    def set(self, ref: Ref, node: fx.Node) -> None:
        """Make `node` the value of a reference."""
        self._plain[ref] = node

    def set_packed(self, refs: Sequence[Ref], value: Packed) -> None:
        """Make the lanes of `value` the values of references."""
        value.refs = tuple(refs)
        self._whole[value.refs] = value
        for lane, ref in enumerate(refs):
            self._lane[ref] = (value, lane)

    def value(self, ref: Ref) -> fx.Node:
        """A member's own tensor."""
        if ref not in self._plain:
            packed, lane = self._lane[ref]
            if packed.lanes is None:
                packed.lanes = self._split(packed)
            self._plain[ref] = packed.lanes[lane]
        return self._plain[ref]

    def _split(self, packed: Packed) -> list[fx.Node]:
        several = self.call(unstack, self._converted(packed, STACKED))
        return [self.call(item, several, lane) for lane in range(len(packed.refs))]

    def whole(self, refs: Sequence[Ref]) -> Packed | None:
        """The packed value whose lanes are exactly these, in order."""
        return self._whole.get(tuple(refs))

    def packed(self, ref: Ref) -> Packed | None:
        """The packed value that a reference is a lane of."""
        found = self._lane.get(ref)
        return None if found is None else found[0]

    def stacked(self, column: Column) -> fx.Node:
        """All members' tensors as (M, ...); a shared one is expanded, without a copy."""
        if column.shared:
            return self.call(expand_first, self.value(column.refs[0]), len(column.refs))
        return self._gathered(column, STACKED)

    def leading(self, column: Column, ndim: int | None = None) -> fx.Node:
        """(M, ...) or, of a shared one, (1, ...): broadcasts over the members.

        With `ndim`, one member's shape is padded with ones on the left to that many dimensions.
        """
        shared = column.shared
        node = self.value(column.refs[0]) if shared else self._gathered(column, STACKED)
        missing = 0 if ndim is None else ndim - column.ndim
        if not shared and not missing:
            return node
        shape = (1 if shared else len(column.refs), *[1] * missing, *column.shape)
        return self.call(torch.reshape, node, shape)

    def channels(self, column: Column) -> fx.Node:
        """All members' tensors side by side along axis 1: (N, M*C, ...)."""
        if column.shared:
            return self.call(torch.cat, [self.value(column.refs[0])] * len(column.refs), 1)
        return self._gathered(column, CHANNELS)

    def joined(self, column: Column) -> fx.Node:
        """All members' tensors end to end along axis 0, as weights (M*O, ...) want it."""
        return self.call(torch.flatten, self.stacked(column), 0, 1)

    def optional(self, value: Column | None) -> fx.Node | None:
        """`joined`, or None for None."""
        return None if value is None else self.joined(value)

    def layout_of(self, column: Column) -> str | None:
        """How the column's value is packed already; None where it would have to be gathered."""
        whole = self._whole.get(column.refs)
        return None if whole is None else whole.layout

    def wants_channels(self, column: Column) -> bool:
        """Whether a form that takes either layout is to have the column in channels.

        Where nothing else was chosen: if it is packed so already; lanes are stacked at less cost.
        """
        if column.shared or column.ndim < 2:
            return False
        return (self.preferred or self.layout_of(column)) == CHANNELS

    def is_leaf(self, column: Column) -> bool:
        """Whether the column is a packed parameter or buffer that nothing else reads."""
        whole = self._whole.get(column.refs)
        alone = all(self.readers[ref] == 1 for ref in column.refs)
        return whole is not None and id(whole) in self.sources and alone

    def _gathered(self, column: Column, layout: str) -> fx.Node:
        key = column.refs, layout
        if key not in self._made:
            self._made[key] = self._gather(column, layout)
        return self.leaving_images(self._made[key], column.ndim)

    def _gather(self, column: Column, layout: str) -> fx.Node:
        whole = self._whole.get(column.refs)
        if whole is not None:
            return self._converted(whole, layout)
        self.gathers += 1
        return self.call(gather, [self.value(ref) for ref in column.refs], layout)

    def _converted(self, packed: Packed, layout: str) -> fx.Node:
        if packed.layout == layout:
            return packed.node
        key = packed.refs, layout
        if key not in self._made:
            convert = to_channels if layout == CHANNELS else to_stacked
            self._made[key] = self.call(convert, packed.node, len(packed.refs))
        return self._made[key]

    def images(self, node: fx.Node) -> fx.Node:
        """A convolution's input or result in the memory format that it is to have."""
        if not self.images_last:
            return node
        if node not in self._images:
            self._images[node] = self.call(channels_last, node)
        return self._images[node]

    def convolved(self, node: fx.Node, group: Group, groups: int) -> fx.Node:
        """The input of a convolution with so many groups, in the memory format that it is to have.

        The format is ours to choose where images have channels last; elsewhere it is the model's.
        """
        type_ = group.types[0]
        dtype = "" if type_ is None else type_.dtype
        on_cpu = self.images_last and self.device.type == "cpu"
        if on_cpu and needs_contiguous(group.operator, group.arguments, groups, dtype):
            return self.call(contiguous, self.call(keep_images, node))
        return self.images(node) if group.arguments["input"].ndim == IMAGES else node

    def leaving_images(self, node: fx.Node, ndim: int) -> fx.Node:
        """An argument; if the node that reads it makes no images of images, see `keep_images`."""
        return self.call(keep_images, node) if self.leaving and ndim == IMAGES else node

    # --- writing ----------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call."""
        return self.graph.call_function(function, args, kwargs)

    def outputs(self, group: Group, result: fx.Node, layout: str) -> list[Packed]:
        """What a call gave: one packed value, or one for each output of the operator."""
        if len(group.types) == 1 and not returns_list(group.nodes[0]):
            return [Packed(result, layout)]
        several = range(len(group.types))
        return [Packed(self.call(item, result, index), layout) for index in several]

    def literals(self, group: Group, *without: str) -> dict[str, Any]:
        """The group's literal arguments by name, as torch takes them, but for some."""
        return {
            name: self.literal(value)
            for name, value in group.arguments.items()
            if name not in without and not isinstance(value, Column)
        }

    def literal(self, value: Any) -> Any:
        """A literal as torch takes it."""
        if isinstance(value, Symbol):
            return symbol_value(value, self.device)
        if isinstance(value, tuple):
            return [self.literal(item) for item in value]
        return value


def make_group(nodes: Sequence[Node], types: Types) -> Group:
    """Arrange a group's arguments by name and column."""
    args = tuple(_transpose(values, types) for values in zip(*(node.args for node in nodes)))
    kwargs = {
        key: _transpose([dict(node.kwargs)[key] for node in nodes], types)
        for key, _ in nodes[0].kwargs
    }
    return Group(tuple(nodes), named_arguments(nodes[0].op, args, kwargs))


def _transpose(values: Sequence[Argument], types: Types) -> Any:
    first = values[0]
    if type(first) is Ref:
        type_ = types[first]
        assert type_ is not None
        return Column(tuple(values), type_)  # type: ignore[arg-type]
    if type(first) is tuple:
        return tuple(_transpose(items, types) for items in zip(*values))  # type: ignore[arg-type]
    return first


def returns_list(node: Node) -> bool:
    """Whether an operator returns its outputs in a list, even a single one (`split`)."""
    overload = aten(node.op)
    return overload is not None and str(overload._schema.returns[0].type).startswith("List")


def runs(nodes: Sequence[Node]) -> list[list[Node]]:
    """Neighbours of one group together; nodes without a group each by itself."""
    found: list[list[Node]] = []
    for name, neighbours in groupby(nodes, key=lambda node: node.group):
        members = list(neighbours)
        found += [members] if name is not None else [[node] for node in members]
    return found


def item(values: Sequence[Tensor], index: int) -> Tensor:
    """One of several results."""
    return values[index]


def expand_first(value: Tensor, size: int) -> Tensor:
    """(...) to (M, ...), without a copy."""
    return value.unsqueeze(0).expand(size, *value.shape)
