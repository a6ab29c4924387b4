"""Reading a document in a trial, which may not find what one of its models names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cgo.errors import GraphDataError, ImportPathError, SpecError
from cgo.graph import Graph, ModelId, restrict
from cgo.graph_data import (
    GraphData,
    ModelEntry,
    _decode_node,
    _decode_output,
    _encode_node,
    _NodeDoc,
    _OutputDoc,
)
from cgo.model import DataSpec, describe

_ENTRY = TypeAdapter(ModelEntry)
_SPEC = TypeAdapter(DataSpec)


def read_document(text: str | bytes, base: Path) -> tuple[GraphData, dict[ModelId, str]]:
    """A document without the models that name what cannot be imported here.

    Args:
        text: The document.
        base: The folder that its file references are relative to.

    Returns:
        What can be trained, and for each other model why it cannot.

    Raises:
        GraphDataError: the document is refused for any other reason.
    """
    try:
        return GraphData.from_json(text, base=base), {}
    except GraphDataError as error:
        refused = _refused(text)
        if not refused:
            raise
        try:
            return GraphData.load(_without(json.loads(text), refused), base=base), refused
        except (KeyError, TypeError, ValidationError):  # it is no document at all
            raise error from None


def _refused(text: str | bytes) -> dict[ModelId, str]:
    """The models whose own entry, or whose data, name what cannot be imported."""
    try:
        document = json.loads(text)
        data = {key: _import_error(_SPEC, spec) for key, spec in document["data"].items()}
        return {
            entry["id"]: f"model {entry['id']!r}: {error}"
            for entry in document["models"]
            if (error := _import_error(_ENTRY, entry) or data.get(entry["data"]))
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _import_error(kind: TypeAdapter[Any], value: Any) -> str | None:
    try:
        kind.validate_python(value)
    except SpecError as error:
        cause = error.__cause__
        return str(error) if isinstance(cause, ValidationError) and _imports(cause) else None
    except ValidationError as error:
        return describe(error) if _imports(error) else None
    return None


def _imports(error: ValidationError) -> bool:
    """Whether an import is all that is wrong."""
    causes = [item.get("ctx", {}).get("error") for item in error.errors()]
    return all(isinstance(cause, ImportPathError) for cause in causes)


def _without(document: Mapping[str, Any], models: Mapping[ModelId, str]) -> dict[str, Any]:
    """The document's JSON values without some of its models."""
    entries = [entry for entry in document["models"] if entry["id"] not in models]
    outputs = [output for output in document["outputs"] if output["model"] not in models]
    nodes = [_decode_node(_NodeDoc.model_validate(node)) for node in document["nodes"]]
    found = [_decode_output(_OutputDoc.model_validate(output)) for output in outputs]
    graph = restrict(Graph(tuple(nodes), tuple(found)), models={entry["id"] for entry in entries})
    used = {entry["data"] for entry in entries}
    return {
        **document,
        "models": entries,
        "data": {key: spec for key, spec in document["data"].items() if key in used},
        "nodes": [_encode_node(node) for node in graph.nodes],
        "outputs": outputs,
        "aliases": {a: t for a, t in document.get("aliases", {}).items() if t not in models},
    }
