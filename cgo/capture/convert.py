"""From an exported `torch.fx` graph to our functional graph.

In-place operators become functional ones with buffer updates as explicit outputs; random operators
become sources that are drawn before the step; `no_grad` regions become explicit detaches. What
cannot be rewritten exactly raises `CaptureError`, and the model trains as an opaque lane.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from cgo.capture.rewrites import KEEP, REWRITES
from cgo.errors import CaptureError
from cgo.graph import Argument, Node, Ref, Symbol, TensorType
from cgo.operators import aten as resolve_aten
from cgo.weights import tensor_hash


@dataclass
class Program:
    """One captured program of one model, before it is bound to a model id.

    Names carry no model id and sources no content; `cgo.capture.bind` adds both.
    """

    nodes: list[Node]
    loss: Ref
    prediction: Ref | None
    updates: dict[str, Ref]  # buffer path -> its value after the step
    constants: dict[str, Tensor] = field(default_factory=dict)


def convert(
    exported: ExportedProgram,
    leaves: Mapping[str, Tensor],
    *,
    strip: str,
    autocast_dtype: str | None,
) -> Program:
    """Turn an exported step into a `Program`.

    Args:
        exported: A training-IR export of a `Step`.
        leaves: The batch it was exported with; names and types of the inputs.
        strip: Prefix to take off parameter and buffer paths.
        autocast_dtype: The dtype of the autocast region the program runs in, if any.

    Raises:
        CaptureError: an operator cannot be made functional, or draws random numbers in a way
            that has no rewrite; names the operator.
    """
    return _Converter(exported, leaves, strip, autocast_dtype).run()


class _Converter:
    def __init__(
        self,
        exported: ExportedProgram,
        leaves: Mapping[str, Tensor],
        strip: str,
        autocast_dtype: str | None,
    ) -> None:
        self.exported = exported
        self.leaves = leaves
        self.strip = strip
        self.autocast_dtype = autocast_dtype
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.nodes: list[Node] = []
        self.values: dict[Ref, Any] = {}  # fake tensors
        self.env: dict[fx.Node, Any] = {}  # fx value -> Ref, tuple of Refs, or literal
        self.homes: dict[Ref, str] = {}  # first value of each buffer -> its path
        self.state: dict[str, Ref] = {}  # buffer path -> its current value
        self.storage: dict[fx.Node, set[fx.Node]] = {}  # fx values that may share memory
        self.constants: dict[str, Tensor] = {}
        self.taken: set[str] = set()
        self.draws = 0
        self.detached = False

    def run(self) -> Program:
        """Convert the whole graph."""
        graph = self.exported.graph_module.graph
        with self._context():
            self._placeholders(graph)
            self._body(graph, self.exported.graph_module)
        loss, prediction = self._results(graph)
        updates = {path: ref for path, ref in self.state.items() if self.homes.get(ref) != path}
        return Program(self.nodes, loss, prediction, updates, self.constants)

    def _context(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(self.mode)
        if self.autocast_dtype is not None:
            dtype = getattr(torch, self.autocast_dtype)
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        return stack

    def _results(self, graph: fx.Graph) -> tuple[Ref, Ref | None]:
        returned = graph.output_node().args[0]
        loss, prediction = (self.env.get(value) for value in returned)  # type: ignore
        if not isinstance(loss, Ref) or self.values[loss].numel() != 1:
            raise CaptureError("the loss is not a scalar computed from the batch")
        return loss, prediction if isinstance(prediction, Ref) else None

    # --- sources ------------------------------------------------------------------------------

    def _placeholders(self, graph: fx.Graph) -> None:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        names = iter(self.leaves)
        for node in graph.find_nodes(op="placeholder"):
            spec = specs[node.name]
            match spec.kind:
                case InputKind.PARAMETER | InputKind.BUFFER:
                    path = str(spec.target).removeprefix(self.strip)
                    self._state(node, path, spec.kind is InputKind.PARAMETER)
                case InputKind.USER_INPUT:
                    leaf = next(names)
                    self.env[node] = self._source(
                        leaf, "cgo.input", {"leaf": leaf}, self.leaves[leaf]
                    )
                case InputKind.CONSTANT_TENSOR:
                    self._constant(node, self.exported.constants[str(spec.target)])
                case _:
                    raise CaptureError(f"input {node.name} is a {spec.kind.name.lower()}")
            self.storage[node] = {node}

    def _state(self, node: fx.Node, path: str, parameter: bool) -> None:
        op = "cgo.parameter" if parameter else "cgo.buffer"
        ref = self._source(path, op, {"path": path}, node.meta["val"], parameter=parameter)
        self.env[node] = ref
        if not parameter:
            self.homes[ref] = path
            self.state[path] = ref

    def _constant(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise CaptureError(f"constant {node.name} is a {type(value).__name__}")
        with unset_fake_temporarily():
            content = tensor_hash(value)
            self.constants[content] = value.detach().clone()
        self.env[node] = self._source(node.name, "cgo.constant", {"content": content}, value)

    def _source(
        self,
        name: str,
        op: str,
        kwargs: Mapping[str, Argument],
        like: Tensor,
        *,
        parameter: bool = False,
    ) -> Ref:
        fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        if parameter:
            fake.requires_grad_(fake.is_floating_point())
        return self._add(name, op, (), kwargs, fake)

    # --- operators ----------------------------------------------------------------------------

    def _body(self, graph: fx.Graph, owner: fx.GraphModule) -> None:
        self.owner = owner
        for node in graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op not in ("placeholder", "output", "get_attr"):
                raise CaptureError(f"{node.op} {node.target}")

    def _call(self, node: fx.Node) -> None:
        self.storage[node] = {node}
        if node.target is operator.getitem:
            source, index = node.args
            self.env[node] = self.env[source][index]  # type: ignore[index]
            self._alias(node, source)
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._region(node)
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            self.env[node] = self._python(node)
            return
        self._operator(node, node.target)

    def _python(self, node: fx.Node) -> Any:
        """A call on plain Python numbers, such as `operator.mul(2, 3)`."""
        args = [self.env[a] if isinstance(a, fx.Node) else a for a in node.args]
        if callable(node.target) and all(isinstance(a, (bool, int, float)) for a in args):
            return node.target(*args)
        raise CaptureError(f"{node.target} is not an ATen operator")

    def _region(self, node: fx.Node) -> None:
        """Inline a `no_grad` region: what it reads is detached, so what it makes carries none."""
        name = str(node.target)
        if name != "wrap_with_set_grad_enabled":
            raise CaptureError(f"higher-order operator {name}")
        enabled, body, *inputs = node.args
        inner = getattr(self.owner, str(body.target))  # type: ignore[union-attr]
        if enabled and self.detached:
            raise CaptureError("enable_grad inside no_grad")
        before, outer = self.detached, self.owner
        self.detached = before or not enabled
        for placeholder, value in zip(inner.graph.find_nodes(op="placeholder"), inputs):
            self.env[placeholder] = self.env[value]  # type: ignore
            self.storage[placeholder] = self.storage.get(value, {value})  # type: ignore
            self.storage[placeholder].add(placeholder)
        self._body(inner.graph, inner)
        self.detached, self.owner = before, outer
        returned = inner.graph.output_node().args[0]
        self.env[node] = tuple(self.env[value] for value in returned)  # type: ignore[union-attr]
        for value in returned:  # type: ignore[union-attr]
            self._alias(node, value)

    def _operator(self, node: fx.Node, overload: torch._ops.OpOverload) -> None:
        if overload.namespace != "aten":
            raise CaptureError(f"operator {overload} is not an ATen operator")
        rewrite = REWRITES.get(overload._schema.name.partition("::")[2].removesuffix("_"))
        written = _written(node, overload)
        args = tuple(self._argument(value) for value in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items()}
        outcome = rewrite(self, overload, args, kwargs) if rewrite else None
        if outcome is None:
            self._refuse_random(overload)
        if outcome is None or outcome is KEEP:
            outcome = self._functional(overload, args, kwargs, node.name)
        self.env[node] = outcome
        for target in written:
            self._write(node, target, outcome)
        self._view(node, overload)

    def _functional(
        self,
        overload: torch._ops.OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        name: str,
    ) -> Any:
        if overload._schema.is_mutable:
            packet, _, variant = str(overload).removeprefix("aten.").partition(".")
            op = f"aten.{packet.removesuffix('_')}.{variant}"
            if not packet.endswith("_") or resolve_aten(op) is None:
                raise CaptureError(f"in-place operator {overload} has no functional form")
        else:
            op = str(overload)
        return self.emit(op, *args, name=name, **kwargs)

    def _refuse_random(self, overload: torch._ops.OpOverload) -> None:
        if torch.Tag.nondeterministic_seeded in overload.tags:
            raise CaptureError(f"operator {overload} draws random numbers in a way of its own")

    def _argument(self, value: Any) -> Argument:
        match value:
            case fx.Node():
                return self.env[value]
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

    # --- mutation -----------------------------------------------------------------------------

    def _write(self, node: fx.Node, target: fx.Node, outcome: Any) -> None:
        """From now on, `target` (whose memory the operator wrote) means the operator's result."""
        kept = set(self.state.values())
        for other in self.storage[target]:
            if self.env.get(other) == self.env[target]:
                continue  # another name of the very same value; renamed below
            later = [user for user in other.users if user not in self.env]
            if later or self.env.get(other) in kept:
                raise CaptureError(
                    f"in-place operator {node.target} writes memory that %{other.name} shares"
                )
        old = self.env[target]
        if not isinstance(old, Ref) or not isinstance(outcome, Ref):
            raise CaptureError(f"in-place operator {node.target} writes several tensors")
        was, now = self.values[old], self.values[outcome]
        if was.dtype != now.dtype or was.shape != now.shape:
            raise CaptureError(f"in-place operator {node.target} would change dtype or shape")
        if target.op == "placeholder" and self._is_parameter(old):
            raise CaptureError(f"in-place operator {node.target} writes parameter {old.name}")
        self._assign(target, old, outcome)
        self.storage[node] = self.storage[target] | {node}
        for alias in self.storage[node]:
            self.storage[alias] = self.storage[node]

    def _is_parameter(self, ref: Ref) -> bool:
        return any(node.name == ref.name and node.op == "cgo.parameter" for node in self.nodes)

    def _assign(self, target: fx.Node, old: Ref, new: Ref) -> None:
        for alias in [key for key, value in self.env.items() if value == old]:
            self.env[alias] = new
        self.update_buffer(old, new)

    def update_buffer(self, old: Ref, new: Ref) -> bool:
        """Make `new` the value of the buffer whose current value is `old`; False if none has it."""
        for path, current in self.state.items():
            if current == old:
                self.state[path] = new
                return True
        return False

    def replace_buffer(self, old: Argument, new: Ref) -> None:
        """As `update_buffer`, for a buffer that an operator writes behind its schema."""
        if not isinstance(old, Ref) or not self.update_buffer(old, new):
            raise CaptureError("running statistics that are no buffers of the module")
        for node, value in self.env.items():
            if value == old:
                self.env[node] = new

    def _alias(self, node: fx.Node, source: Any) -> None:
        if isinstance(source, fx.Node):
            shared = self.storage[node] | self.storage.get(source, {source})
            for alias in shared:
                self.storage[alias] = shared

    def _view(self, node: fx.Node, overload: torch._ops.OpOverload) -> None:
        """Record that a result may share memory with an argument, as the schema says."""
        aliased = any(value.alias_info is not None for value in overload._schema.returns)
        name = overload._schema.name
        if name in ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"):
            aliased = True  # returns its input where it has nothing to do
        if aliased and not overload._schema.is_mutable:
            for argument, value in zip(overload._schema.arguments, node.args):
                if argument.alias_info is not None or name.endswith("dropout"):
                    for source in value if isinstance(value, (tuple, list)) else (value,):
                        self._alias(node, source)

    # --- emitting nodes; used by the rewrites as well -------------------------------------------

    def emit(self, op: str, *args: Argument, name: str | None = None, **kwargs: Argument) -> Any:
        """Append a node and return its Ref, or a tuple of Refs for several outputs."""
        if self.detached:
            args = tuple(self._detach(argument) for argument in args)
        overload = resolve_aten(op)
        if overload is None:
            raise CaptureError(f"operator {op} is not known")
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
        result = torch.ops.aten.batch_norm.default(*fakes, True, momentum, eps, False)
        # Torch's meta function keeps strides that the kernel does not; dropout masks follow them.
        result = torch.empty_like(result, memory_format=suggest_memory_format(fakes[0]))
        fakes = (result, self.values[mean].clone(), self.values[var].clone())  # type: ignore[index]
        added = self._add("batch_norm", "cgo.batch_norm", args, {}, fakes)
        return added

    def fake(self, ref: Argument) -> Tensor:
        """The fake tensor behind a reference."""
        return self.values[ref]  # type: ignore[index]

    def _detach(self, argument: Argument) -> Argument:
        if isinstance(argument, tuple):
            return tuple(self._detach(item) for item in argument)
        if isinstance(argument, Ref) and self.values[argument].requires_grad:
            fake = self.values[argument].detach()
            return self._add("detach", "aten.detach.default", (argument,), {}, fake)
        return argument

    def _fakes(self, argument: Any) -> Any:
        match argument:
            case Ref():
                return self.values[argument]
            case tuple():
                return tuple(self._fakes(item) for item in argument)
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


def _written(node: fx.Node, overload: torch._ops.OpOverload) -> list[fx.Node]:
    """The arguments whose memory the operator's schema says it writes."""
    written = []
    for index, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if not isinstance(value, fx.Node):
                raise CaptureError(f"in-place operator {overload} writes several tensors")
            written.append(value)
    return written


def tensor_type(value: Any) -> TensorType | None:
    """The type of a (fake) tensor; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    stride = None if value.is_contiguous() else tuple(value.stride())
    return TensorType(str(value.dtype).removeprefix("torch."), tuple(value.shape), stride)


Rewrite = Callable[[_Converter, Any, Sequence[Any], Mapping[str, Any]], Any]
