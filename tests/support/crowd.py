"""Many models written by hand: stems that several share, groups, and work of unlike size."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cgo.graph import Graph, Node, Output, Ref, TensorType, prune


@dataclass(frozen=True)
class Candidate:
    """A model: a stem's layers (shared by name), then layers of its own."""

    model: str
    stems: tuple[tuple[str, int], ...]  # name and width, from the input on
    widths: tuple[int, ...]  # of its own layers
    batch: int = 32


def crowd(candidates: Sequence[Candidate], features: int = 16) -> Graph:
    """The merged graph, grouped: layers of one shape at one depth stand together."""
    owners: dict[str, set[str]] = defaultdict(set)
    nodes: dict[str, Node] = {}
    outputs = []
    for candidate in candidates:
        build = _Builder(candidate, nodes, owners)
        outputs.append(build.train(features))
    everyone = (replace(n, owners=frozenset(owners[n.name])) for n in nodes.values())
    return prune(Graph(tuple(_grouped(list(everyone))), tuple(outputs)))


class _Builder:
    def __init__(self, candidate, nodes, owners):
        self.candidate, self.nodes, self.owners = candidate, nodes, owners

    def add(self, name, op, *args, shape, **kwargs):
        kind = TensorType("float32", shape)
        self.owners[name].add(self.candidate.model)
        keywords = tuple(sorted(kwargs.items()))
        none = frozenset({self.candidate.model})
        self.nodes.setdefault(name, Node(name, op, args, keywords, (kind,), none))
        return Ref(name)

    def linear(self, name, x, wide, width, trainable, depth):
        weight = self.add(
            f"{name}.weight",
            "cgo.parameter",
            shape=(width, wide),
            content="" if trainable else name,
            model=self.candidate.model,
            path=name,
            trainable=trainable,
        )
        program = f"train/{self.candidate.batch}"
        return self.add(
            f"{name}/{program}/linear_{depth}",
            "aten.linear.default",
            x,
            weight,
            shape=(self.candidate.batch, width),
        )

    def train(self, features):
        program = f"train/{self.candidate.batch}"
        data = {"data": "d", "leaf": "input", "size": self.candidate.batch, "split": "train"}
        shape = (self.candidate.batch, features)
        x, wide = self.add(f"d/{program}/input", "cgo.input", shape=shape, **data), features
        for depth, (name, width) in enumerate(self.candidate.stems):
            x, wide = self.linear(name, x, wide, width, False, depth), width
        for depth, width in enumerate(self.candidate.widths):
            name = f"{self.candidate.model}.{depth}"
            x, wide = self.linear(name, x, wide, width, True, depth), width
        return Output(self.candidate.model, program, "loss", "", x)


def _grouped(nodes):
    """Own layers of one shape at one depth side by side, behind all that is shared."""
    types = {node.name: node.types[0].shape for node in nodes}
    runs = defaultdict(list)
    first, own = [], []
    for node in nodes:
        if node.op == "aten.linear.default" and node.name.startswith(f"{min(node.owners)}."):
            depth = int(node.name.rpartition("_")[2])
            runs[depth, types[node.args[0].name], node.types[0].shape].append(node)
        else:
            first.append(node)
    for number, key in enumerate(sorted(runs)):
        group = f"g{number}" if len(runs[key]) > 1 else None
        own += [replace(node, group=group) for node in runs[key]]
    return [*first, *own]


def mixed(count: int, seed: int = 0, stems: int = 6) -> list[Candidate]:
    """Models of 20 families, some behind a shared stem, the largest a hundred times the least."""
    dice = random.Random(seed)
    families = [
        (
            tuple(2 ** dice.randint(3, 8) for _ in range(dice.randint(1, 6))),
            dice.randrange(stems * 2),
        )
        for _ in range(20)
    ]
    found = []
    for number in range(count):
        widths, stem = dice.choice(families)
        chain = ((f"stem{stem}", 256), (f"stem{stem}.deep", 128)) if stem < stems else ()
        found.append(Candidate(f"m{number:04}", chain, widths))
    return found
