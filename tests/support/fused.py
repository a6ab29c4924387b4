"""Runs one operator for several members, fused and one by one."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from cgo.graph import Graph, Node, Output, Ref, Symbol, TensorType
from cgo.operators import aten
from cgo.runtime.choice import Way
from cgo.runtime.forms import all_forms
from cgo.runtime.lower import lower
from cgo.runtime.operators import symbol_value
from cgo.runtime.packing import Pack
from cgo.runtime.triton_kernels import usable

CPU = torch.device("cpu")
DTYPES = {torch.float64: "float64", torch.int64: "int64", torch.bool: "bool"}


@dataclass(frozen=True)
class T:
    """A tensor argument: its shape, and how it is filled."""

    shape: tuple[int, ...]
    kind: str = "normal"  # normal, positive, above one, unit, bool, or classes < `below`
    below: int = 0
    trained: bool = True

    def draw(self, generator: torch.Generator) -> Tensor:
        if self.kind == "classes":
            return torch.randint(0, self.below, self.shape, generator=generator)
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) > 0.5
        value = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind in ("positive", "above one"):
            return value.abs() + (0.1 if self.kind == "positive" else 1.1)
        return value.sigmoid() if self.kind == "unit" else value


@dataclass(frozen=True)
class Call:
    """One operator with its arguments, `T`s where tensors stand."""

    op: str
    args: tuple[Any, ...]
    form: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    share: tuple[int, ...] = ()  # tensors that all members share, by number
    channels: tuple[int, ...] = ()  # tensors that come out of an operator in channels layout

    def __str__(self):
        marks = f" shared{self.share}" if self.share else ""
        marks += f" channels{self.channels}" if self.channels else ""
        return f"{self.form}: {self.op.removeprefix('aten.')}{marks}"

    @property
    def tensors(self) -> list[T]:
        found: list[T] = []
        collect((self.args, tuple(self.kwargs.values())), found)
        return found


def collect(value, found):
    if isinstance(value, T):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for part in value:
            collect(part, found)


def fill(value, tensors):
    """The arguments with an iterator's items where tensors stand."""
    if isinstance(value, T):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(fill(part, tensors) for part in value)
    return value


def plain(value):
    """Literals as torch takes them."""
    if isinstance(value, Symbol):
        return symbol_value(value, CPU)
    if isinstance(value, (tuple, list)):
        return type(value)(plain(part) for part in value)
    return value


def type_of(value: Tensor) -> TensorType:
    return TensorType(DTYPES[value.dtype], tuple(value.shape))


#: What brings a value into channels layout on its way to the operator under test.
PRELUDE = "aten.group_norm.default"


def prelude(x: Tensor) -> Tensor:
    return torch.group_norm(x, 1)


class Members:
    """Inputs of M members, and the operator computed for each of them alone."""

    def __init__(self, call: Call, members: int = 3, seed: int = 0):
        self.call, self.size = call, members
        generator = torch.Generator().manual_seed(seed)
        shared = {index: call.tensors[index].draw(generator) for index in call.share}
        self.inputs = [
            [
                shared[index] if index in shared else tensor.draw(generator)
                for index, tensor in enumerate(call.tensors)
            ]
            for _ in range(members)
        ]
        self.seed = seed

    def operator(self, values):
        values = [prelude(v) if i in self.call.channels else v for i, v in enumerate(values)]
        left = iter(values)
        args, kwargs = fill(self.call.args, left), fill(tuple(self.call.kwargs.items()), left)
        if self.call.op == "cgo.batch_norm":
            x, weight, bias, mean, var, momentum, eps = args
            mean, var = mean.clone(), var.clone()
            y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, False)
            return [y, mean, var]
        found = aten(self.call.op)(*plain(args), **dict(plain(kwargs)))
        return [found] if isinstance(found, Tensor) else list(found)

    def leaves(self):
        """Fresh leaves for every member; one leaf for all where it is shared."""
        made: dict[int, Tensor] = {}

        def leaf(value, trained):
            if id(value) not in made:
                fresh = value.clone()
                made[id(value)] = fresh.requires_grad_(trained and value.is_floating_point())
            return made[id(value)]

        trained = [tensor.trained for tensor in self.call.tensors]
        return [[leaf(v, t) for v, t in zip(row, trained)] for row in self.inputs]

    def alone(self):
        """Outputs and gradients of each member, from plain torch."""
        leaves = self.leaves()
        outputs = [self.operator(row) for row in leaves]
        return self._result(outputs, leaves)

    def fused(self, packed=True):
        """The same from the fused program, and how it was executed."""
        leaves = self.leaves()
        graph, packs = self.graph(packed)
        ways = self.ways()
        # Forms for a GPU choose between formats of images; there, these are contiguous as a rule.
        last = False if ways and "conv" in self.call.op else None
        lowered = lower(graph, "train/4", CPU, packs, ways=ways, images_last=last)
        by_name = {
            f"m{m}/x{i}" if i not in self.call.share else f"shared/x{i}": leaf
            for m, row in enumerate(leaves)
            for i, leaf in enumerate(row)
        }
        values = []
        for source in lowered.sources:
            lanes = [by_name[node.name] for node in source.nodes]
            values.append(torch.stack(lanes) if source.packed else lanes[0])
        results = lowered(values)
        named = {}
        for result, value in zip(lowered.results, results):
            for lane, output in enumerate(result.outputs):
                named[output.model, int(output.key)] = value[lane] if result.packed else value
        for output in lowered.written:  # in place: the statistics are the handed-in leaves
            index = int(output.key)
            source = next(
                position
                for position, s in enumerate(lowered.sources)
                if s.nodes[0].name.endswith(f"/x{index + 2}")
            )
            lane = int(output.model[1:])
            named[output.model, index] = values[source][lane]
        outputs = [[named[f"m{m}", i] for i in range(len(self.outputs))] for m in range(self.size)]
        return self._result(outputs, leaves), lowered.decisions

    def ways(self):
        """What forms that are not taken by themselves are chosen by."""
        (form,) = [f for f in all_forms() if f.name == self.call.form] or [None]
        if form is None or not form.chosen:
            return {}
        if form.offered is usable and not usable(CPU, True):
            pytest.skip("kernels in Triton run here neither on a GPU nor by the interpreter")
        return {"g": Way(form.name, form.layouts)}

    def _result(self, outputs, leaves):
        """Outputs, then gradients for random cotangents; the same ones in every run."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        pairs = [
            (value, torch.randn(value.shape, generator=generator, dtype=value.dtype))
            for row in outputs
            for value in row
            if value.is_floating_point()
        ]
        pairs = [(value, cotangent) for value, cotangent in pairs if value.requires_grad]
        if pairs:
            torch.autograd.backward([v for v, _ in pairs], [c for _, c in pairs])
        gradients = [[leaf.grad for leaf in row] for row in leaves]
        return [[value.detach() for value in row] for row in outputs], gradients

    @property
    def outputs(self):
        with torch.no_grad():
            return self.operator(self.inputs[0])

    def graph(self, packed):
        """The members as one graph in which the operators are a group."""
        call = self.call
        everyone = frozenset(f"m{m}" for m in range(self.size))
        nodes, packs = [], []
        names = []
        for i, tensor in enumerate(call.tensors):
            type_ = (type_of(self.inputs[0][i]),)
            if i in call.share:
                nodes.append(Node(f"shared/x{i}", "cgo.buffer", (), (), type_, everyone))
                names.append([f"shared/x{i}"] * self.size)
                continue
            own = [f"m{m}/x{i}" for m in range(self.size)]
            names.append(own)
            for m, name in enumerate(own):
                given = (("model", f"m{m}"), ("path", str(i - 2)))
                nodes.append(Node(name, "cgo.buffer", (), given, type_, frozenset({f"m{m}"})))
            if packed:
                places = tuple((f"m{m}", f"x{i}") for m in range(self.size))
                packs.append(Pack(tuple(own), places, tensor.trained))
        for i in call.channels:
            for m, name in enumerate(names[i]):
                nodes.append(
                    Node(f"m{m}/train/4/pre{i}", PRELUDE, (Ref(name), 1), (),
                         (type_of(self.inputs[m][i]),), frozenset({f"m{m}"}), group=f"p{i}")
                )  # fmt: skip
            names[i] = [f"m{m}/train/4/pre{i}" for m in range(self.size)]
        types = tuple(type_of(value) for value in self.outputs)
        outputs = []
        for m in range(self.size):
            refs = iter(Ref(row[m]) for row in names)
            args, kwargs = fill(call.args, refs), fill(tuple(call.kwargs.items()), refs)
            name = f"m{m}/train/4/op"
            nodes.append(
                Node(name, call.op, args, tuple(sorted(kwargs)), types, frozenset({f"m{m}"}),
                     group="g")
            )  # fmt: skip
            outputs += [
                Output(f"m{m}", "train/4", "update", str(i), Ref(name, i))
                for i in range(len(types))
            ]
        return Graph(tuple(nodes), tuple(outputs)), packs
