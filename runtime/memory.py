"""How much memory merged training takes, told before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cgo.errors import GraphError
from cgo.graph import (
    HANDED,
    STATE,
    Graph,
    ModelId,
    Node,
    Ref,
    TensorType,
    bytes_of,
    homes,
    inputs_of,
    program_of,
    programs,
    restrict,
)
from cgo.model import TrainingSpec
from cgo.passes.sharing import argument_key
from cgo.private.allocations import block
from cgo.runtime.builder import Source
from cgo.runtime.choice import LOOP, Choice, rules_for
from cgo.runtime.gradients import Place, learning_places
from cgo.runtime.lower import lower
from cgo.runtime.packing import Pack, plan_packs
from cgo.runtime.rehearsal import Held, rehearse_program
from cgo.runtime.update_memory import update_held

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """Memory of merged training by purpose, all in bytes.

    Args:
        parameters: Of all models.
        buffers: Of all models, with constants, and the copies by which a failed step is undone.
        gradients: Of the parameters that learn.
        moments: What optimizers keep from step to step.
        inputs: One batch, and the random tensors that are drawn for it.
        step: What the peak has on top: activations that autograd keeps, and temporary values of
            forward, backward and optimizers.
    """

    parameters: int
    buffers: int
    gradients: int
    moments: int
    inputs: int
    step: int

    @property
    def state(self) -> int:
        """What is there between a step's backward and its end, whatever the step computes."""
        return self.parameters + self.buffers + self.gradients + self.moments

    @property
    def peak(self) -> int:
        """The most that is allocated at any one time."""
        return self.state + self.inputs + self.step


class Known(NamedTuple):
    """What was found out about one program."""

    held: Held
    copied: int  # bytes of the buffers that a step writes


#: Programs that differ in names alone hold alike. One dictionary may serve many estimates.
Cache = MutableMapping[object, Known]


def estimate(
    graph: Graph,
    trainings: Mapping[ModelId, TrainingSpec],
    models: Sequence[ModelId] | None = None,
    *,
    program: str | None = None,
    choice: Choice | None = None,
    device_type: str = "cpu",
    cache: Cache | None = None,
) -> Estimate:
    """What training the models of a graph together takes; nothing of it is allocated.

    It counts the first step, in which the optimizers' state is arranged, and those that follow.
    What kernels take as workspace, what an allocator cannot use, what a device's libraries take for
    themselves and the data set are not in it.

    Args:
        graph: The merged graph.
        trainings: How each model is trained.
        models: Those that run; default is all.
        program: The training program, such as "train/64"; default is that of the largest batch.
        choice: How the models are executed, where that is known; default is by rules.
        device_type: "cpu" or "cuda".
        cache: What earlier calls found out about programs; new findings are added.

    Raises:
        GraphError: the graph has no such program, or a model of it no training spec.
    """
    models = tuple(models if models is not None else dict.fromkeys(o.model for o in graph.outputs))
    if missing := sorted(set(models) - set(trainings)):
        raise GraphError(f"no training spec for {', '.join(missing)}; hand over one for each model")
    part = restrict(graph, models=set(models))
    chosen = choice or rules_for(torch.device(device_type))(part, models)
    program = program or _largest(part)
    state = _State(chosen.graph)
    found = _programs(chosen, program, state, device_type, {} if cache is None else cache)
    computing = _in_turn([known.held for known in found])
    specs = {model: trainings[model] for model in models}
    updating = update_held(state.types, state.learning, state.packs, specs, device_type)
    return Estimate(
        parameters=_owned(part, "cgo.parameter"),
        buffers=_owned(part, "cgo.buffer") + _constants(part) + sum(k.copied for k in found),
        gradients=computing.after,
        moments=updating.after,
        inputs=_inputs(restrict(part, program=program)),
        step=max(computing.highest - computing.after, updating.highest - updating.after),
    )


#: What a step holds at most, as a multiple of all that its operators give: that, the gradients of
#: it, and forms that have parts of their own (copies between layouts, spelled-out norms).
_HELD = 4

#: Likewise of parameters: themselves, gradients, flat copies of both, and up to three moments.
_ARRANGED = 8

#: Recurrent layers keep their gates for each step, of which they give the last state alone.
_GATES = 16


def at_most(graph: Graph) -> int:
    """A bound on `Estimate.peak`, in bytes, in the time that it takes to look at each node."""
    types = {node.name: node.types for node in graph.nodes}
    given = {name: 0 for name in programs(graph) if name.startswith("train/")}
    for node in graph.nodes:
        if node.op not in STATE and (name := program_of(node)) in given:
            given[name] += sum(map(bytes_of, node.types)) + _inside(node, types)
    state = _owned(graph, "cgo.parameter") + _owned(graph, "cgo.buffer")
    return _HELD * max(given.values(), default=0) + _ARRANGED * state + _constants(graph)


def _inside(node: Node, types: Mapping[str, tuple[TensorType | None, ...]]) -> int:
    """What an operator of many parts keeps beside what it gives."""
    operator = node.op.split(".")[1]
    if operator in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return _GATES * sum(map(bytes_of, node.types))
    if "attention" not in operator:
        return 0
    query, key = (types[ref.name][ref.index] for ref in tuple(inputs_of(node))[:2])
    if query is None or key is None:
        return 0
    return bytes_of(query) // query.shape[-1] * key.shape[-2]  # the weights


def measured_peak(action: Callable[[], object]) -> int:
    """The most bytes that are allocated on the CPU in a call, of those that it allocates itself.

    Seen by torch's profiler: every block that the allocator gives, those inside kernels too. It
    slows the call down, and keeps a record of each block until the call returns.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        action()
    taken: dict[int, int] = {}
    highest = now = 0
    for address, size in _blocks(seen):
        # Of a block that was there before, the profiler may believe anything.
        change = size if size > 0 else -taken.pop(address, 0)
        if size > 0:
            taken[address] = size
        now += change
        highest = max(highest, now)
    return highest


def _blocks(seen: torch.profiler.profile) -> list[tuple[int, int]]:
    """Addresses and sizes of blocks in the order in which they came and, below zero, went."""
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    pending = list(seen.profiler.kineto_results.experimental_event_tree())
    found = []
    while pending:
        event = pending.pop()
        pending += event.children
        if (taken := block(event.extra_fields)) is not None:
            found.append((event.start_time_ns, *taken))
    return [(address, size) for _, address, size in sorted(found)]


# --- what a graph says ----------------------------------------------------------------------------


def _largest(graph: Graph) -> str:
    """The training program of the largest batch."""
    found = [name for name in programs(graph) if name.startswith("train/")]
    if not found:
        raise GraphError("the graph has no training program, so there is no step to estimate")
    return max(found, key=lambda name: int(name.partition("/")[2]))


def _owned(graph: Graph, op: str) -> int:
    """Parameters or buffers; each model has its own, shared nodes or not."""
    return sum(bytes_of(n.types[0]) * len(homes(n)) for n in graph.nodes if n.op == op)


def _constants(graph: Graph) -> int:
    contents = {n.keyword("content"): n.types[0] for n in graph.nodes if n.op == "cgo.constant"}
    return sum(map(bytes_of, contents.values()))


def _inputs(graph: Graph) -> int:
    """One batch of each data set, and the random tensors of a step."""
    leaves = {
        (node.keyword("data"), node.keyword("leaf")): node.types[0]
        for node in graph.nodes
        if node.op == "cgo.input"
    }
    drawn = [node.types[0] for node in graph.nodes if node.op == "cgo.random"]
    return sum(map(bytes_of, [*leaves.values(), *drawn]))


class _State:
    """Parameters as training arranges them."""

    def __init__(self, graph: Graph) -> None:
        self.packs = plan_packs(graph)
        self.learning = learning_places(graph)
        self.pack: dict[str, tuple[Pack, int]] = {
            name: (pack, lane) for pack in self.packs for lane, name in enumerate(pack.names)
        }
        self.types: dict[Place, TensorType] = {}
        for node in graph.nodes:
            if node.op == "cgo.parameter" and node.types[0] is not None:
                self.types |= dict.fromkeys(homes(node), node.types[0])

    def learns(self, source: Source) -> bool:
        """Whether a source gets a gradient."""
        node = source.nodes[0]
        if source.packed:
            return node.name in self.pack and self.pack[node.name][0].trainable
        trainable = node.op == "cgo.parameter" and node.keyword("trainable") is True
        return trainable and not self.learning.isdisjoint(homes(node))


# --- programs -------------------------------------------------------------------------------------


def _in_turn(programs: Sequence[Held]) -> Held:
    """Of programs that run one after another, each on top of the gradients of those before."""
    highest = after = 0
    for held in programs:
        highest = max(highest, after + held.highest)
        after += held.after
    return Held(highest, after)


def _programs(
    chosen: Choice, program: str, state: _State, device_type: str, cache: Cache
) -> list[Known]:
    found = []
    for ids in chosen.programs:
        part = restrict(chosen.graph, models=set(ids), program=program)
        key = (device_type, chosen.recompute, *_form(part, chosen, state))
        if key not in cache:
            cache[key] = _rehearsed(part, program, chosen, state, device_type)
        found.append(cache[key])
    return found


def _rehearsed(part: Graph, program: str, chosen: Choice, state: _State, device_type: str) -> Known:
    last = chosen.images_last if device_type == "cpu" else bool(chosen.images_last)
    lowered = lower(
        part,
        program,
        _CPU,
        state.packs,
        ways=chosen.ways,
        images_last=last,
        recompute=chosen.recompute,
    )
    types = {node.name: node.types for node in part.nodes}
    updates = [output for result in lowered.results for output in result.outputs]
    written = [*lowered.written, *(output for output in updates if output.role == "update")]
    copied = sum(bytes_of(types[output.ref.name][output.ref.index]) for output in written)
    return Known(rehearse_program(lowered, state.learns, device_type), copied)


#: What tells sources apart, and not what they hold.
_IDENTITY = frozenset({"model", "path", "content", "twins", "data", "order"})


def _form(part: Graph, chosen: Choice, state: _State) -> tuple[object, ...]:
    """Equal for programs that differ in the names of nodes, groups and models alone."""
    form = _Form(chosen, state)
    rows = tuple(form.row(node) for node in part.nodes if node.op not in HANDED)
    outputs = tuple(form.output(o.model, o.role, o.key, o.ref) for o in part.outputs)
    # What is handed over stands in no order of its own: that of its readers.
    handed = [node for node in part.nodes if node.op in HANDED]
    handed.sort(key=lambda node: form.number("node", node.name))
    return rows, outputs, tuple(map(form.row, handed))


class _Form:
    """Numbers what has a name, in order of appearance."""

    def __init__(self, chosen: Choice, state: _State) -> None:
        self.chosen, self.state = chosen, state
        self.numbers: dict[object, int] = {}

    def number(self, kind: str, name: object) -> int:
        return self.numbers.setdefault((kind, name), len(self.numbers))

    def ref(self, ref: Ref) -> tuple[int, int]:
        return self.number("node", ref.name), ref.index

    def row(self, node: Node) -> tuple[object, ...]:
        refs: list[Ref] = []
        kwargs = tuple((key, value) for key, value in node.kwargs if key not in _IDENTITY)
        arguments = argument_key(node.args, refs), argument_key(kwargs, refs)
        name = self.number("node", node.name)
        reads = tuple(map(self.ref, refs))
        return name, node.op, arguments, reads, node.types, node.autocast, *self.place(node)

    def place(self, node: Node) -> tuple[object, ...]:
        """Its group and how that is executed; of state its homes, and its lane in a pack."""
        group = node.group and self.number("group", node.group), (node.group or "").endswith(LOOP)
        way = self.chosen.ways.get(node.group or "")
        own = tuple((self.number("model", model), path) for model, path in homes(node))
        pack, lane = self.state.pack.get(node.name, (None, 0))
        packed = pack and (self.number("pack", pack.names), lane, len(pack.names), pack.trainable)
        learns = node.op in STATE and self.state.learns(Source((node,)))
        return group, way, own, packed, learns

    def output(self, model: ModelId, role: str, key: str, ref: Ref) -> tuple[object, ...]:
        return self.number("model", model), role, key, self.ref(ref)
