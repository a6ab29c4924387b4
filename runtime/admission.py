"""Which models of a document can run at all, found out before any of them takes memory.

Every operator is called once on tensors without elements: it must take its arguments, give what the
document says, and stay within limits. So what runs later has the shapes that were planned with, and
a document cannot ask for more than a device has by an argument that no type shows (a kernel, a
number of repetitions). What is refused is a model, with the node as the reason; its neighbours
train.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cgo.dtypes import torch_dtype
from cgo.errors import GraphDataError
from cgo.graph import (
    SOURCES,
    STATE,
    Argument,
    Graph,
    ModelId,
    Node,
    Output,
    Ref,
    Symbol,
    TensorType,
    homes,
    inputs_of,
    restrict,
)
from cgo.graph_data import GraphData
from cgo.limits import storage_elements
from cgo.operators import aten
from cgo.passes.sharing import argument_key
from cgo.passes.work import is_view
from cgo.private.fake_tensors import FakeTensorMode
from cgo.runtime.operators import filler, symbol_value
from cgo.runtime.precision import autocasting
from cgo.runtime.unchecked import refusal
from cgo.runtime.watching import Limits, Refused, Watch
from cgo.text import printable

_CPU = torch.device("cpu")

#: Characters of torch's reason that are kept.
_MOST_REASON = 300


def admit(
    data: GraphData,
    constants: Mapping[str, Tensor],
    limits: Limits,
    *,
    vouched: bool = False,
) -> tuple[GraphData, dict[ModelId, str]]:
    """Leave out the models of a document that cannot run.

    Args:
        data: The document.
        constants: Tensors that the graph refers to by content.
        limits: On each operator.
        vouched: Who gives the document has run its operators, as capturing them does, so that they
            need not be tried; their sizes are looked at all the same.

    Returns:
        The document without them (the same object where all can run), and why not, by model.

    Raises:
        GraphDataError: members of one group do not do the same work.
    """
    _check_groups(data.graph)
    refused = _Admission(data, constants, limits, vouched).refused()
    if not refused:
        return data, {}
    kept = tuple(model for model in data.models if model.id not in refused)
    ids = {model.id for model in kept}
    graph = restrict(data.graph, models=ids)
    aliases = {alias: twin for alias, twin in data.aliases.items() if twin in ids}
    return replace(data, models=kept, graph=graph, aliases=aliases), refused


def _check_groups(graph: Graph) -> None:
    nodes = {node.name: node for node in graph.nodes}
    first: dict[str, tuple[Node, object]] = {}
    for node in graph.nodes:
        if node.group is None:
            continue
        own = _work(node, nodes)
        other, known = first.setdefault(node.group, (node, own))
        if own != known:
            raise GraphDataError(
                f"%{node.name} and %{other.name} are of one group {node.group!r}, and differ in "
                "arguments, shapes or what is trained; group them separately"
            )


def _work(node: Node, nodes: Mapping[str, Node]) -> object:
    """Equal for nodes whose work one operator may do; `passes.batch_operators` groups by more."""
    refs: list[Ref] = []
    arguments = argument_key(node.args, refs), argument_key(node.kwargs, refs)
    read = [(nodes[ref.name], nodes[ref.name].types[ref.index]) for ref in refs]
    inputs = [
        (source.op if source.op in SOURCES else "", source.keyword("trainable"), _plain(type_))
        for source, type_ in read
    ]
    return node.op, node.autocast, arguments, inputs, [_plain(type_) for type_ in node.types]


def _plain(type_: TensorType | None) -> tuple[str, tuple[int, ...]] | None:
    """A type without strides, in which members of a group may differ."""
    return None if type_ is None else (type_.dtype, type_.shape)


class _Admission:
    def __init__(
        self,
        data: GraphData,
        constants: Mapping[str, Tensor],
        limits: Limits,
        vouched: bool,
    ) -> None:
        self._data, self._constants, self._limits = data, constants, limits
        self._vouched = vouched
        self._nodes = {node.name: node for node in data.graph.nodes}
        self._calls = Calls(limits)

    def refused(self) -> dict[ModelId, str]:
        """Why models cannot run; the first reason of each."""
        found: dict[ModelId, str] = {}
        for model, reason in (*self._nodes_refused(), *self._outputs_refused(), *self._too_large()):
            found.setdefault(model, printable(reason))
        return found

    # --- nodes --------------------------------------------------------------------------------

    def _nodes_refused(self) -> Iterator[tuple[ModelId, str]]:
        for node in self._data.graph.nodes:
            if (reason := self._reason(node)) is not None:
                yield from ((owner, f"%{node.name}: {reason}") for owner in node.owners)

    def _reason(self, node: Node) -> str | None:
        """Why a node cannot be computed, or None."""
        if node.op in SOURCES:
            return self._source_reason(node)
        if node.op == "cgo.random":
            return _random_reason(node) or self._calls.size_reason(node.types)
        if self._vouched:
            return self._calls.size_reason(node.types)
        given = [self._nodes[ref.name].types[ref.index] for ref in inputs_of(node)]
        return self._calls.reason(node, given)

    def _source_reason(self, node: Node) -> str | None:
        type_ = node.types[0]
        if node.op == "cgo.constant":
            value = self._constants.get(str(node.keyword("content")))
            if value is None:
                return "the file of constants does not hold it"
            if type_ is None or _differs(value, type_, dtypes=True):
                return f"{_described(value)}, and not {_shown(type_)}"
        return self._calls.size_reason(node.types)

    # --- outputs ------------------------------------------------------------------------------

    def _outputs_refused(self) -> Iterator[tuple[ModelId, str]]:
        captured = {model.id for model in self._data.models if model.opaque is None}
        losses = {output.model for output in self._data.graph.outputs if output.role == "loss"}
        for model in sorted(captured - losses):
            yield model, "the document has neither a loss of it nor a reason why it has none"
        for output in self._data.graph.outputs:
            if output.model not in captured:
                yield output.model, "an opaque model has no outputs"
            elif (reason := self._output_reason(output)) is not None:
                yield (
                    output.model,
                    f"{output.role} of {output.program}, %{output.ref.name}: {reason}",
                )

    def _output_reason(self, output: Output) -> str | None:
        type_ = self._nodes[output.ref.name].types[output.ref.index]
        if type_ is None:
            return "no tensor"
        if output.role == "loss" and (
            math.prod(type_.shape) != 1 or not torch_dtype(type_.dtype).is_floating_point
        ):
            return f"{_shown(type_)} is no floating-point scalar"
        return None

    # --- models -------------------------------------------------------------------------------

    def _too_large(self) -> Iterator[tuple[ModelId, str]]:
        """Models whose values, each of which would fit, are far more together than memory."""
        sizes: dict[tuple[ModelId, str], int] = {}
        for node in self._data.graph.nodes:
            if node.op in STATE:
                # State is there in all programs, but belongs to none.
                places = [(model, "") for model, _ in homes(node)]
            else:
                places = [(owner, node.name.split("/")[1]) for owner in node.owners]
            size = 0 if is_view(node.op) else sum(map(_storage_bytes, node.types))
            for place in places:
                sizes[place] = sizes.get(place, 0) + size
        for (model, split), size in sizes.items():
            if size > self._limits.graph_bytes:
                most = f"{self._limits.graph_bytes:,.0f}"
                yield (
                    model,
                    f"{split or 'its state'}: {size:,} bytes in all; at most {most} are taken",
                )


#: Operators whose results torch finds only by running them, on zeros; none makes more than it is
#: given, by the rules of `cgo.runtime.unchecked`. Others without a shape function are refused.
_RUN_FOR_SHAPES = re.compile(
    r"aten\.(fake_quantize_\w+|histogram|histogramdd|geqrf|native_norm|glu_jvp|_add_relu|_aminmax"
    r"|_logcumsumexp|_masked_softmax)\.\w+"
)


@cache
def _fakes(run: bool) -> FakeTensorMode:
    """Made once, where it is needed: the first imports torch's compiler."""
    return FakeTensorMode(allow_fallback_kernels=run)


class Calls:
    """Whether operators can be called as nodes say, tried on tensors without elements."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[object, str | None] = {}  # reasons, by what a call depends on

    def reason(self, node: Node, given: Sequence[TensorType | None]) -> str | None:
        """Why a node cannot be computed from values of these types, or None."""
        refs: list[Ref] = []
        arguments = argument_key(node.args, refs), argument_key(node.kwargs, refs)
        key = (node.op, node.autocast, node.types, arguments, tuple(given))
        if key not in self._known:
            self._known[key] = self._call_reason(node, given)
        return self._known[key]

    def size_reason(self, types: Sequence[TensorType | None]) -> str | None:
        """Why values of these types are too large together, or None."""
        size = sum(map(_storage_bytes, types))
        if size > self._limits.tensor_bytes:
            return f"{size:,} bytes; at most {self._limits.tensor_bytes:,.0f} are taken"
        return None

    def _call_reason(self, node: Node, given: Sequence[TensorType | None]) -> str | None:
        if any(type_ is None for type_ in given):
            return "reads a value that is no tensor"
        if (reason := self.size_reason([*given, *node.types])) is not None:
            return reason
        try:
            if (reason := refusal(node, given)) is not None:
                return reason
            result = self.results(node, given)
        except Refused as error:
            return f"{node.op}: {error}"
        except Exception as error:  # whatever torch has against the arguments
            text = printable(str(error).partition("\n")[0], _MOST_REASON)
            return f"{node.op} cannot be called so: {type(error).__name__}: {text}"
        return _result_reason(node, result)

    def results(self, node: Node, given: Sequence[TensorType | None]) -> tuple[Any, ...]:
        """What the operator gives for tensors without elements; raises what torch does.

        Raises:
            Refused: it would take more than the limits, or draw random numbers.
        """
        fakes = _fakes(bool(_RUN_FOR_SHAPES.fullmatch(node.op)))
        with silent(), torch.no_grad(), fakes:
            args, kwargs = torch_arguments(node, [_fake(type_) for type_ in given])
            watch = Watch(self._limits)
            with autocasting(node.autocast, _CPU), watch:
                if node.op == "cgo.batch_norm":
                    return _batch_norm(*args, **kwargs)
                result = aten(node.op)(*args, **kwargs)  # type: ignore[misc]
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep torch's own account of a call that fails off the terminal: the reason tells it."""
    chatty = logging.getLogger("torch._subclasses.fake_tensor")
    level = chatty.level
    chatty.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.setLevel(level)


def _storage_bytes(type_: TensorType | None) -> int:
    if type_ is None:
        return 0
    return storage_elements(type_.shape, type_.stride) * torch_dtype(type_.dtype).itemsize


def _fake(type_: TensorType | None) -> Tensor:
    assert type_ is not None
    dtype = torch_dtype(type_.dtype)
    if type_.stride is None:
        return torch.empty(type_.shape, dtype=dtype)
    return torch.empty_strided(type_.shape, type_.stride, dtype=dtype)


def torch_arguments(node: Node, read: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """A node's arguments as torch takes them, with `read` for its references in order."""
    rest = iter(read)
    args = [_value(argument, rest) for argument in node.args]
    return args, {key: _value(value, rest) for key, value in node.kwargs}


def _value(argument: Argument, rest: Iterator[Tensor]) -> Any:
    """An argument as torch takes it, its references replaced in order."""
    if isinstance(argument, Ref):
        return next(rest)
    if isinstance(argument, Symbol):
        return symbol_value(argument, _CPU)
    if isinstance(argument, tuple):
        return [_value(item, rest) for item in argument]
    return argument


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    """Its own operator has no schema to be checked by: only floats, and statistics by channel."""
    if type(momentum) is not float or type(eps) is not float:
        raise TypeError(f"momentum {momentum!r} and eps {eps!r} have to be floats")
    if any(not isinstance(value, Tensor) or value.shape != x.shape[1:2] for value in (mean, var)):
        raise ValueError("running statistics have one element a channel")
    given = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, False)
    return given, mean, var


def _result_reason(node: Node, result: Sequence[Any]) -> str | None:
    """How what an operator gives differs from what the document says."""
    if len(result) != len(node.types):
        return f"{node.op} gives {len(result)} values, the document has {len(node.types)}"
    for value, type_ in zip(result, node.types):
        if isinstance(value, Tensor) != (type_ is not None):
            return f"{node.op} gives {_described(value)}, the document has {_shown(type_)}"
        # What autocast gives depends on the device; shapes do not.
        if type_ is not None and _differs(value, type_, dtypes=node.autocast is None):
            return f"{node.op} gives {_described(value)}, the document has {_shown(type_)}"
    return None


def _differs(value: Tensor, type_: TensorType, *, dtypes: bool) -> bool:
    same = tuple(value.shape) == type_.shape
    return not same or (dtypes and value.dtype is not torch_dtype(type_.dtype))


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _shown(type_: TensorType | None) -> str:
    return "no tensor" if type_ is None else f"{type_.dtype} {list(type_.shape)}"


def _random_reason(node: Node) -> str | None:
    """Draw two numbers: whatever the distribution's arguments are wrong in, they are in that."""
    type_ = node.types[0]
    assert type_ is not None
    try:
        if type_.stride is not None and _overlaps(type_):
            raise ValueError(f"strides {list(type_.stride)} give elements one place in memory")
        few = torch.empty(2, dtype=torch_dtype(type_.dtype))
        filler(node)(few, torch.Generator())
    except Exception as error:
        text = printable(str(error).partition("\n")[0], _MOST_REASON)
        return f"random numbers cannot be drawn so: {type(error).__name__}: {text}"
    return None


def _overlaps(type_: TensorType) -> bool:
    """Whether elements share memory: writing one would write another."""
    assert type_.stride is not None
    reach = 1
    for step, size in sorted(zip(type_.stride, type_.shape)):
        if size > 1:
            if step < reach:
                return True
            reach = step * (size - 1) + reach
    return False
