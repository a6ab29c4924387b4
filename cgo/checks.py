"""The rules of a document beyond its form: what it refers to is there, and agrees with itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cgo.allowed import allowed_modules, is_allowed, refusal
from cgo.entries import FileRef, ModelEntry, StateEntry
from cgo.errors import GraphDataError, SpecError
from cgo.graph import STATE, Graph, ModelId, Node, Output, homes
from cgo.imports import is_import_path
from cgo.model import DataSpec
from cgo.paths import lies_beside
from cgo.tuning import Tuning

#: "train/64": split and samples of a batch.
PROGRAM = re.compile(r"(train|validation)/[1-9][0-9]{0,8}", re.ASCII)

#: The name of what a program computes: "model/train/64/name"; later code reads the program in it.
_NAME = re.compile(rf"[^/]+/{PROGRAM.pattern}/.+", re.ASCII | re.DOTALL)

#: A leaf of a batch.
_LEAF = re.compile(r"(input|target)(\..+)?", re.DOTALL)

#: Keyword arguments of each source.
_FIELDS: dict[str, dict[str, type]] = {
    "cgo.input": {"data": str, "leaf": str, "size": int, "split": str},
    "cgo.parameter": {"content": str, "model": str, "path": str, "trainable": bool},
    "cgo.buffer": {"content": str, "model": str, "path": str},
    "cgo.constant": {"content": str},
    "cgo.random": {"distribution": str, "model": str, "order": int},
}


def check_references(
    models: Sequence[ModelEntry],
    data: Mapping[str, DataSpec],
    graph: Graph,
    constants: FileRef | None,
    aliases: Mapping[ModelId, ModelId],
) -> None:
    """Check a graph that verifies against the models and data of its document.

    Raises:
        GraphDataError: models with one id; data, a model, a file or a parameter that is not there
            or is another; an alias of nothing; a name that does not say which program it is of.
    """
    known = {model.id: model for model in models}
    if len(known) < len(models):
        twice = next(i for i, n in Counter(model.id for model in models).items() if n > 1)
        raise GraphDataError(f"refused: two models have the id {twice!r}")
    for model in models:
        _check_model(model, data)
    if constants is not None:
        _check_beside("constants", constants)
    nodes = {node.name: node for node in graph.nodes}
    states = {model.id: {entry.path: entry for entry in model.state} for model in models}
    for output in graph.outputs:
        _check_output(output, nodes, states)
    for node in graph.nodes:
        _check_node(node, data, constants, known, states)
    for alias, twin in aliases.items():
        if twin not in known or alias in known:
            raise GraphDataError(
                f"alias {alias!r} of {twin!r}: the twin must be a model, and the alias none"
            )


def _check_model(model: ModelEntry, data: Mapping[str, DataSpec]) -> None:
    where = f"model {model.id!r}"
    if model.data not in data:
        raise GraphDataError(f"{where}: data {model.data!r} is not in the document")
    if (model.factory is None) == (model.weights is None):
        raise GraphDataError(f"{where}: needs either a factory or weights")
    if model.opaque is not None and model.factory is None:
        raise GraphDataError(f"{where}: an opaque model needs a factory")
    if model.weights is not None:
        _check_beside(f"weights of {where}", model.weights)
    if model.begun is not None:
        if model.factory is None:
            raise GraphDataError(f"{where}: what its first call sets up needs a factory")
        _check_beside(f"first call of {where}", model.begun)
    if model.factory is not None and not is_import_path(model.factory.target):
        raise GraphDataError(
            f"{where}: factory {model.factory.target!r} is not of the form 'package.module:name'"
        )
    _check_state(where, model.state)


def _check_state(where: str, state: Sequence[StateEntry]) -> None:
    """Paths are unique, and a tied one names a tensor like its own that comes before it."""
    seen: dict[str, StateEntry] = {}
    for entry in state:
        if entry.path in seen:
            raise GraphDataError(f"{where}: {entry.path!r} stands twice in its state")
        if entry.alias_of is not None:
            twin = seen.get(entry.alias_of)
            if twin is None or twin.alias_of is not None:
                raise GraphDataError(
                    f"{where}: {entry.path!r} is tied to {entry.alias_of!r}, which is no tensor "
                    "before it"
                )
            if (twin.dtype, twin.shape) != (entry.dtype, entry.shape):
                raise GraphDataError(
                    f"{where}: {entry.path!r} is {entry.dtype} {list(entry.shape)}, and tied to "
                    f"{twin.path!r} of {twin.dtype} {list(twin.shape)}"
                )
        seen[entry.path] = entry


def _check_beside(what: str, reference: FileRef) -> None:
    """A document read from elsewhere must not reach for files outside its own folder."""
    if not lies_beside(reference.file):
        raise GraphDataError(f"{what}: {reference.file!r} does not lie beside the document")


States = Mapping[ModelId, Mapping[str, StateEntry]]


def _check_output(output: Output, nodes: Mapping[str, Node], states: States) -> None:
    where = f"output {output.role} of model {output.model!r}"
    if output.model not in states:
        raise GraphDataError(f"an output is for model {output.model!r}, which is not there")
    if not PROGRAM.fullmatch(output.program):
        raise GraphDataError(
            f"{where}: program {output.program!r} is not of the form 'train/64' or 'validation/64'"
        )
    if output.role != "update":
        return
    entry = states[output.model].get(output.key)
    if entry is None or entry.kind != "buffer":
        raise GraphDataError(f"{where}: {output.key!r} is no buffer of it")
    type_ = nodes[output.ref.name].types[output.ref.index]
    if type_ is None or type_.shape != entry.shape:
        found = None if type_ is None else list(type_.shape)
        raise GraphDataError(
            f"{where}: buffer {output.key!r} of shape {list(entry.shape)} cannot become "
            f"%{output.ref.name} of shape {found}"
        )


def _check_node(
    node: Node,
    data: Mapping[str, DataSpec],
    constants: FileRef | None,
    models: Mapping[ModelId, ModelEntry],
    states: States,
) -> None:
    where = f"%{node.name}"
    if node.op == "cgo.input" and node.keyword("data") not in data:
        raise GraphDataError(f"{where}: data {node.keyword('data')!r} is not in the document")
    if node.op == "cgo.constant" and constants is None:
        raise GraphDataError(f"{where}: the document has no file of constants")
    if node.op not in STATE and not _NAME.fullmatch(node.name):
        raise GraphDataError(
            f"{where}: its name does not say which program it is of; write 'model/train/64/name'"
        )
    if node.op in _FIELDS:
        _check_fields(node, where)
    if node.op == "cgo.input":
        _check_input(node, where, models)
    elif node.op in STATE:
        _check_homes(node, where, states)
    elif node.op == "cgo.random":
        order, owner = node.keyword("order"), node.keyword("model")
        if owner not in node.owners or not isinstance(order, int) or order < 0:
            raise GraphDataError(f"{where}: draw {order} of model {owner!r}, which does not own it")


def _check_fields(node: Node, where: str) -> None:
    """A source takes no arguments but its own keywords, and gives one tensor."""
    fields, given = _FIELDS[node.op], dict(node.kwargs)
    for key, kind in fields.items():
        if type(given.get(key)) is not kind:
            raise GraphDataError(
                f"{where}: {node.op} needs {key}, a {kind.__name__}; it has {given.get(key)!r:.60}"
            )
    more = {"cgo.random": given.keys(), "cgo.parameter": {"twins"}, "cgo.buffer": {"twins"}}
    if node.args or (unknown := given.keys() - fields.keys() - more.get(node.op, set())):
        said = "arguments" if node.args else ", ".join(sorted(unknown))
        raise GraphDataError(f"{where}: {node.op} takes no {said}")
    if "twins" in given and type(given["twins"]) is not tuple:
        raise GraphDataError(f"{where}: twins {given['twins']!r:.60} is no list")
    if len(node.types) != 1 or node.types[0] is None:
        raise GraphDataError(f"{where}: {node.op} gives one tensor")


def _check_input(node: Node, where: str, models: Mapping[ModelId, ModelEntry]) -> None:
    leaf, split, size = (str(node.keyword(key)) for key in ("leaf", "split", "size"))
    if not PROGRAM.fullmatch(f"{split}/{size}"):
        raise GraphDataError(f"{where}: split {split!r} and size {size} make no program")
    if not _LEAF.fullmatch(leaf):
        raise GraphDataError(f"{where}: leaf {leaf!r} is no part of an (input, target) pair")
    for owner in sorted(node.owners):
        if models[owner].data != node.keyword("data"):
            raise GraphDataError(
                f"{where}: model {owner!r} trains on data {models[owner].data!r}, and reads "
                f"{node.keyword('data')!r}"
            )


def _check_homes(node: Node, where: str, states: States) -> None:
    """What it stands for is of the models' state, and alike."""
    kind, type_ = node.op.removeprefix("cgo."), node.types[0]
    assert type_ is not None
    for model, path in homes(node):
        entry = states[model].get(path)
        if entry is None or entry.kind != kind:
            raise GraphDataError(f"{where}: model {model!r} has no {kind} {path!r}")
        if (entry.dtype, entry.shape) != (type_.dtype, type_.shape):
            raise GraphDataError(
                f"{where}: {type_.dtype} {list(type_.shape)}, but {path!r} of model {model!r} is "
                f"{entry.dtype} {list(entry.shape)}"
            )
        if kind == "parameter" and entry.trainable is not node.keyword("trainable"):
            raise GraphDataError(
                f"{where}: trainable {node.keyword('trainable')}, but {path!r} of model {model!r} "
                f"is {entry.trainable}"
            )


def check_experiment(experiment: Mapping[str, Any]) -> None:
    """Check the settings that a trial obeys.

    Raises:
        GraphDataError: `tuning` has unknown settings, or values of other types.
    """
    try:
        Tuning.from_json(experiment.get("tuning", {}))
    except SpecError as error:
        raise GraphDataError(f"experiment: {error}") from error


# --- imports ----------------------------------------------------------------------------------


def check_imports(document: Mapping[str, Any]) -> None:
    """Check what a document names against what this process may import, before it imports any.

    Args:
        document: JSON values, of any form.

    Raises:
        GraphDataError: names the model, the field and the module.
    """
    for _, message in refused_imports(document):
        raise GraphDataError(message)


def refused_imports(document: Mapping[str, Any]) -> Iterator[tuple[list[ModelId], str]]:
    """What a document names that this process may not import: the models that need it, and why."""
    allowed = allowed_modules()
    if allowed is None:
        return
    for ids, place, path in _named(document):
        module = path.partition(":")[0]
        if is_import_path(path) and not is_allowed(module, allowed):
            who = f"model {ids[0]!r:.120}" if ids else "no model"
            yield ids, f"{who}{place}: {refusal(path, module, allowed)}"


def _named(document: Mapping[str, Any]) -> Iterator[tuple[list[ModelId], str, str]]:
    """Whose, place and path of all that a document asks to import."""
    users: dict[str, list[ModelId]] = {}
    for model in _list(document.get("models")):
        entry = _dict(model)
        id_ = str(entry.get("id"))
        users.setdefault(str(entry.get("data")), []).append(id_)
        training = _dict(entry.get("training"))
        fields = [("factory", _dict(entry.get("factory")).get("target"))]
        fields += [(field, training.get(field)) for field in ("loss", "optimizer", "scheduler")]
        fields += [("metrics", metric) for metric in _list(training.get("metrics"))]
        yield from (([id_], f": {field}", path) for field, path in fields if isinstance(path, str))
    for key, value in _dict(document.get("data")).items():
        spec = _dict(value)
        for field in ("source", "augment"):
            if isinstance(path := spec.get(field), str):
                yield users.get(key, []), f", data {key!r:.60}: {field}", path


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
