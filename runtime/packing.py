"""Packed state: one leaf tensor `(M, ...)` for parameters or buffers of one group.

Each model's own `Parameter` is a view into the leaf, and after a backward its `.grad` can be made a
view of the leaf's gradient; so any optimizer works per model, unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgo.graph import STATE, Graph, ModelId, Node, Ref, homes, inputs_of, is_training, program_of
from cgo.runtime.choice import LOOP
from cgo.runtime.emitter import runs
from cgo.runtime.gradients import Place, learning_places
from cgo.runtime.member import Member
from cgo.runtime.products import Products


@dataclass(frozen=True)
class Pack:
    """Sources that are one tensor: lane i is the parameter or buffer at `places[i]`."""

    names: tuple[str, ...]  # of the source nodes
    places: tuple[Place, ...]
    trainable: bool


def plan_packs(graph: Graph) -> tuple[Pack, ...]:
    """The packs that the groups of a graph ask for.

    A parameter is in one pack at most: where another group needs it in other company, its lane is
    taken out of the pack and stacked anew. What training reads is packed as training wants it, or
    not at all: evaluation pays less for stacking than every step would for taking it apart.
    """
    nodes = {node.name: node for node in graph.nodes}
    learning = learning_places(graph)
    packs: list[Pack] = []
    taken: set[str] = set()
    fused = [node for node in graph.nodes if not (node.group or "").endswith(LOOP)]
    groups = [members for members in runs(fused) if len(members) > 1]
    trained = {ref.name for n in graph.nodes if is_training(n) for ref in inputs_of(n)}
    for members in sorted(groups, key=lambda group: _urgency(group[0])):
        barred = taken if is_training(members[0]) else taken | trained
        for column in zip(*(tuple(inputs_of(member)) for member in members)):
            pack = _pack(nodes, column, learning)
            if pack is not None and barred.isdisjoint(pack.names):
                packs.append(pack)
                taken.update(pack.names)
    return tuple(packs)


def _urgency(node: Node) -> tuple[bool, int]:
    """Training before evaluation, large batches before small ones."""
    split, _, size = program_of(node).partition("/")
    return split != "train", -int(size)


def _pack(
    nodes: Mapping[str, Node], column: Sequence[Ref], learning: frozenset[Place]
) -> Pack | None:
    sources = [nodes[ref.name] for ref in column]
    names = tuple(source.name for source in sources)
    if len(set(names)) < len(names) or any(source.op not in STATE for source in sources):
        return None
    places = tuple(homes(source)[0] for source in sources)
    if len({place in learning for place in places}) > 1:
        return None  # one leaf cannot give a gradient to some lanes and None to others
    if len({(source.op, source.types) for source in sources}) > 1:
        return None
    return Pack(names, places, places[0] in learning)


class PackedState:
    """The leaves of the packs of the models that run now."""

    def __init__(self, packs: Sequence[Pack], members: Mapping[ModelId, Member]) -> None:
        self.packs = tuple(packs)
        self.leaves: dict[tuple[str, ...], Tensor] = {}
        self.place: dict[Place, Tensor] = {}  # the leaf in which a parameter or buffer lies
        self.held: set[int] = set()  # ids of the models' own tensors that lie in a pack
        self.learning: list[tuple[Tensor, list[Tensor]]] = []  # leaf, its lanes' own parameters
        for pack in packs:
            own = [members[model].state.tensors[path] for model, path in pack.places]
            leaf = torch.stack([tensor.detach() for tensor in own])
            rehome(own, leaf)
            if pack.trainable:
                leaf.requires_grad_(True)
                self.learning.append((leaf, own))
            self.leaves[pack.names] = leaf
            self.place |= dict.fromkeys(pack.places, leaf)
            self.held.update(map(id, own))
        self.products = Products()
        self._handed_out = False

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        for leaf, _ in self.learning:
            leaf.grad = None
        self.products.clear()
        self._handed_out = False

    def gradients(self) -> list[tuple[list[ModelId], Tensor]]:
        """This step's gradients of leaves, each with its lanes' models; they may be changed."""
        for leaf, _ in self.learning:
            self.products.drop(leaf)
        found = [([m for m, _ in pack.places], self.leaves[pack.names].grad) for pack in self.packs]
        return [(models, gradient) for models, gradient in found if gradient is not None]

    def hand_out_gradients(self, *, anew: bool = False) -> None:
        """Give each model's parameter its lane of the gradient, as a view; once a step."""
        if self._handed_out and not anew:
            return
        self._handed_out = True
        for leaf, own in self.learning:
            self.products.compute(leaf)
            if leaf.grad is not None:
                for parameter, lane in zip(own, leaf.grad.unbind(0)):
                    parameter.grad = lane


def rehome(own: Sequence[Tensor], leaf: Tensor) -> None:
    """Make models' own tensors views of a leaf's lanes; their identity stays, for optimizers."""
    for tensor, lane in zip(own, leaf.detach().unbind(0)):
        tensor.data = lane


def release(member: Member, held: Collection[int]) -> None:
    """Give tensors that are in no pack any more memory of their own, so that it can be freed.

    Args:
        member: Whose tensors.
        held: Those that are in a pack, by `id`.
    """
    for tensor in member.state.tensors.values():
        own = tensor.numel() * tensor.element_size()
        if id(tensor) not in held and tensor.untyped_storage().nbytes() > own:
            tensor.data = tensor.detach().clone()
