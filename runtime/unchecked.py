"""What torch does not check before it does harm: crashes, endless memory, reads beside memory.

Each rule is about a kind of call that passes torch's own checks on tensors without elements, and
then ends the process or fills it. They were found by calling each operator with drawn arguments
(`tests/test_fuzz.py`), and on older versions of torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

from cgo.dtypes import torch_dtype
from cgo.graph import Argument, Node, Symbol, TensorType
from cgo.limits import MOST_OUTPUTS, storage_elements
from cgo.operators import aten, named_arguments
from cgo.private.operators import OpOverload


def refusal(node: Node, given: Sequence[TensorType | None]) -> str | None:
    """Why a call would do harm before torch objects to it, or None.

    Args:
        node: The call. Our own operators are no matter of this.
        given: Types of what it reads, in the order of its arguments.
    """
    overload = aten(node.op)
    if overload is None:
        return None
    arguments = list(_arguments(overload, node))
    found = (reason for rule in _RULES for reason in rule(node, arguments, given))
    return next((f"{node.op}: {reason}" for reason in found), None)


#: What a node gives, each with its place in the schema.
Arguments = Sequence[tuple[Any, Argument]]


def _arguments(overload: OpOverload, node: Node) -> Iterator[tuple[Any, Argument]]:
    arguments = overload._schema.arguments
    yield from zip(arguments, node.args)
    keywords = {argument.name: argument for argument in arguments}
    yield from ((keywords[key], value) for key, value in node.kwargs if key in keywords)


#: Places of a histogram.
_MOST_BINS = 2**24

Rule = Callable[[Node, Arguments, Sequence[TensorType | None]], Iterator[str]]


def _empty_lists(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """Operators on lists of tensors look at the first one, whether there is one or not."""
    for argument, value in arguments:
        if value == () and "List[Tensor]" in str(argument.type):
            yield f"no tensors in {argument.name}"


#: Kinds of our symbols by torch's types, which take any number and look it up without a check.
_ENUMERATIONS = {"ScalarType": "dtype", "Layout": "layout", "MemoryFormat": "memory_format"}


def _numbers_for_symbols(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """What is one of torch's constants is written as one."""
    for argument, value in arguments:
        kind = _ENUMERATIONS.get(re.sub(r"Optional\[(.*)\]", r"\1", str(argument.real_type)))
        if kind is None or value is None:
            continue
        if not isinstance(value, Symbol) or value.kind != kind:
            yield f"{argument.name} {value!r:.60} is no {kind}"


#: Arguments by which convolutions and pooling are known from other operators with strides.
_WINDOWS = {"kernel_size", "padding", "dilation", "output_padding"}


def _wide_windows(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """Kernels keep what lies between two positions in 32 bits; torch 2.9 divides by what is left.

    More makes no difference: no tensor is so long.
    """
    if _WINDOWS.isdisjoint(argument.name for argument, _ in arguments):
        return
    for argument, value in arguments:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(type(number) is int and abs(number) >= 2**31 for number in numbers):
            yield f"{argument.name} {value!r:.60} is beyond 32 bits"


#: Arguments of which as many tensors, or times their elements, are made before a look at them.
_COUNTS = {"sections", "chunks", "r"}
_GAMMA = re.compile(r"aten\.(mvlgamma|special_multigammaln)\.\w+")


def _many_parts(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    counts = {"p"} if _GAMMA.fullmatch(node.op) else _COUNTS
    for argument, value in arguments:
        if argument.name in counts and type(value) is int and value > MOST_OUTPUTS:
            yield f"{argument.name} {value:,}; at most {MOST_OUTPUTS:,} are taken"


def _no_groups(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """Shuffles of channels divide by the number of groups, up to torch 2.11 before a look at it."""
    for argument, value in arguments:
        if argument.name == "groups" and type(value) is int and value < 1:
            yield f"groups {value}"


def _many_bins(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """Histograms have one place for each combination of bins, which no shape function counts."""
    bins = next((value for argument, value in arguments if argument.name == "bins"), None)
    if not node.op.startswith("aten.histogram") or not given or not given[0].shape:
        return
    each = bins if isinstance(bins, tuple) else (bins,)
    if not _are_numbers(each) or min(each, default=1) < 1:
        return  # tensors of edges, or torch's to refuse
    several = node.op == "aten.histogramdd.int_bins"
    dimensions = given[0].shape[-1] if several else 1
    if dimensions * sum(map(math.log2, each)) > math.log2(_MOST_BINS):
        yield f"bins {bins!r:.60}; at most {_MOST_BINS:,} are taken in all"


def _vanishing_steps(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """`range` divides by its step as an integer where that is its dtype."""
    named = {argument.name: value for argument, value in arguments}
    step, dtype = named.get("step", 1), named.get("dtype")
    if not node.op.startswith("aten.range.") or not isinstance(dtype, Symbol):
        return
    whole = not torch_dtype(dtype.value).is_floating_point
    if whole and isinstance(step, (int, float)) and abs(step) < 1:
        yield f"step {step} is none in {dtype.value}"


def _fourier_dimensions(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """The operators inside Fourier transforms take what the outer ones have checked."""
    if not node.op.startswith("aten._fft_"):
        return
    named = {argument.name: value for argument, value in arguments}
    dim, normalization = named.get("dim"), named.get("normalization")
    rank = len(given[0].shape)
    if not _are_numbers(dim) or sorted(set(dim) & set(range(rank))) != sorted(dim) or not dim:
        yield f"dim {dim!r:.60} of {rank} dimensions"
    if normalization not in (0, 1, 2):
        yield f"normalization {normalization!r:.60}"


def _empty_norms(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """The fused weight norm writes norms of what has no elements."""
    if node.op == "aten._weight_norm.default" and any(0 in type_.shape for type_ in given):
        yield "no elements"


def _far_strides(node: Node, arguments: Arguments, given: Sequence[Any]) -> Iterator[str]:
    """What looks at memory by strides must look at its argument's: compiled code does not check."""
    if not node.op.startswith("aten.as_strided"):
        return
    named = named_arguments(node.op, node.args, dict(node.kwargs))
    size, stride = named.get("size"), named.get("stride")
    if not (_are_numbers(size) and _are_numbers(stride)):
        yield f"size {size!r:.60} and stride {stride!r:.60} are no lists of numbers"
        return
    start, first = named.get("storage_offset") or 0, given[0]
    if len(size) != len(stride) or min((*size, *stride, start), default=0) < 0:
        yield f"size {list(size)}, stride {list(stride)}, offset {start}"
        return
    reach = start + storage_elements(size, stride)
    there = storage_elements(first.shape, first.stride)
    if reach > there:
        yield f"reaches over {reach:,} of {there:,} elements"


def _are_numbers(value: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(item) is int for item in value)


_RULES: tuple[Rule, ...] = (
    _empty_lists, _numbers_for_symbols, _wide_windows, _many_parts, _many_bins, _no_groups,
    _vanishing_steps, _fourier_dimensions, _empty_norms, _far_strides,
)  # fmt: skip
