"""GraphData: everything a trial needs, as one versioned JSON document.

No pickles and no code of its own, but it names code: a trial imports and calls the
`package.module:name`s that it names (`cgo.allowed` limits which). Weights lie beside it in
safetensors files and are referred to by content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cgo.checks import check_experiment, check_imports, check_references
from cgo.entries import Factory, FileRef, ModelEntry, StateEntry
from cgo.errors import (
    GraphDataError,
    GraphDataTooLargeError,
    GraphError,
    MissingWeightsError,
    WeightsHashError,
)
from cgo.graph import Graph, ModelId, verify
from cgo.model import DataSpec
from cgo.paths import inside, open_plain, read_plain
from cgo.wire import (
    MAX_DEPTH,
    VERSION,
    Read,
    decode_argument,
    encode,
    encode_argument,
    schema,
)

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "VERSION",
    "Factory",
    "FileRef",
    "GraphData",
    "ModelEntry",
    "StateEntry",
    "decode_argument",
    "encode_argument",
    "file_sha256",
    "schema",
]

MAX_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class GraphData:
    """The models of one trial, their merged graph, their data and where their weights start.

    `aliases` maps a model that is not trained, because another is equal to it, to that other.
    `base` is the folder that file references are relative to.
    """

    models: tuple[ModelEntry, ...]
    data: Mapping[str, DataSpec]
    graph: Graph
    constants: FileRef | None = None
    aliases: Mapping[ModelId, ModelId] = dataclasses.field(default_factory=dict)
    experiment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Path = Path(".")

    def dump(self) -> dict[str, Any]:
        """The document as JSON values."""
        return encode(
            self.models, self.data, self.graph, self.constants, self.aliases, self.experiment
        )

    def to_json(self) -> str:
        """The document as text; `from_json` gives an equal GraphData back.

        Raises:
            GraphDataError: a factory's arguments or `experiment` hold something that is no JSON.
        """
        try:
            return json.dumps(self.dump(), separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GraphDataError(f"the document cannot be written: {error}") from error

    @classmethod
    def load(cls, document: Any, *, base: str | Path = ".") -> GraphData:
        """Read JSON values, validated whole.

        Raises:
            GraphDataVersionError: written by another version of the format.
            GraphDataTooLargeError: too deep, too long, or too many.
            UnknownOperatorError: names the node and the operator.
            GraphDataError: anything else that the schema or the graph's rules refuse, or a name of
                a module that this process may not import (`cgo.allowed`).
        """
        if isinstance(document, dict):
            check_imports(document)
        read = Read(document)
        try:
            verify(read.graph)
        except GraphError as error:
            raise GraphDataError(f"refused: {error}") from error
        check_references(read.models, read.data, read.graph, read.constants, read.aliases)
        check_experiment(read.experiment)
        return cls(
            models=read.models,
            data=read.data,
            graph=read.graph,
            constants=read.constants,
            aliases=read.aliases,
            experiment=read.experiment,
            base=Path(base),
        )

    @classmethod
    def from_json(cls, text: str | bytes, *, base: str | Path = ".") -> GraphData:
        """Read a document's text; raises as `load`, and `GraphDataTooLargeError`."""
        if len(text) > MAX_BYTES:
            raise GraphDataTooLargeError(
                f"the document has {len(text):,} bytes; at most {MAX_BYTES:,} are read; "
                "merge fewer models a trial"
            )
        try:
            document = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise GraphDataError(f"not a JSON document: {error}") from error
        return cls.load(document, base=base)

    def write(self, path: str | Path) -> None:
        """Write the document to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> GraphData:
        """Read a document from a file; its references are relative to the file's folder.

        Raises:
            GraphDataError: as `from_json`, and where there is no plain file that can be read.
        """
        path = Path(path)
        try:
            content = read_plain(path, MAX_BYTES)
        except OSError as error:
            raise GraphDataError(f"{path}: no document can be read: {error}") from error
        except ValueError as error:
            size = f"{path.stat().st_size:,}"
            raise GraphDataTooLargeError(
                f"{path}: {size} bytes; at most {MAX_BYTES:,} are read"
            ) from error
        return cls.from_json(content, base=path.parent)

    def check_files(self) -> None:
        """Check that every file the document refers to is there and has the content it says.

        Raises:
            GraphDataError: a file lies elsewhere, where symbolic links lead.
            MissingWeightsError: a file is not there, or is no plain file.
            WeightsHashError: a file has another content.
        """
        for what, reference in self.files().items():
            self._check_file(what, reference)

    def files(self) -> dict[str, FileRef]:
        """All that the document refers to, by what it is."""
        found = {f"weights of model {model.id!r}": model.weights for model in self.models}
        found |= {f"first call of model {model.id!r}": model.begun for model in self.models}
        found["constants"] = self.constants
        return {what: reference for what, reference in found.items() if reference is not None}

    def _check_file(self, what: str, reference: FileRef) -> None:
        try:
            path = inside(self.base, reference.file)
        except ValueError as error:
            raise GraphDataError(f"{what}: {error}") from error
        try:
            found = file_sha256(path)
        except OSError as error:
            raise MissingWeightsError(f"{what}: there is no file {path} ({error})") from error
        if found != reference.sha256:
            raise WeightsHashError(
                f"{what}: {path} has SHA-256 {found}, the document says {reference.sha256}"
            )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number, unless it is one of those that become infinite as they are read (1e999)."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def file_sha256(path: Path) -> str:
    """The SHA-256 of a plain file's content, in hexadecimal.

    Raises:
        OSError: it is no plain file, or cannot be read.
    """
    with open_plain(path) as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()
