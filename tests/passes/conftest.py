"""Small graphs, written by hand."""

from __future__ import annotations

import pytest

from cgo.graph import Argument, Graph, Node, Output, Ref, TensorType, prune

DEFAULT = TensorType("float32", (4, 8))


class Sketch:
    """Builds one model's graph node by node; every method returns the new value's reference."""

    def __init__(self, model: str, data: str = "digits") -> None:
        self.model = model
        self.data = data
        self.nodes: list[Node] = []
        self.outputs: list[Output] = []

    def add(
        self,
        name: str,
        op: str,
        *args: Argument,
        types: tuple[TensorType | None, ...] = (DEFAULT,),
        autocast: str | None = None,
        **kwargs: Argument,
    ) -> Ref:
        name = f"{self.model}.{name}"
        keywords = tuple(sorted(kwargs.items()))
        owners = frozenset({self.model})
        self.nodes.append(Node(name, op, args, keywords, types, owners, autocast))
        return Ref(name)

    def input(self, leaf: str = "input", split: str = "train", size: int = 4) -> Ref:
        name = leaf if split == "train" else f"{split}.{leaf}"
        kwargs = {"data": self.data, "leaf": leaf, "size": size, "split": split}
        return self.add(name, "cgo.input", types=(TensorType("float32", (size, 8)),), **kwargs)

    def parameter(self, path: str, *shape: int, content: str = "") -> Ref:
        """Trainable, unless it has a content."""
        kwargs = {"content": content, "model": self.model, "path": path, "trainable": not content}
        return self.add(path, "cgo.parameter", types=(TensorType("float32", shape),), **kwargs)

    def buffer(self, path: str, *shape: int, content: str, dtype: str = "float32") -> Ref:
        kwargs = {"content": content, "model": self.model, "path": path}
        return self.add(path, "cgo.buffer", types=(TensorType(dtype, shape),), **kwargs)

    def constant(self, name: str, *shape: int, content: str) -> Ref:
        return self.add(
            name, "cgo.constant", types=(TensorType("float32", shape),), content=content
        )

    def random(self, order: int = 0) -> Ref:
        kwargs = {"distribution": "dropout", "model": self.model, "order": order, "p": 0.5}
        return self.add(f"random_{order}", "cgo.random", **kwargs)

    def out(self, ref: Ref, role: str = "loss", key: str = "", program: str = "train/4") -> None:
        self.outputs.append(Output(self.model, program, role, key, ref))

    def graph(self) -> Graph:
        return prune(Graph(tuple(self.nodes), tuple(self.outputs)))


@pytest.fixture
def sketch() -> type[Sketch]:
    return Sketch
