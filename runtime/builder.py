"""Writes one region of a program: each group in a form, or its members one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cgo.dtypes import torch_dtype
from cgo.errors import GraphError
from cgo.graph import Argument, Node, Output, Ref, Symbol
from cgo.operators import aten
from cgo.runtime.choice import LOOP, LOOPED, Way
from cgo.runtime.emitter import Emitter, Group, Packed, item, make_group, returns_list
from cgo.runtime.forms import forms_of
from cgo.runtime.forms.elementwise import adds_nothing
from cgo.runtime.forms.general import vectorise
from cgo.runtime.fused_norms import trained
from cgo.runtime.layouts import IMAGES
from cgo.runtime.operators import batch_norm, batch_norm_copying, symbol_value
from cgo.runtime.peepholes import simplify
from cgo.runtime.recompute import recomputing
from cgo.runtime.solo import kernel_for
from cgo.runtime.unsafe import CONVOLUTIONS
from cgo.tuning import STACKED

#: The general rule's name, beside those of forms.
VMAP = "vmap"


@dataclass(frozen=True)
class Source:
    """A value that the program is given: one node's, or several nodes' as (M, ...)."""

    nodes: tuple[Node, ...]
    packed: bool = False


@dataclass(frozen=True)
class Result:
    """A value that the program gives: one output's, or several outputs' as (M, ...)."""

    outputs: tuple[Output, ...]
    packed: bool = False


@dataclass(frozen=True)
class Decision:
    """How one group is executed; `form` is None for a loop over its members."""

    operator: str
    size: int
    form: str | None
    reason: str = ""  # of a loop
    example: str = ""  # the first member's name
    gathers: int = 0  # inputs whose values had to be copied together


class Builder:
    """Writes the nodes of one region."""

    def __init__(
        self, emitter: Emitter, setting: str | None, ways: Mapping[str, Way] | None = None
    ) -> None:
        self.emitter = emitter
        self.ways = ways or {}
        self.decisions: list[Decision] = []
        self.setting = setting

    def place(self, sources: Sequence[Source]) -> None:
        """Make sources the function's arguments."""
        for index, source in enumerate(sources):
            placeholder = self.emitter.graph.placeholder(f"s{index}")
            if source.packed:
                packed = Packed(placeholder, STACKED)
                self.emitter.set_packed([Ref(node.name) for node in source.nodes], packed)
                self.emitter.sources.add(id(packed))
            else:
                self.emitter.set(Ref(source.nodes[0].name), placeholder)

    def add(self, members: Sequence[Node]) -> None:
        """Write a group; a single node is a loop of one, which needs no decision."""
        self.emitter.leaving = self.emitter.images_last and _leaves_images(members[0])
        if len(members) > 1:
            decision = self._fuse(make_group(members, self.emitter.types))
            self.decisions.append(decision)
            if decision.form is not None:
                return
        for node in members:
            self._call(node)

    def _fuse(self, group: Group) -> Decision:
        gathers = self.emitter.gathers
        form, reason = self._write(group)
        return Decision(
            group.operator,
            group.size,
            form,
            reason,
            group.nodes[0].name,
            self.emitter.gathers - gathers,
        )

    def _write(self, group: Group) -> tuple[str | None, str]:
        """Write a group in the first form that takes it; the form's name, or why none does."""
        if (group.nodes[0].group or "").endswith(LOOP):
            return None, "one by one costs less here"
        if all(column.shared for column in group.columns):
            return None, "every member reads the same values"
        way = self.ways.get(group.nodes[0].group or "")
        if way is not None and self._write_form(group, way):
            return way.form, ""
        for form in forms_of(group.operator):
            if not form.chosen and self._set(group, form.rule(self.emitter, group)):
                return form.name, ""
        values, reason = vectorise(self.emitter, group)
        return (VMAP, "") if self._set(group, values) else (None, reason)

    def _write_form(self, group: Group, way: Way) -> bool:
        """Write a group in a form and layout, unless that does not apply."""
        rules = {form.name: form.rule for form in forms_of(group.operator)}
        rules[VMAP] = lambda emitter, members: vectorise(emitter, members)[0]
        rule = rules.get(way.form)
        self.emitter.preferred = way.layout
        try:
            return rule is not None and self._set(group, rule(self.emitter, group))
        finally:
            self.emitter.preferred = None

    def write_way(self, group: Group, way: Way) -> list[fx.Node] | None:
        """Write a group one way, and give what holds its results; None where that is impossible."""
        refs = [ref for i in range(len(group.types)) for ref in group.refs(i)]
        wanted = [ref for ref in refs if self.emitter.readers[ref]]
        if way.form == LOOPED:
            for node in group.nodes:
                self._call(node)
            return [self.emitter.value(ref) for ref in wanted]
        if not self._write_form(group, way):
            return None
        packed = [self.emitter.packed(ref) for ref in wanted]
        return list({id(p): p.node for p in packed if p is not None}.values())

    def _set(self, group: Group, values: Sequence[Packed] | None) -> bool:
        """Make a form's results the group's; False where the form did not apply."""
        for index, value in enumerate(values or ()):
            type_ = group.types[index]
            if self.setting is not None and type_ is not None:
                # Autocast may give the parts of a form another dtype than the operator has.
                dtype = torch_dtype(type_.dtype)
                value = Packed(self.emitter.call(torch.Tensor.to, value.node, dtype), value.layout)
            self.emitter.set_packed(group.refs(index), value)
        return values is not None

    def _call(self, node: Node) -> None:
        emitter = self.emitter
        if adds_nothing(node, emitter.types):
            assert isinstance(node.args[0], Ref)
            emitter.set(Ref(node.name), emitter.value(node.args[0]))
            return
        alone = make_group([node], emitter.types) if emitter.images_last else None
        kernel = None if alone is None else kernel_for(alone, emitter.device)
        args = tuple(self._argument(argument) for argument in node.args)
        kwargs = {key: self._argument(value) for key, value in node.kwargs}
        images = node.op in _CONVOLUTIONS
        if alone is not None and alone.operator in CONVOLUTIONS:
            args = (emitter.convolved(args[0], alone, alone.arguments["groups"]), *args[1:])
        elif emitter.leaving and isinstance(node.args[0], Ref):
            type_ = emitter.types[node.args[0]]
            ndim = 0 if type_ is None else len(type_.shape)
            args = (emitter.leaving_images(args[0], ndim), *args[1:])
        function = self._kernel(node) if kernel is None else kernel.function
        result = emitter.graph.call_function(function, args, kwargs)
        if len(node.types) == 1 and node.types[0] is not None:
            result.meta["ndim"] = len(node.types[0].shape)
        if images:  # of one channel both formats are one, and the kernel takes the other
            result = emitter.images(result)
        if len(node.types) == 1 and not returns_list(node):
            emitter.set(Ref(node.name), result)
            return
        for index in range(len(node.types)):
            ref = Ref(node.name, index)
            if emitter.readers[ref]:
                emitter.set(ref, emitter.call(item, result, index))

    def finish(
        self, results: Sequence[Result], *, recompute: bool = False
    ) -> Callable[..., Sequence[Tensor]]:
        """Compile what was written to a function that gives these results."""
        return self.compiled([self._leaving(result) for result in results], recompute=recompute)

    def compiled(
        self, results: Sequence[fx.Node], *, recompute: bool = False
    ) -> Callable[..., Sequence[Tensor]]:
        """What was written as a function that gives these values."""
        graph = self.emitter.graph
        graph.output(tuple(results))
        graph.eliminate_dead_code(_has_effect)
        simplify(graph)
        if recompute:
            return recomputing(graph)
        module = fx.GraphModule(torch.nn.Module(), graph)
        # The plain function: a module call costs more than several small operators.
        forward: Callable[..., Sequence[Tensor]] = type(module).forward

        def run(*values: Tensor) -> Sequence[Tensor]:
            return forward(module, *values)

        return run

    def reads(self) -> list[int]:
        """How often the function's calls read each of its arguments."""
        counts: Counter[fx.Node] = Counter()
        for node in self.emitter.graph.nodes:
            fx.map_arg((node.args, node.kwargs), lambda given: counts.update([given]))
        return [counts[node] for node in self.emitter.graph.nodes if node.op == "placeholder"]

    def _leaving(self, result: Result) -> fx.Node:
        if not result.packed:
            return self.emitter.value(result.outputs[0].ref)
        whole = self.emitter.whole([output.ref for output in result.outputs])
        assert whole is not None
        return whole.node

    def _kernel(self, node: Node) -> Callable[..., Any]:
        if node.op == "cgo.batch_norm":
            alone = all(
                isinstance(argument, Ref) and self.emitter.readers[argument] == 1
                for argument in node.args[3:5]
            )
            if alone:
                self.emitter.written |= {Ref(node.name, 1), Ref(node.name, 2)}
            return batch_norm if alone else batch_norm_copying
        overload = aten(node.op)
        if overload is None:
            raise GraphError(f"%{node.name}: operator {node.op} has no kernel")
        return STANDS_IN.get(node.op, overload)  # type: ignore[no-any-return]

    def _argument(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return self.emitter.value(argument)
        if isinstance(argument, Symbol):
            return symbol_value(argument, self.emitter.device)
        if isinstance(argument, tuple):
            return [self._argument(item) for item in argument]
        return argument


#: Over images, whose memory format they keep.
_CONVOLUTIONS = {"aten.conv2d.default", "aten.conv2d.padding", "aten.conv_transpose2d.input"}


def _leaves_images(node: Node) -> bool:
    """Whether an operator's results may lie in memory as images do not."""
    type_ = node.types[0]
    return type_ is None or len(type_.shape) != IMAGES or node.op.startswith("aten.mean.")


#: What is called in an operator's place.
STANDS_IN = {
    # A lane of a packed value is not always contiguous.
    "aten.view.default": torch.ops.aten.reshape.default,
    "aten._unsafe_view.default": torch.ops.aten.reshape.default,
    # These give their argument itself, which then is no leaf any more and gets no gradient.
    "aten.lift.default": torch.ops.aten.alias.default,
    "aten.lift_fresh.default": torch.ops.aten.alias.default,
}


def _has_effect(node: fx.Node) -> bool:
    """Writing statistics is an effect; what else is not read need not be computed."""
    return node.op in ("placeholder", "output") or node.target in (batch_norm, trained)
