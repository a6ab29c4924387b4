"""A step as a tape: the ATen calls of forward and backward, recorded once and replayed.

A program of hundreds of small operators pays more for calling them than for computing: Python
dispatches each, autograd writes down each, and its engine finds its way back. All of that is the
same at every step, as shapes do not change. So one step is watched below autograd, call by call;
what it called, in order and with the same arguments, is the step. TorchScript's interpreter, which
is part of torch, replays it without Python and without autograd.

`cgo.runtime.taped` decides when a step is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cgo.errors import CgoError
from cgo.operators import draws
from cgo.private import interpreter
from cgo.private.dispatch_modes import TorchDispatchMode, current_mode
from cgo.private.operators import OpOverload
from cgo.private.trees import tree_iter

#: Gives a step's values, in order, from what it reads, in order.
Replay = Callable[..., Sequence[Tensor]]


class TapeError(CgoError):
    """A step that cannot be replayed; it runs as it did before."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor on the tape; names are unique."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen call: arguments by name, tensors as `Value`s; None for outputs without tensor."""

    op: OpOverload
    arguments: Mapping[str, Any]
    outputs: tuple[Value | None, ...]
    listed: bool  # the outputs come in a list

    def reads(self) -> Iterator[Value]:
        """The values among the arguments."""
        for argument in self.arguments.values():
            yield from _values(argument)

    def writes(self) -> Iterator[Value]:
        """The values that it says it writes in place."""
        for name in written(self.op):
            yield from _values(self.arguments.get(name))


def written(op: OpOverload) -> list[str]:
    """The arguments that an operator says it writes."""
    arguments = op._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def written_unsaid(op: OpOverload) -> list[str]:
    """Those that it may write without saying so: norms' running statistics."""
    if "batch_norm" not in op._schema.name:
        return []
    names = {argument.name for argument in op._schema.arguments} - set(written(op))
    return sorted(names & {"running_mean", "running_var"})


@dataclass(frozen=True)
class Tape:
    """A step as straight-line code. `constants` are tensors that it reads and nobody hands over."""

    inputs: tuple[Value, ...]
    constants: Mapping[Value, Tensor]
    calls: tuple[Call, ...]
    results: tuple[Value, ...]
    sizes: Mapping[Value, int]  # bytes of each value
    roots: Mapping[Value, Value] = field(default_factory=dict)  # of views, whose memory they are
    strides: Mapping[Value, tuple[int, ...]] = field(default_factory=dict)  # of each value


def record(
    step: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tape]:
    """Run a step once and write down what it calls; gives its results, and the tape.

    Args:
        step: Called with `inputs`; gives the tensors that a replay is to give. What it writes into
            tensors a replay writes as well.
        inputs: What it reads and what may be another tensor at the next step.

    Raises:
        TapeError: a call whose result depends on values, or on the process's random stream: it
            would be another one at the next step. Or one tensor is handed over as two inputs,
            which may be two at the next step. Or an operator gives lists of tensors among others.
    """
    if len(set(map(id, inputs))) < len(inputs):
        raise TapeError("two inputs are one tensor")
    recorder = Recorder(inputs)
    with recorder:
        results = step(*inputs)
    return results, recorder.tape(results)


def refuse_recording() -> None:
    """To be called by code whose work no recorder sees.

    Raises:
        TapeError: calls are being recorded.
    """
    if isinstance(current_mode(), Recorder):
        raise TapeError("compiled code makes no calls that could be written down")


def interpreted(tape: Tape) -> Replay:
    """The tape as a function of its inputs that calls what it says, line by line, from Python."""
    names: dict[str, Any] = {}
    given = list(tape.constants.values())
    lines = [f"def step({', '.join(value.name for value in (*tape.inputs, *tape.constants))}):"]
    for number, (call, gone) in enumerate(zip(tape.calls, _last_uses(tape))):
        names[f"op{number}"] = call.op
        lines.append(f"  {_assigned(call)}op{number}({_given(call, number, names)})")
        lines += [f"  {value.name} = None" for value in gone]
    lines.append(f"  return [{', '.join(value.name for value in tape.results)}]")
    exec("\n".join(lines), names)  # names and literals of the tape alone
    step = names["step"]

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found: Sequence[Tensor] = step(*inputs, *given)
        return found

    return run


def _assigned(call: Call) -> str:
    """What the results of a call become; what is written in place is there already."""
    if all(value is None for value in call.outputs):
        return ""
    names = [f"_{i}" if value is None else value.name for i, value in enumerate(call.outputs)]
    several = call.listed or len(names) > 1
    return f"{', '.join(names)}{',' if several and len(names) == 1 else ''} = "


def _given(call: Call, number: int, names: dict[str, Any]) -> str:
    """A call's arguments as Python writes them; literals get names."""
    keywords = {argument.name for argument in call.op._schema.arguments if argument.kwarg_only}
    found: list[str] = []
    for position, (name, argument) in enumerate(call.arguments.items()):
        text = _python(argument, f"a{number}_{position}", names)
        found.append(f"**{{{name!r}: {text}}}" if name in keywords else text)
    return ", ".join(found)


def _python(argument: Any, name: str, names: dict[str, Any]) -> str:
    if isinstance(argument, Value):
        return argument.name
    if isinstance(argument, tuple) and any(True for _ in _values(argument)):
        items = (_python(item, f"{name}_{i}", names) for i, item in enumerate(argument))
        return f"[{', '.join(items)}]"
    names[name] = list(argument) if isinstance(argument, tuple) else argument
    return name


def _last_uses(tape: Tape) -> list[list[Value]]:
    """After each call, what nobody reads any more."""
    kept = {*tape.results, *tape.inputs, *tape.constants}
    found: list[list[Value]] = []
    for call in reversed(tape.calls):
        touched = dict.fromkeys([*call.reads(), *(v for v in call.outputs if v is not None)])
        found.append([value for value in touched if value not in kept])
        kept.update(touched)
    return found[::-1]


def invoke(call: Call, values: dict[Value, Tensor]) -> None:
    """Call an operator on the values that are there; its outputs are added."""
    keywords = {argument.name for argument in call.op._schema.arguments if argument.kwarg_only}
    given = {name: _filled(argument, values) for name, argument in call.arguments.items()}
    args = [value for name, value in given.items() if name not in keywords]
    result = call.op(*args, **{k: value for k, value in given.items() if k in keywords})
    several = result if isinstance(result, (list, tuple)) else [result]
    for output, value in zip(call.outputs, several):
        if output is not None:
            values[output] = value


def _filled(argument: Any, values: Mapping[Value, Tensor]) -> Any:
    if isinstance(argument, Value):
        return values[argument]
    if isinstance(argument, tuple):
        return [_filled(item, values) for item in argument]
    return argument


class Recorder(TorchDispatchMode):
    """Sees every call below autograd; compound operators are in parts by then."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._calls: list[Call] = []
        self._constants: dict[Value, Tensor] = {}
        self._inputs = tuple(Value(f"i{index}") for index in range(len(inputs)))
        self._sizes: dict[Value, int] = {}
        self._strides: dict[Value, tuple[int, ...]] = {}
        self._roots: dict[Value, Value] = {}
        self._places: dict[tuple[Any, ...], Value] = {}  # of values, by where they lie
        self._same: dict[Value, Value] = {}  # of views, the first that lies there
        self._shifted = False  # whether a value was made another view in place
        self._count = 0
        for value, tensor in zip(self._inputs, inputs):
            self._name(tensor, value)

    def _name(self, tensor: Tensor, value: Value) -> Value:
        self._known[tensor] = value
        self._sizes[value] = tensor.numel() * tensor.element_size()
        self._strides[value] = tensor.stride() if tensor.layout is torch.strided else ()
        return value

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args, kwargs)
        arguments = {
            parameter.name: self._argument(given)
            for parameter, given in zip(func._schema.arguments, args)
        }
        arguments |= {name: self._argument(given) for name, given in kwargs.items()}
        result = func(*args, **kwargs)
        listed = isinstance(result, list)
        given = result if isinstance(result, (list, tuple)) else [result]
        if any(isinstance(item, (list, tuple)) for item in given):
            # Its tensors would have no name, and be taken for constants where they are read.
            raise TapeError(f"{func}: gives lists of tensors among its results")
        reads = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        outputs = tuple(self._output(item, reads) for item in given)
        self._calls.append(Call(func, arguments, outputs, listed))
        self._shifted |= torch.Tag.inplace_view in func.tags
        return result

    def _argument(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return self._value(given)
        if isinstance(given, (list, tuple)):
            return tuple(self._argument(item) for item in given)
        return given

    def _value(self, tensor: Tensor) -> Value:
        known = self._known.get(tensor)
        if known is None:
            known = self._name(tensor, Value(f"c{len(self._constants)}"))
            self._constants[known] = tensor.detach()
        return known

    def _output(self, given: Any, reads: Sequence[Tensor]) -> Value | None:
        if not isinstance(given, Tensor):
            return None
        known = self._known.get(given)  # what is written in place is the tensor that it was
        if known is None:
            known = self._name(given, Value(f"v{self._count}"))
            self._count += 1
            self._place(given, known, reads)
        return known

    def _place(self, given: Tensor, value: Value, reads: Sequence[Tensor]) -> None:
        """Note of a view what it is a view of, and whether another lies where it does."""
        memory = memory_start(given)
        for tensor in reads if memory else ():
            if memory_start(tensor) == memory:
                self._roots[value] = root = self._rooted(tensor)
                first = self._places.setdefault(_lying(given, root), value)
                if first != value:
                    self._same[value] = first
                return

    def _rooted(self, tensor: Tensor) -> Value:
        """What a tensor is a view of, or itself; that lies where it lies."""
        value = self._value(tensor)
        root = self._roots.get(value, value)
        self._places.setdefault(_lying(tensor, root), value)
        return root

    def tape(self, results: Sequence[Tensor]) -> Tape:
        """What was recorded, with these results; raises `TapeError`."""
        if any(result not in self._known for result in results):
            raise TapeError("a result comes from no recorded call")
        found = tuple(self._known[result] for result in results)
        calls = tuple(self._calls)
        known = self._sizes, self._roots, self._strides
        tape = Tape(self._inputs, self._constants, calls, found, *known)
        return _simplified(tape, {} if self._shifted else self._same)


def memory_start(tensor: Tensor) -> int:
    """Where its memory begins; 0 where it has none of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _lying(tensor: Tensor, root: Value) -> tuple[Any, ...]:
    """Where a view lies, and how."""
    kind = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return root, tensor.storage_offset(), tensor.shape, tensor.stride(), kind


def _refuse(func: OpOverload, args: Any, kwargs: Any) -> None:
    tags = func.tags
    varies = torch.Tag.dynamic_output_shape in tags
    if func is torch.ops.aten.index.Tensor:  # by positions the shape is known, by a mask it is not
        varies = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if varies or torch.Tag.data_dependent_output in tags:
        raise TapeError(f"{func}: depends on values")
    random = draws(func, args, kwargs)
    if random and not any(isinstance(item, torch.Generator) for item in tree_iter((args, kwargs))):
        raise TapeError(f"{func}: draws from the process's random stream")


# --- rewrites -------------------------------------------------------------------------------------

_SAME = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})


def _simplified(tape: Tape, views: Mapping[Value, Value]) -> Tape:
    """Without calls that give what is there already, and without those that nobody needs.

    Args:
        tape: As it was recorded.
        views: Of some values, an earlier one that is the same view of the same memory.
    """
    same: dict[Value, Value] = {}
    calls: list[Call] = []
    for call in tape.calls:
        given = _renamed(call.arguments, same)
        outputs = tuple(None if o is None else same.get(o, o) for o in call.outputs)
        call = replace(call, arguments=given, outputs=outputs)
        alone = outputs[0] if len(outputs) == 1 and not call.listed else None
        if call.op in _SAME and alone is not None:
            same[alone] = call.arguments["self"]
        elif alone is not None and alone in views and not call.op._schema.is_mutable:
            same[alone] = same.get(views[alone], views[alone])
        else:
            calls.append(call)
    results = tuple(same.get(result, result) for result in tape.results)
    return replace(tape, calls=tuple(_needed(calls, results)), results=results)


def _needed(calls: Sequence[Call], results: Sequence[Value]) -> list[Call]:
    needed = set(results)
    kept: list[Call] = []
    for call in reversed(calls):
        # One that gives nothing is there for what it does: it checks a value.
        acts = call.op._schema.is_mutable or not call.op._schema.returns
        if acts or not needed.isdisjoint(call.outputs):
            needed.update(call.reads())
            kept.append(call)
    return kept[::-1]


def _renamed(argument: Any, names: Mapping[Value, Value]) -> Any:
    if isinstance(argument, Value):
        return names.get(argument, argument)
    if isinstance(argument, tuple):
        return tuple(_renamed(item, names) for item in argument)
    if isinstance(argument, dict):
        return {name: _renamed(item, names) for name, item in argument.items()}
    return argument


def _values(argument: Any) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _values(item)


# --- replay ---------------------------------------------------------------------------------------


def compile_tape(tape: Tape) -> Replay:
    """The tape as a function of its inputs, run by TorchScript's interpreter.

    Raises:
        TapeError: TorchScript cannot run it, or would call other overloads.
    """
    constants = list(tape.constants)
    try:
        function = interpreter.compiled(_source(tape, constants), "step", _torch_alone)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise TapeError(f"TorchScript does not take it: {str(error)[:300]}") from error
    _check(tape, function.graph)
    given = [tape.constants[constant] for constant in constants]

    def replay(*inputs: Tensor) -> Sequence[Tensor]:
        with interpreter.unoptimised(), torch.no_grad():
            results: list[Tensor] = function(*inputs, *given)
        return results

    return replay


def _source(tape: Tape, constants: Sequence[Value]) -> str:
    parameters = ", ".join(f"{value.name}: Tensor" for value in (*tape.inputs, *constants))
    lines = [f"def step({parameters}) -> List[Tensor]:"]
    lines += [f"  {_line(call)}" for call in tape.calls]
    results = ", ".join(value.name for value in tape.results)
    lines.append(f"  return [{results}]")
    return "\n".join(lines) + "\n"


def _line(call: Call) -> str:
    types = {argument.name: argument.type for argument in call.op._schema.arguments}
    keyword_only = {a.name for a in call.op._schema.arguments if a.kwarg_only}
    # In order, and by name from where torch wants it: "self" and "from" are no names in Python.
    given = [
        f"{name}={_literal(value, types[name])}"
        if name in keyword_only
        else _literal(value, types[name])
        for name, value in call.arguments.items()
    ]
    space, _, name = call.op._schema.name.partition("::")
    text = f"torch.ops.{space}.{name}({', '.join(given)})"
    if not call.outputs or all(value is None for value in call.outputs):
        return text
    names = [f"_{i}" if value is None else value.name for i, value in enumerate(call.outputs)]
    if call.op._schema.is_mutable:  # what it gives is known by name already
        names = [n if n.startswith("v") else f"_{i}" for i, n in enumerate(names)]
    comma = "," if call.listed and len(names) == 1 else ""
    return f"{', '.join(names)}{comma} = {text}"


def _literal(value: Any, type_: Any) -> str:
    if isinstance(value, Value):
        return value.name
    if isinstance(value, tuple):
        inner = _element(type_)
        items = ", ".join(_literal(item, inner) for item in value)
        return f"torch.jit.annotate({_list_type(type_)}, [{items}])"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    return (
        repr(value) if isinstance(value, (bool, int, float, str)) or value is None else str(value)
    )


def _element(type_: Any) -> Any:
    while isinstance(type_, torch.OptionalType):
        type_ = type_.getElementType()
    return type_.getElementType() if isinstance(type_, torch.ListType) else type_


def _list_type(type_: Any) -> str:
    element = _element(type_)
    return f"List[{element.annotation_str}]"


def _torch_alone(name: str) -> Any:
    """The only name of Python that a tape's source may use."""
    return torch if name == "torch" else None


def _check(tape: Tape, graph: Any) -> None:
    """TorchScript picks overloads by argument types; they must be those that were called."""
    nodes = [node for node in graph.nodes() if not node.kind().startswith("prim::")]
    if len(nodes) != len(tape.calls):
        raise TapeError(f"TorchScript makes {len(nodes)} calls of {len(tape.calls)}")
    for call, node in zip(tape.calls, nodes):
        wanted, found = str(call.op._schema), node.schema()
        if wanted == found:
            continue
        # Python's overloads take numbers as tensors; TorchScript has others, which do the same.
        if call.op._overloadname != "Tensor" or not found.startswith(
            f"{call.op._schema.name}.Scalar("
        ):
            raise TapeError(f"TorchScript would call {found!r} instead of {wanted!r}")
