"""Models to devices by estimated memory and work; what shares stems and groups stays together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cgo.errors import PlacementError
from cgo.graph import (
    HANDED,
    SOURCES,
    STATE,
    Graph,
    ModelId,
    Node,
    Ref,
    bytes_of,
    homes,
    inputs_of,
)
from cgo.passes.balance import Bin, Item, Share, pack
from cgo.passes.sharing import pure
from cgo.passes.work import Ceilings, is_view, needing_gradients, step_seconds, training_step


@dataclass(frozen=True)
class Target:
    """A device that models may be placed on.

    Args:
        name: Unique among the targets: "cuda:0".
        memory_bytes: What models may fill of it.
        speed: Relative to the device that `Need.work_s` was estimated for.
    """

    name: str
    memory_bytes: int
    speed: float = 1.0


@dataclass(frozen=True)
class Need:
    """What a model takes, trained alone.

    Args:
        state_bytes: Held all the time: parameters (frozen ones too), buffers, gradients, moments.
        step_bytes: Activations of a step. Models of one device take turns, so the largest counts
            once a device.
        work_s: Seconds of a step at speed 1, shared stems included.
    """

    state_bytes: int
    step_bytes: int
    work_s: float


@dataclass(frozen=True)
class Feed:
    """A node of a shared stem that one device computes and copies to others in each step.

    Args:
        home: The target that computes it.
        receivers: The targets that get it, and so need not compute what only it depends on.
        outputs: Numbers of the node's outputs that are copied.
        bytes: Size of these outputs: what each receiver gets in a step.
    """

    home: str
    receivers: tuple[str, ...]
    outputs: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Placement:
    """Where each model trains.

    Args:
        targets: The name of its target, for each model that has one.
        makespan_s: Seconds of a step on the target that ends last, copies included.
        bound_s: Seconds that no placement of these models can go under.
        feeds: By the name of the node; in the training program with the largest batch.
        unplaced: Why a model fits on no target.
    """

    targets: Mapping[ModelId, str]
    makespan_s: float
    bound_s: float
    feeds: Mapping[str, Feed]
    unplaced: Mapping[ModelId, str]


def place(
    graph: Graph,
    needs: Mapping[ModelId, Need],
    targets: Sequence[Target],
    *,
    transfer_bytes_per_s: float = 50e9,
) -> Placement:
    """Give every model a target.

    No target's memory is exceeded. Within 10% of the least possible makespan, models that share
    nodes or stand in the same groups are kept together. What several models of a target share is
    computed and held once there. A frozen, deterministic stem of models on several targets is
    computed by each of them, or by one that feeds the others where copying takes less time.

    Args:
        graph: All models' programs, merged; groups as `batch_operators` left them.
        needs: Of each model; models that the graph does not hold (opaque ones) share nothing.
        targets: At least one. Neither their order nor that of `needs` matters.
        transfer_bytes_per_s: Rate of copies between any two targets.

    Returns:
        The placement. What is shared is charged by the part that `estimate_work` gives it of its
        models' `work_s`; the bytes of what may be fed are reserved wherever its models are.

    Raises:
        PlacementError: there is no target, two have one name, a number is no size, speed or time,
            or a model of the graph has no need.
    """
    _check(graph, needs, targets, transfer_bytes_per_s)
    problem = _Problem(graph, needs, targets, transfer_bytes_per_s)
    where = pack(problem.items, problem.shares, problem.bins, problem.bound(problem.models))
    on: list[set[ModelId]] = [set() for _ in problem.targets]
    for model, target in zip(problem.models, where):
        if target is not None:
            on[target].add(model)
    loads, feeds = problem.settle(on)
    names = [None if index is None else problem.targets[index].name for index in where]
    placed = {model: name for model, name in zip(problem.models, names) if name is not None}
    return Placement(
        placed,
        max(loads),
        problem.bound([model for model in problem.models if model in placed]),
        feeds,
        {m: problem.reason(m, on) for m in problem.models if m not in placed},
    )


def estimate_needs(
    graph: Graph,
    ceilings: Ceilings | None = None,
    moments: Mapping[ModelId, int] | None = None,
) -> Mapping[ModelId, Need]:
    """What each model of a graph takes, from shapes alone.

    Args:
        graph: Models' programs, merged or not.
        ceilings: Of the device at speed 1.
        moments: Tensors of optimizer state for each trained parameter; 2 where not given.

    Returns:
        For each model: state with gradients and moments; the bytes of all inputs and results of
        its training step (a peak from above: nothing is freed before the backward); seconds by
        `estimate_work`.
    """
    step = training_step(graph)
    work = step_seconds(step, ceilings)
    state: dict[ModelId, int] = {output.model: 0 for output in graph.outputs}
    active = dict.fromkeys(state, 0)
    seconds = dict.fromkeys(state, 0.0)
    for node in graph.nodes:
        if _is_state(node):
            trained = node.op == "cgo.parameter" and node.keyword("trainable") is not False
            for model in node.owners:
                copies = 2 + (moments or {}).get(model, 2) if trained else 1
                state[model] += copies * _size(node)
    for node in step.nodes:
        held = 0 if _is_state(node) or is_view(node.op) else _size(node)
        for model in node.owners:
            active[model] += held
            seconds[model] += work[node.name]
    return {model: Need(state[model], active[model], seconds[model]) for model in state}


def _is_state(node: Node) -> bool:
    return node.op in STATE or node.op == "cgo.constant"


def _size(node: Node) -> int:
    return sum(map(bytes_of, node.types))


def _check(
    graph: Graph, needs: Mapping[ModelId, Need], targets: Sequence[Target], rate: float
) -> None:
    if not targets:
        raise PlacementError("there is no target to place models on; give at least one")
    names = [target.name for target in targets]
    for target in targets:
        if names.count(target.name) > 1:
            raise PlacementError(f"two targets are called {target.name!r}; name them apart")
        if not (0 < target.speed < math.inf) or target.memory_bytes < 0:
            raise PlacementError(
                f"target {target.name!r}: speed {target.speed} and {target.memory_bytes} bytes of "
                "memory; a speed is positive and finite, memory at least 0"
            )
    for model, need in needs.items():
        sizes = (need.state_bytes, need.step_bytes, need.work_s)
        if not all(0 <= size < math.inf for size in sizes):
            raise PlacementError(f"model {model!r} needs {need}; give numbers of at least 0")
    missing = sorted({output.model for output in graph.outputs} - set(needs))
    if missing:
        raise PlacementError(f"models {missing} of the graph have no need; give one for each")
    if not rate > 0:
        raise PlacementError(f"transfer_bytes_per_s is {rate}; give a positive rate")


@dataclass
class _Value:
    """A stem's node that is read outside the stem."""

    node: Node
    outputs: set[int] = field(default_factory=set)  # that are read
    models: set[ModelId] = field(default_factory=set)  # that read it in nodes of their own
    stems: set[_Stem] = field(default_factory=set)  # others that read it

    @property
    def bytes(self) -> int:
        return sum(bytes_of(self.node.types[index]) for index in self.outputs)


@dataclass(eq=False)
class _Stem:
    """Nodes that exactly these models need, and that are all steady or all not."""

    owners: frozenset[ModelId]
    steady: bool  # may be fed
    estimate_s: float = 0.0
    work_s: float = 0.0  # the estimate at the scale of the models' own figures
    held_bytes: int = 0  # parameters and buffers
    values: dict[str, _Value] = field(default_factory=dict)  # of a steady stem, by node

    @property
    def fed_bytes(self) -> int:
        return sum(value.bytes for value in self.values.values())


class _Problem:
    """Models, targets and what models share, in a fixed order."""

    def __init__(
        self,
        graph: Graph,
        needs: Mapping[ModelId, Need],
        targets: Sequence[Target],
        rate: float,
    ) -> None:
        self.models = sorted(needs)
        self.place = {model: index for index, model in enumerate(self.models)}
        self.needs = needs
        self.targets = sorted(targets, key=lambda target: (-target.speed, target.name))
        self.rate = rate
        step = training_step(graph)
        self.stems = _stems(graph, step, needs)
        self.stems_of: dict[ModelId, list[int]] = {model: [] for model in self.models}
        for index, stem in enumerate(self.stems):
            for model in stem.owners:
                self.stems_of[model].append(index)
        self.own_s = {model: self._own_s(model) for model in self.models}
        self.shares = [self._share(stem) for stem in self.stems]
        groups = _groups(step)
        self.items = [self._item(model, frozenset(groups[model])) for model in self.models]
        self.bins = [Bin(target.speed, target.memory_bytes) for target in self.targets]

    def _own_s(self, model: ModelId) -> float:
        shared = math.fsum(self.stems[index].work_s for index in self.stems_of[model])
        return max(0.0, self.needs[model].work_s - shared)

    def _share(self, stem: _Stem) -> Share:
        if not stem.steady:
            return Share(stem.work_s, stem.held_bytes)
        received = stem.fed_bytes / self.rate
        slowest = min(target.speed for target in self.targets)
        fed = len(self.targets) > 1 and received < stem.work_s / slowest
        held = stem.held_bytes + (stem.fed_bytes if fed else 0)
        return Share(stem.work_s, held, received)

    def _item(self, model: ModelId, groups: frozenset[str]) -> Item:
        need, shares = self.needs[model], tuple(self.stems_of[model])
        held = need.state_bytes - sum(self.stems[index].held_bytes for index in shares)
        return Item(self.own_s[model], max(0, held), need.step_bytes, shares, groups)

    def bound(self, models: Sequence[ModelId]) -> float:
        """All work once on all targets, or the largest piece on the fastest of them."""
        needed = [self.stems[i] for i in sorted({i for m in models for i in self.stems_of[m]})]
        total = math.fsum([*(self.own_s[m] for m in models), *(stem.work_s for stem in needed)])
        pieces = [stem.work_s for stem in needed]
        for model in models:
            stems = (self.stems[index] for index in self.stems_of[model])
            fixed = math.fsum(stem.work_s for stem in stems if not stem.steady)
            pieces.append(self.own_s[model] + fixed)
        speeds = math.fsum(target.speed for target in self.targets)
        fastest = self.targets[0].speed
        return max(total / speeds, max(pieces, default=0.0) / fastest)

    def settle(self, on: Sequence[set[ModelId]]) -> tuple[list[float], dict[str, Feed]]:
        """The seconds of each target, and which stems feed others.

        Stems are gone through from their users to their producers: a stem that is read on a
        target only by stems fed to it is neither computed nor fed there.
        """
        loads = [
            math.fsum(self.own_s[model] for model in sorted(models)) / target.speed
            for models, target in zip(on, self.targets)
        ]
        computed: list[set[_Stem]] = [set() for _ in on]
        feeds: dict[str, Feed] = {}
        for stem in self.stems:
            read = {
                index: _read(stem, models, computed[index])
                for index, models in enumerate(on)
                if not stem.owners.isdisjoint(models)
            }
            if stem.steady:
                read = {index: values for index, values in read.items() if values}
            home = min(
                read, key=lambda i: (loads[i] + stem.work_s / self.targets[i].speed, i), default=-1
            )
            for index, values in read.items():
                local_s = stem.work_s / self.targets[index].speed
                fed_s = sum(value.bytes for value in values) / self.rate
                if index == home or not stem.steady or local_s <= fed_s:
                    computed[index].add(stem)
                    loads[index] += local_s
                else:
                    loads[index] += fed_s
                    for value in values:
                        self._feed(feeds, value, home, index)
        return loads, feeds

    def _feed(self, feeds: dict[str, Feed], value: _Value, home: int, to: int) -> None:
        """Note that a value is copied."""
        name, source = value.node.name, self.targets[home].name
        feed = feeds.get(name, Feed(source, (), tuple(sorted(value.outputs)), value.bytes))
        receivers = tuple(sorted({*feed.receivers, self.targets[to].name}))
        feeds[name] = replace(feed, receivers=receivers)

    def reason(self, model: ModelId, on: Sequence[set[ModelId]]) -> str:
        """Why a model has no target."""
        alone = self._needed(model, set())
        largest = max(self.targets, key=lambda target: target.memory_bytes)
        if alone > largest.memory_bytes:
            return (
                f"needs {alone} bytes alone; the largest target, {largest.name!r}, has "
                f"{largest.memory_bytes}"
            )
        missing, name = min(
            (self._needed(model, models) - target.memory_bytes, target.name)
            for models, target in zip(on, self.targets)
        )
        return (
            f"fits on an empty target, but on none beside the others: on {name!r} {missing} bytes "
            "are missing; train it in another trial"
        )

    def _needed(self, model: ModelId, others: set[ModelId]) -> int:
        """The bytes of a target with a model and others on it."""
        rows = [self.items[self.place[other]] for other in {model, *others}]
        shares = {index for item in rows for index in item.shares}
        held = sum(item.held_bytes for item in rows)
        held += sum(self.shares[index].held_bytes for index in shares)
        return held + max(item.step_bytes for item in rows)


def _read(stem: _Stem, models: set[ModelId], computed: set[_Stem]) -> list[_Value]:
    """The values of a stem that are read on a target with these models and other stems."""
    return [
        value
        for value in stem.values.values()
        if not (value.models.isdisjoint(models) and value.stems.isdisjoint(computed))
    ]


def _groups(step: Graph) -> Mapping[ModelId, set[str]]:
    """The groups that each model has nodes in."""
    found: dict[ModelId, set[str]] = defaultdict(set)
    for node in step.nodes:
        if node.group is not None:
            for model in node.owners:
                found[model].add(node.group)
    return found


def _stems(graph: Graph, step: Graph, needs: Mapping[ModelId, Need]) -> list[_Stem]:
    """What several models share, users before producers; a producer has all its users' owners."""
    work = step_seconds(step)
    steady = _steady(graph, step)
    found: dict[tuple[frozenset[ModelId], bool], _Stem] = {}
    totals: dict[frozenset[ModelId], float] = defaultdict(float)
    stem_of: dict[str, _Stem] = {}

    def stem(node: Node, is_steady: bool) -> _Stem:
        return found.setdefault((node.owners, is_steady), _Stem(node.owners, is_steady))

    for node in graph.nodes:
        if _is_state(node) and len(node.owners) > 1:
            stem(node, False).held_bytes += _size(node)
    for node in step.nodes:
        totals[node.owners] += work[node.name]
        if node.op not in HANDED and len(node.owners) > 1:
            stem_of[node.name] = mine = stem(node, node.name in steady)
            mine.estimate_s += work[node.name]
    _find_values(step, stem_of)
    _scale(found.values(), totals, needs)
    return sorted(found.values(), key=lambda s: (len(s.owners), s.steady, sorted(s.owners)))


def _steady(graph: Graph, step: Graph) -> set[str]:
    """Operators whose value depends on inputs and on what never changes."""
    changing = {(o.model, o.key) for o in graph.outputs if o.role == "update"}
    unsteady = needing_gradients(step)
    unsteady |= {output.ref.name for output in step.outputs if output.role == "update"}
    found: set[str] = set()
    for node in step.nodes:
        if node.op == "cgo.buffer" and not changing.isdisjoint(homes(node)):
            unsteady.add(node.name)
        elif node.op not in SOURCES:
            if node.name in unsteady or not pure(node) or _reads(node, unsteady):
                unsteady.add(node.name)
            else:
                found.add(node.name)
    return found


def _reads(node: Node, names: Collection[str]) -> bool:
    return any(ref.name in names for ref in inputs_of(node))


def _find_values(step: Graph, stem_of: Mapping[str, _Stem]) -> None:
    """Note for each steady stem what others read of it."""
    made = {node.name: node for node in step.nodes}

    def value_of(ref: Ref) -> _Value | None:
        stem = stem_of.get(ref.name)
        if stem is None or not stem.steady:
            return None
        value = stem.values.setdefault(ref.name, _Value(made[ref.name]))
        value.outputs.add(ref.index)
        return value

    for node in step.nodes:
        mine = stem_of.get(node.name)
        for ref in inputs_of(node):
            if mine is not None and mine is stem_of.get(ref.name):
                continue
            value = value_of(ref)
            if value is not None and mine is not None:
                value.stems.add(mine)
            elif value is not None:
                value.models |= node.owners
    for output in step.outputs:
        value = value_of(output.ref)
        if value is not None:
            value.models.add(output.model)


def _scale(
    stems: Collection[_Stem],
    totals: Mapping[frozenset[ModelId], float],
    needs: Mapping[ModelId, Need],
) -> None:
    """Give each stem the seconds that its estimated part of its models' work stands for.

    The least of what its models' figures say: then no model's shared parts exceed its whole.
    """
    parts: dict[ModelId, list[float]] = defaultdict(list)
    for owners, estimate in totals.items():
        for model in owners:
            parts[model].append(estimate)
    whole = {model: math.fsum(estimates) for model, estimates in parts.items()}
    for stem in stems:
        if stem.estimate_s > 0:
            stem.work_s = min(
                needs[model].work_s * stem.estimate_s / whole[model] for model in stem.owners
            )
