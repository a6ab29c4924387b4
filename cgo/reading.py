"""Reading a document in a trial, which may lack, or may not import, what one model names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cgo.checks import refused_imports
from cgo.errors import GraphDataError, GraphDataTooLargeError, ImportPathError, SpecError
from cgo.graph import ModelId, restrict
from cgo.graph_data import GraphData, ModelEntry
from cgo.model import DataSpec, describe
from cgo.wire import read_graph, written_graph

_ENTRY = TypeAdapter(ModelEntry)
_SPEC = TypeAdapter(DataSpec)


def read_document(text: str | bytes, base: Path) -> tuple[GraphData, dict[ModelId, str]]:
    """A document without the models that name what cannot, or may not, be imported here.

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
    except GraphDataTooLargeError:
        raise
    except GraphDataError as error:
        refused = _refused(text)
        if not refused:
            raise
        try:
            return GraphData.load(_without(json.loads(text), refused), base=base), refused
        except (KeyError, TypeError, ValidationError):  # it is no document at all
            raise error from None


def _refused(text: str | bytes) -> dict[ModelId, str]:
    """The models whose own entry, or whose data, name what cannot or may not be imported."""
    try:
        document = json.loads(text)
        found = {id_: why for ids, why in refused_imports(document) for id_ in ids}
        data = {key: _import_error(_SPEC, spec) for key, spec in document["data"].items()}
        for entry in document["models"]:
            if error := _import_error(_ENTRY, entry) or data.get(entry["data"]):
                found.setdefault(entry["id"], f"model {entry['id']!r}: {error}")
        return found
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
    kept = {entry["id"] for entry in entries}
    graph = restrict(read_graph(document["nodes"], document["outputs"]), models=kept)
    used = {entry["data"] for entry in entries}
    return {
        **document,
        "models": entries,
        "data": {key: spec for key, spec in document["data"].items() if key in used},
        **written_graph(graph),
        "aliases": {a: t for a, t in document.get("aliases", {}).items() if t not in models},
    }


def is_vouched(content: bytes, sha256: str | None) -> bool:
    """Whether a document is the very one that somebody vouches for; None: nobody does."""
    return sha256 is not None and hashlib.sha256(content).hexdigest() == sha256
