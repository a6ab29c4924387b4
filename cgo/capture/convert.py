"""From a traced step to our functional graph.

In-place operators become functional ones (`cgo.capture.aliases`), what they write of parameters and
buffers explicit outputs; random operators become sources that are drawn before the step; `no_grad`
regions become explicit detaches. What cannot be rewritten exactly raises `CaptureError`, and the
model trains as an opaque lane.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from cgo.capture.aliases import Handle, Memory, View, read, write
from cgo.capture.casts import Casts, castable
from cgo.capture.export import at_line, is_users
from cgo.capture.rewrites import KEEP, REWRITES
from cgo.capture.traced import Setting, Traced
from cgo.errors import CaptureError
from cgo.graph import Argument, Node, Ref, Symbol, TensorType
from cgo.operators import aten as resolve_aten
from cgo.private.fake_tensors import FakeTensorMode, unset_fake_temporarily
from cgo.private.memory_formats import suggest_memory_format
from cgo.private.operators import HigherOrderOperator, OpOverload
from cgo.private.storages import shared
from cgo.runtime.data import preserved_random_state
from cgo.weights import tensor_hash


@dataclass
class Program:
    """One captured program of one model, before it is bound to a model id.

    Names carry no model id and sources no content; `cgo.capture.bind` adds both.
    """

    nodes: list[Node]
    loss: Ref
    prediction: Ref | None
    updates: dict[str, Ref]  # path of a buffer, or of a parameter -> its value after the step
    constants: dict[str, Tensor] = field(default_factory=dict)


def convert(traced: Traced, *, autocast_dtype: str | None, gradients: bool = True) -> Program:
    """Turn a traced step into a `Program`.

    Args:
        traced: The step.
        autocast_dtype: The dtype of the autocast region the program runs in, if any.
        gradients: Whether they were recorded when it was traced.

    Raises:
        CaptureError: an operator cannot be made functional, or draws random numbers in a way
            that has no rewrite; names the operator.
    """
    return _Converter(traced, autocast_dtype, gradients).run()


class _Converter:
    def __init__(self, traced: Traced, autocast_dtype: str | None, gradients: bool) -> None:
        self.traced, self.gradients = traced, gradients
        self.casts = Casts.needed(traced, autocast_dtype)
        self.autocast_dtype = None if self.casts else autocast_dtype
        self.nodes: list[Node] = []
        self.values: dict[Ref, Any] = {}  # fake tensors; of a recording those that it saw
        self.env: dict[fx.Node, Any] = {}  # fx value -> Handle, tuple of these, or literal
        self.state: dict[str, Memory] = {}  # of parameters and buffers, by path
        self.constants: dict[str, Tensor] = {}
        self.taken: set[str] = set()
        self.draws = 0
        self.seen: Any = None  # what the operator at hand gave when it was recorded
        self.detached = False

    def run(self) -> Program:
        """Convert the whole graph."""
        graph = self.traced.graph
        with self._context():
            self._placeholders(graph)
            self._body(graph, self.traced.owner)
            loss, prediction = self._results(graph)
        updates = {path: memory.value for path, memory in self.state.items() if memory.version}
        return Program(self.nodes, loss, prediction, updates, self.constants)

    def _context(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.traced.recorded:  # there are tensors already, and operators that draw take numbers
            stack.enter_context(preserved_random_state())
            stack.enter_context(torch.set_grad_enabled(self.gradients))
        else:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if self.autocast_dtype is not None:
            dtype = getattr(torch, self.autocast_dtype)
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        return stack

    def _results(self, graph: fx.Graph) -> tuple[Ref, Ref | None]:
        returned = graph.output_node().args[0]
        loss, prediction = (self._present(self.env.get(value)) for value in returned)  # type: ignore
        if not isinstance(loss, Ref) or self.values[loss].numel() != 1:
            raise CaptureError("the loss is not a scalar computed from the batch")
        return loss, prediction if isinstance(prediction, Ref) else None

    # --- sources ------------------------------------------------------------------------------

    def _placeholders(self, graph: fx.Graph) -> None:
        nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
        for name, source in self.traced.sources.items():
            node = nodes[name]
            match source.kind:
                case "parameter" | "buffer":
                    ref = self._source(
                        source.key,
                        f"cgo.{source.kind}",
                        {"path": source.key},
                        source.value,
                        parameter=source.kind == "parameter",
                    )
                    memory = self.state[source.key] = Memory(ref)
                case "input":
                    given = {"leaf": source.key}
                    memory = Memory(self._source(source.key, "cgo.input", given, source.value))
                case "constant":
                    memory = self._constant(node, source.value)
            self.env[node] = Handle(memory)

    def _constant(self, node: fx.Node, value: Tensor) -> Memory:
        with unset_fake_temporarily():
            content = tensor_hash(value)
            self.constants[content] = value.detach().clone()
        ref = self._source(node.name, "cgo.constant", {"content": content}, value)
        return Memory(ref, fixed=True)

    def _source(
        self,
        name: str,
        op: str,
        kwargs: Mapping[str, Argument],
        like: Tensor,
        *,
        parameter: bool = False,
    ) -> Ref:
        if self.traced.recorded:
            return self._add(name, op, (), kwargs, like)
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        if parameter:
            fake.requires_grad_(fake.is_floating_point())
        return self._add(name, op, (), kwargs, fake)

    # --- operators ----------------------------------------------------------------------------

    def _body(self, graph: fx.Graph, owner: fx.GraphModule | None) -> None:
        self.owner = owner
        for node in graph.nodes:
            if node.op == "call_function":
                try:
                    with self._setting(node.meta.get("setting")):
                        self._call(node)
                except CaptureError as error:
                    raise located(error, node) from error
            elif node.op not in ("placeholder", "output", "get_attr"):
                raise CaptureError(f"{node.op} {node.target}")

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.env[node] = self.env[source][index]  # type: ignore[index]
        elif isinstance(node.target, HigherOrderOperator):
            self._region(node)
        elif isinstance(node.target, OpOverload):
            self._operator(node, node.target)
        else:
            self.env[node] = self._python(node)

    def _python(self, node: fx.Node) -> Any:
        """A call on plain Python numbers, such as `operator.mul(2, 3)`."""
        args = [self.env[a] if isinstance(a, fx.Node) else a for a in node.args]
        if callable(node.target) and all(isinstance(a, (bool, int, float)) for a in args):
            return node.target(*args)
        raise CaptureError(f"{node.target} is not an ATen operator")

    @contextlib.contextmanager
    def _setting(self, setting: Setting | None) -> Iterator[None]:
        """What was in force when a recorded operator was called."""
        if setting is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._detaching(setting.detached))
            stack.enter_context(torch.set_grad_enabled(self.gradients and not setting.detached))
            if setting.autocast is not None:
                assert self.casts is not None
                stack.enter_context(self.casts.inside(*setting.autocast))
            yield

    def _region(self, node: fx.Node) -> None:
        """Inline a region of another grad mode, or of another autocast setting."""
        name = str(node.target)
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *inputs = node.args
            if enabled and self.detached:
                raise CaptureError("enable_grad inside no_grad")
            setting: contextlib.AbstractContextManager[Any] = self._detaching(not enabled)
        elif name == "wrap_with_autocast":
            device, dtype, enabled, _, body, *inputs = node.args
            assert self.casts is not None
            setting = self.casts.inside(str(device), dtype, bool(enabled))
        else:
            raise CaptureError(f"higher-order operator {name}")
        with setting:
            self.env[node] = self._inlined(body, inputs)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Emit nodes through which gradients go, wherever the module is."""
        before, self.detached = self.detached, False
        try:
            yield
        finally:
            self.detached = before

    @contextlib.contextmanager
    def _detaching(self, more: bool) -> Iterator[None]:
        """What is read is detached, so that what is made carries no gradient."""
        before = self.detached
        self.detached = before or more
        try:
            yield
        finally:
            self.detached = before

    def _inlined(self, body: Any, inputs: Sequence[Any]) -> tuple[Any, ...]:
        inner, outer = getattr(self.owner, str(body.target)), self.owner
        for placeholder, value in zip(inner.graph.find_nodes(op="placeholder"), inputs):
            self.env[placeholder] = self.env[value] if isinstance(value, fx.Node) else value
        self._body(inner.graph, inner)
        self.owner = outer
        returned = inner.graph.output_node().args[0]
        return tuple(self.env[value] for value in returned)

    def _operator(self, node: fx.Node, overload: OpOverload) -> None:
        if overload.namespace != "aten":
            raise CaptureError(f"operator {overload} is not an ATen operator")
        written = _written(node, overload)
        self.seen = node.meta["val"] if self.traced.recorded else None
        args = tuple(self._argument(value) for value in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        rewrite = REWRITES.get(overload._schema.name.partition("::")[2].removesuffix("_"))
        outcome = rewrite(self, overload, args, kwargs) if rewrite else None
        if outcome is None:
            self._refuse_random(overload)
        if outcome is None or outcome is KEEP:
            outcome = self._functional(overload, args, kwargs, node.name)
        if written:
            self.env[node] = self._written(overload, written, outcome)
        else:
            self.env[node] = self._handles(node, overload, args, kwargs, outcome)

    def _functional(
        self,
        overload: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        name: str,
    ) -> Any:
        if overload is torch.ops.aten.copy_.default:  # a write casts and expands
            return args[1]
        if not overload._schema.is_mutable:
            return self.emit(str(overload), *args, name=name, result=self.seen, **kwargs)
        found = functional_form(overload)
        if found is None:
            raise CaptureError(f"in-place operator {overload} has no functional form")
        op, without = found
        kept = {key: value for key, value in kwargs.items() if key not in without}
        return self.emit(op, *args, name=name, **kept)

    def _refuse_random(self, overload: OpOverload) -> None:
        if torch.Tag.nondeterministic_seeded in overload.tags:
            raise CaptureError(f"operator {overload} draws random numbers in a way of its own")

    def _argument(self, value: Any) -> Argument:
        match value:
            case fx.Node():
                return self._present(self.env[value])  # type: ignore[no-any-return]
            case tuple() | list():
                return tuple(self._argument(item) for item in value)
            case torch.dtype():
                return Symbol("dtype", str(value).removeprefix("torch."))
            case torch.device():
                return Symbol("device", "trial")
            case torch.layout():
                return Symbol("layout", str(value).removeprefix("torch."))
            case torch.memory_format():
                return Symbol("memory_format", str(value).removeprefix("torch."))
            case None | bool() | int() | float() | str():
                return value
        raise CaptureError(f"argument {value!r} of type {type(value).__name__}")

    # --- memory -------------------------------------------------------------------------------

    def _present(self, value: Any) -> Any:
        """What an fx value is now: tensors as references."""
        if isinstance(value, Handle):
            return read(value, self)
        if isinstance(value, tuple):
            return tuple(self._present(item) for item in value)
        return value

    def _written(self, overload: OpOverload, targets: Sequence[fx.Node], outcome: Any) -> Any:
        """Write what an operator gave into the tensors that it was told to write."""
        several = outcome if isinstance(outcome, tuple) else (outcome,)
        handles = [self.env[target] for target in targets]
        for handle, value in zip(handles, several, strict=True):
            was, now = self.values[read(handle, self)], self.values[value]
            if was.shape != now.shape and overload is not torch.ops.aten.copy_.default:
                raise CaptureError(f"in-place operator {overload} would change a shape")
            if handle.memory.fixed:
                raise CaptureError(
                    f"in-place operator {overload} writes a tensor that the module keeps and that "
                    "is neither parameter nor buffer; register it as a buffer"
                )
            write(handle, value, self, detached=self.detached)
        return handles[0] if len(handles) == 1 else tuple(handles)

    def _handles(
        self,
        node: fx.Node,
        overload: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        outcome: Any,
    ) -> Any:
        """Handles of an operator's results: of memory of their own, or of an argument's."""
        sources = [self.env[n] for n in node.all_input_nodes if isinstance(self.env[n], Handle)]
        if isinstance(outcome, Ref):
            same = (handle for handle in sources if handle.ref == outcome)
            return next(same, None) or self._handle(node, overload, args, kwargs, outcome, None)
        if isinstance(outcome, tuple):
            return tuple(
                self._handle(node, overload, args, kwargs, ref, index)
                for index, ref in enumerate(outcome)
            )
        return outcome

    def _handle(
        self,
        node: fx.Node,
        overload: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        ref: Ref,
        index: int | None,
    ) -> Handle:
        base = self.env[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else None
        aliased = any(value.alias_info is not None for value in overload._schema.returns)
        if not aliased or not isinstance(base, Handle) or not self._shares(node, index, ref):
            return Handle(Memory(ref), (), ref)
        hidden = self.detached or overload is torch.ops.aten.detach.default
        view = View(str(overload), tuple(args[1:]), dict(kwargs), index, hidden)
        return Handle(base.memory, (*base.views, view), ref, base.memory.version)

    def _shares(self, node: fx.Node, index: int | None, found: Ref) -> bool:
        """Whether a result lies in the memory of the first argument."""
        base: Any = node.args[0]
        if self.traced.recorded:
            source = self.traced.sources.get(base.name)
            left = base.meta["val"] if source is None else source.seen
            right = node.meta["val"] if index is None else node.meta["val"][index]
        else:
            left, right = self.values[self._present(self.env[base])], self.values[found]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return False
        return shared(left, right)

    def replace_buffer(self, old: Argument, new: Ref) -> None:
        """Make `new` the value of a buffer that an operator writes behind its schema."""
        for memory in self.state.values():
            if memory.value == old:
                memory.value, memory.version = new, memory.version + 1
                return
        raise CaptureError("running statistics that are no buffers of the module")

    # --- emitting nodes; used by the rewrites as well -------------------------------------------

    def emit(
        self,
        op: str,
        *args: Argument,
        name: str | None = None,
        result: Any = None,
        **kwargs: Argument,
    ) -> Any:
        """Append a node and return its Ref, or a tuple of Refs for several outputs.

        Args:
            op: The operator.
            args: Its arguments.
            name: For the node; by default the operator's.
            result: What the operator gives, where that is known.
            kwargs: Arguments by name.
        """
        overload = resolve_aten(op)
        if overload is None:
            raise CaptureError(f"operator {op} is not known")
        if self.detached:
            args = tuple(self._detach(argument) for argument in args)
        if self.casts is not None and self.casts.dtype is not None:
            args = self._cast(overload, args, kwargs)
        if result is None:
            result = overload(*self._fakes(args), **{k: self._fakes(v) for k, v in kwargs.items()})
        return self._add(name or op.split(".")[1], op, args, kwargs, result)

    def draw(self, distribution: str, like: Any, **kwargs: Argument) -> Ref:
        """Append a random source with the type of the fake tensor `like`."""
        order = self.draws
        self.draws += 1
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        kwargs |= {"distribution": distribution, "order": order}
        return self._add("random", "cgo.random", (), kwargs, fake)

    def add_batch_norm(self, args: tuple[Argument, ...]) -> tuple[Ref, Ref, Ref]:
        """Append a training-mode batch norm: (y, new running mean, new running variance)."""
        x, weight, bias, mean, var, momentum, eps = args
        fakes = self._fakes((x, weight, bias, None, None))
        if self.seen is None:
            result = torch.ops.aten.batch_norm.default(*fakes, True, momentum, eps, False)
            # Torch's meta function keeps strides that the kernel does not; dropout masks follow.
            result = torch.empty_like(result, memory_format=suggest_memory_format(fakes[0]))
        else:
            result = self.seen
        fakes = (result, self.values[mean].clone(), self.values[var].clone())  # type: ignore[index]
        added = self._add("batch_norm", "cgo.batch_norm", args, {}, fakes)
        return added

    def fake(self, ref: Argument) -> Tensor:
        """The fake tensor behind a reference."""
        return self.values[ref]  # type: ignore[index]

    def detach(self, ref: Ref) -> Ref:
        """The value without its gradient."""
        found = self._detach(ref)
        assert isinstance(found, Ref)
        return found

    def _detach(self, argument: Argument) -> Argument:
        if isinstance(argument, tuple):
            return tuple(self._detach(item) for item in argument)
        if isinstance(argument, Ref) and self.values[argument].requires_grad:
            fake = self.values[argument].detach()
            return self._add("detach", "aten.detach.default", (argument,), {}, fake)
        return argument

    def _cast(
        self, overload: OpOverload, args: tuple[Argument, ...], kwargs: Any
    ) -> tuple[Argument, ...]:
        """Arguments in the dtype that autocast would give them."""
        assert self.casts is not None
        dtype = self.casts.of(overload, self._fakes(args), self._fakes(kwargs))
        return args if dtype is None else tuple(self._as(argument, dtype) for argument in args)

    def _as(self, argument: Argument, dtype: torch.dtype) -> Argument:
        if isinstance(argument, tuple):
            return tuple(self._as(item, dtype) for item in argument)
        fake = self.values[argument] if isinstance(argument, Ref) else None
        if fake is None or not castable(fake, dtype):
            return argument
        symbol = Symbol("dtype", str(dtype).removeprefix("torch."))
        overload = torch.ops.aten.to.dtype
        result = overload(fake, dtype)
        return self._add("to", str(overload), (argument, symbol), {}, result)

    def _fakes(self, argument: Any) -> Any:
        match argument:
            case Ref():
                return self.values[argument]
            case tuple():
                return tuple(self._fakes(item) for item in argument)
            case dict():
                return {key: self._fakes(item) for key, item in argument.items()}
            case Symbol(kind="device"):
                return torch.device("cpu")
            case Symbol():
                return getattr(torch, argument.value)
        return argument

    def _add(
        self,
        name: str,
        op: str,
        args: tuple[Argument, ...],
        kwargs: Mapping[str, Argument],
        result: Any,
    ) -> Any:
        unique, count = name, 1
        while unique in self.taken:
            unique, count = f"{name}_{count}", count + 1
        self.taken.add(unique)
        several = isinstance(result, (tuple, list))
        outputs = tuple(result) if several else (result,)
        self.nodes.append(
            Node(
                name=unique,
                op=op,
                args=args,
                kwargs=tuple(sorted(kwargs.items())),
                types=tuple(map(tensor_type, outputs)),
                owners=frozenset({""}),
                autocast=None if op.startswith("cgo.") and not args else self.autocast_dtype,
            )
        )
        refs = tuple(Ref(unique, index) for index in range(len(outputs)))
        self.values |= zip(refs, outputs)
        return refs if several else refs[0]


def _written(node: fx.Node, overload: OpOverload) -> list[fx.Node]:
    """The arguments whose memory the operator's schema says it writes."""
    written = []
    for index, argument in enumerate(overload._schema.arguments):
        if is_written(argument):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if not isinstance(value, fx.Node):
                raise CaptureError(f"in-place operator {overload} writes several tensors")
            written.append(value)
    return written


def is_written(argument: Any) -> bool:
    """Whether a schema says that an argument is written."""
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def functional_form(overload: OpOverload) -> tuple[str, frozenset[str]] | None:
    """The operator that gives what this one writes, and which arguments it does not take."""
    packet, _, variant = str(overload).removeprefix("aten.").partition(".")
    if packet.endswith("_") and resolve_aten(op := f"aten.{packet[:-1]}.{variant}") is not None:
        return op, frozenset()
    outs = {a.name for a in overload._schema.arguments if a.kwarg_only and is_written(a)}
    read = [(a.name, str(a.type)) for a in overload._schema.arguments if a.name not in outs]
    for name in getattr(torch.ops.aten, packet).overloads() if outs else ():
        other = getattr(getattr(torch.ops.aten, packet), name)
        if [(a.name, str(a.type)) for a in other._schema.arguments] == read:
            return str(other), frozenset(outs)
    return None


def located(error: CaptureError, node: fx.Node) -> CaptureError:
    """The error with the line of the user's code that the call stands for."""
    if getattr(error, "located", False):
        return error
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [(file, int(line)) for file, line in frames if is_users(file)]
    found = CaptureError(f"{error}{at_line(users[-1] if users else node.meta.get('line'))}")
    found.located = True  # type: ignore[attr-defined]
    return found


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def tensor_type(value: Any) -> TensorType | None:
    """The type of a (fake) tensor; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    stride = None if value.is_contiguous() else tuple(value.stride())
    return TensorType(str(value.dtype).removeprefix("torch."), tuple(value.shape), stride)


Rewrite = Callable[[_Converter, Any, Sequence[Any], Mapping[str, Any]], Any]
