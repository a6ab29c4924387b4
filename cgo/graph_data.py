"""GraphData: everything a trial needs, as one versioned JSON document.

No pickles and no code: the document can make a trial import the `package.module:name`s that it
names, and nothing else. Weights lie beside it in safetensors files and are referred to by content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cgo.errors import (
    GraphDataError,
    GraphDataTooLargeError,
    GraphDataVersionError,
    GraphError,
    MissingWeightsError,
    SpecError,
    UnknownOperatorError,
    WeightsHashError,
)
from cgo.graph import (
    Argument,
    Graph,
    ModelId,
    Node,
    Output,
    Ref,
    Symbol,
    TensorType,
    verify,
)
from cgo.imports import is_import_path
from cgo.model import DataSpec, TrainingSpec, describe
from cgo.operators import known

VERSION = 1
MAX_BYTES = 256 * 2**20

_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CONFIG)
class FileRef:
    """A file beside the document, with the SHA-256 of its content."""

    file: str
    sha256: str


@dataclass(frozen=True, config=_CONFIG)
class Factory:
    """What builds a module: called with `kwargs` right after `torch.manual_seed(seed)`."""

    target: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=_CONFIG)
class StateEntry:
    """One parameter or buffer, under the module's own name."""

    path: str
    kind: Literal["parameter", "buffer"]
    dtype: str
    shape: tuple[int, ...]
    trainable: bool = False
    persistent: bool = True  # False: a buffer that state_dict leaves out
    alias_of: str | None = None  # tied: the path that holds the tensor


@dataclass(frozen=True, config=_CONFIG)
class ModelEntry:
    """One model of the trial. Exactly one of `factory` and `weights` is given."""

    id: ModelId
    seed: int
    data: str  # digest of its DataSpec
    training: TrainingSpec
    state: tuple[StateEntry, ...]  # in the module's own order
    factory: Factory | None = None
    weights: FileRef | None = None
    opaque: str | None = None  # why it is not captured; its factory's module is called instead
    begun: FileRef | None = None  # what the first call of the factory's module sets up


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
        return _encode(self)

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
            UnknownOperatorError: names the node and the operator.
            GraphDataError: anything else that the schema or the graph's rules refuse.
        """
        return _decode(document, Path(base))

    @classmethod
    def from_json(cls, text: str | bytes, *, base: str | Path = ".") -> GraphData:
        """Read a document's text; raises as `load`, and `GraphDataTooLargeError`."""
        if len(text) > MAX_BYTES:
            raise GraphDataTooLargeError(
                f"the document has {len(text):,} bytes; at most {MAX_BYTES:,} are read; "
                "merge fewer models a trial"
            )
        try:
            document = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise GraphDataError(f"not a JSON document: {error}") from error
        return cls.load(document, base=base)

    def write(self, path: str | Path) -> None:
        """Write the document to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> GraphData:
        """Read a document from a file; its references are relative to the file's folder."""
        path = Path(path)
        if path.stat().st_size > MAX_BYTES:
            raise GraphDataTooLargeError(
                f"{path}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read"
            )
        return cls.from_json(path.read_bytes(), base=path.parent)

    def check_files(self) -> None:
        """Check that every file the document refers to is there and has the content it says.

        Raises:
            MissingWeightsError: a file is not there.
            WeightsHashError: a file has another content.
        """
        references = {f"weights of model {model.id!r}": model.weights for model in self.models}
        references |= {f"first call of model {model.id!r}": model.begun for model in self.models}
        references["constants"] = self.constants
        for what, reference in references.items():
            if reference is None:
                continue
            path = self.base / reference.file
            if not path.is_file():
                raise MissingWeightsError(f"{what}: there is no file {path}")
            found = file_sha256(path)
            if found != reference.sha256:
                raise WeightsHashError(
                    f"{what}: {path} has SHA-256 {found}, the document says {reference.sha256}"
                )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


# --- wire form --------------------------------------------------------------------------------


class _TypeDoc(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    dtype: str
    shape: list[int]
    stride: list[int] | None = None
    device: str = "trial"


class _NodeDoc(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    op: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    types: list[_TypeDoc | None]
    owners: list[str]
    autocast: str | None = None
    group: str | None = None


class _OutputDoc(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    program: str
    role: Literal["loss", "prediction", "update"]
    key: str
    ref: Any


class _Document(BaseModel):
    """A GraphData document."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1]
    models: list[ModelEntry]
    data: dict[str, DataSpec]
    nodes: list[_NodeDoc]
    outputs: list[_OutputDoc]
    constants: FileRef | None = None
    aliases: dict[str, str] = {}
    experiment: dict[str, Any] = {}


def schema() -> dict[str, Any]:
    """The JSON schema of a document; published as `cgo/graph_data.schema.json`."""
    document = _Document.model_json_schema()
    argument = {"$ref": "#/$defs/Argument"}
    nodes = document["$defs"]["_NodeDoc"]["properties"]
    nodes["args"]["items"] = argument
    nodes["kwargs"]["additionalProperties"] = argument
    document["$defs"]["_OutputDoc"]["properties"]["ref"] = {"$ref": "#/$defs/Reference"}
    document["$defs"] |= _ARGUMENT_SCHEMA
    return document


_ARGUMENT_SCHEMA: dict[str, Any] = {
    "Argument": {
        "description": "A reference, a torch constant, a float that JSON lacks, or a literal.",
        "anyOf": [
            {"$ref": "#/$defs/Reference"},
            {
                "type": "object",
                "properties": {
                    "symbol": {
                        "type": "array",
                        "prefixItems": [{"type": "string"}, {"type": "string"}],
                        "minItems": 2,
                        "maxItems": 2,
                    }
                },
                "required": ["symbol"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"float": {"enum": ["inf", "-inf", "nan"]}},
                "required": ["float"],
                "additionalProperties": False,
            },
            {"type": "array", "items": {"$ref": "#/$defs/Argument"}},
            {"type": ["null", "boolean", "number", "string"]},
        ],
    },
    "Reference": {
        "description": "An output of a node: its name and the output's index.",
        "type": "object",
        "properties": {
            "ref": {
                "type": "array",
                "prefixItems": [{"type": "string"}, {"type": "integer", "minimum": 0}],
                "minItems": 2,
                "maxItems": 2,
            }
        },
        "required": ["ref"],
        "additionalProperties": False,
    },
}


_ENTRY = TypeAdapter(ModelEntry)
_SPEC = TypeAdapter(DataSpec)
_FILE = TypeAdapter(FileRef)


def _encode(data: GraphData) -> dict[str, Any]:
    return {
        "version": VERSION,
        "models": [_ENTRY.dump_python(model, mode="json") for model in data.models],
        "data": {key: _SPEC.dump_python(spec, mode="json") for key, spec in data.data.items()},
        "nodes": [_encode_node(node) for node in data.graph.nodes],
        "outputs": [
            {
                "model": output.model,
                "program": output.program,
                "role": output.role,
                "key": output.key,
                "ref": encode_argument(output.ref),
            }
            for output in data.graph.outputs
        ],
        "constants": None
        if data.constants is None
        else _FILE.dump_python(data.constants, mode="json"),
        "aliases": dict(data.aliases),
        "experiment": dict(data.experiment),
    }


def _encode_node(node: Node) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "types": [None if type_ is None else _encode_type(type_) for type_ in node.types],
        "owners": sorted(node.owners),
    }
    if node.args:
        document["args"] = [encode_argument(argument) for argument in node.args]
    if node.kwargs:
        document["kwargs"] = {key: encode_argument(value) for key, value in node.kwargs}
    if node.autocast is not None:
        document["autocast"] = node.autocast
    if node.group is not None:
        document["group"] = node.group
    return document


def _encode_type(type_: TensorType) -> dict[str, Any]:
    document: dict[str, Any] = {"dtype": type_.dtype, "shape": list(type_.shape)}
    if type_.stride is not None:
        document["stride"] = list(type_.stride)
    if type_.device != "trial":
        document["device"] = type_.device
    return document


def encode_argument(argument: Argument) -> Any:
    """An argument as JSON: {"ref": [name, index]}, {"symbol": [kind, value]}, lists, scalars.

    Floats that JSON lacks are {"float": "inf"}.

    Raises:
        GraphDataError: not an argument.
    """
    kind = type(argument)
    if kind is Ref:
        return {"ref": [argument.name, argument.index]}  # type: ignore[union-attr]
    if kind is tuple:
        return [encode_argument(item) for item in argument]  # type: ignore[union-attr]
    if kind is Symbol:
        return {"symbol": [argument.kind, argument.value]}  # type: ignore[union-attr]
    if kind is float and not math.isfinite(argument):  # type: ignore[arg-type]
        return {"float": repr(argument)}
    if argument is None or kind in (bool, int, float, str):
        return argument
    raise GraphDataError(f"{argument!r} of type {kind.__name__} cannot be an argument")


#: Levels of lists in an argument; operators take two.
MAX_DEPTH = 32


def decode_argument(value: Any, depth: int = 0) -> Argument:
    """The inverse of `encode_argument`.

    Raises:
        GraphDataError: not an argument, or nested too deeply.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    if kind is list and depth < MAX_DEPTH:
        return tuple([decode_argument(item, depth + 1) for item in value])
    if kind is dict and len(value) == 1:
        match value:
            case {"ref": [str(name), int(index)]} if type(index) is int:
                return Ref(name, index)
            case {"symbol": [str(which), str(text)]}:
                return Symbol(which, text)
            case {"float": "inf" | "-inf" | "nan" as text}:
                return float(text)
    if depth == MAX_DEPTH:
        raise GraphDataError("an argument is nested too deeply")
    raise GraphDataError(f"not an argument: {value!r:.100}")


def _decode(document: Any, base: Path) -> GraphData:
    if not isinstance(document, dict):
        raise GraphDataError(f"a document is a JSON object, not {type(document).__name__}")
    version = document.get("version")
    if version != VERSION or type(version) is not int:  # True == 1
        raise GraphDataVersionError(
            f"document version {version!r}; this package reads version {VERSION}; "
            "submit the models again with one version of cgo-engine on both sides"
        )
    try:
        read = _Document.model_validate(document)
        nodes = tuple([_decode_node(node) for node in read.nodes])
        outputs = tuple([_decode_output(output) for output in read.outputs])
    except SpecError as error:
        raise GraphDataError(f"refused: {error}") from error
    except ValidationError as error:
        raise GraphDataError(f"refused: {describe(error)}") from error
    graph = Graph(nodes, outputs)
    try:
        verify(graph)
    except GraphError as error:
        raise GraphDataError(f"refused: {error}") from error
    data = GraphData(
        models=tuple(read.models),
        data=read.data,
        graph=graph,
        constants=read.constants,
        aliases=read.aliases,
        experiment=read.experiment,
        base=base,
    )
    _check_references(data)
    return data


def _decode_node(node: _NodeDoc) -> Node:
    if not known(node.op):
        raise UnknownOperatorError(
            f"%{node.name} (models {', '.join(node.owners)}): operator {node.op!r} is not known "
            "here; use the same torch and cgo-engine versions on both sides"
        )
    return Node(
        name=node.name,
        op=node.op,
        args=tuple(decode_argument(argument) for argument in node.args),
        kwargs=tuple((key, decode_argument(value)) for key, value in node.kwargs.items()),
        types=tuple(
            None
            if type_ is None
            else TensorType(
                type_.dtype,
                tuple(type_.shape),
                None if type_.stride is None else tuple(type_.stride),
                type_.device,
            )
            for type_ in node.types
        ),
        owners=frozenset(node.owners),
        autocast=node.autocast,
        group=node.group,
    )


def _decode_output(output: _OutputDoc) -> Output:
    ref = decode_argument(output.ref)
    if not isinstance(ref, Ref):
        raise GraphDataError(f"output {output.role} of model {output.model!r} is not a reference")
    return Output(output.model, output.program, output.role, output.key, ref)


def _check_references(data: GraphData) -> None:
    """Models are unique, their data is there, and the graph and the aliases name no other model."""
    ids = {model.id for model in data.models}
    if len(ids) < len(data.models):
        twice = next(i for i, n in Counter(model.id for model in data.models).items() if n > 1)
        raise GraphDataError(f"refused: two models have the id {twice!r}")
    for model in data.models:
        _check_model(model, data)
    if data.constants is not None:
        _check_beside("constants", data.constants)
    for output in data.graph.outputs:
        if output.model not in ids:
            raise GraphDataError(f"an output is for model {output.model!r}, which is not there")
    for node in data.graph.nodes:
        if node.op == "cgo.input" and node.keyword("data") not in data.data:
            raise GraphDataError(
                f"%{node.name}: data {node.keyword('data')!r} is not in the document"
            )
        if node.op == "cgo.constant" and data.constants is None:
            raise GraphDataError(f"%{node.name}: the document has no file of constants")
    for alias, twin in data.aliases.items():
        if twin not in ids or alias in ids:
            raise GraphDataError(
                f"alias {alias!r} of {twin!r}: the twin must be a model, and the alias none"
            )


def _check_model(model: ModelEntry, data: GraphData) -> None:
    if model.data not in data.data:
        raise GraphDataError(f"model {model.id!r}: data {model.data!r} is not in the document")
    if (model.factory is None) == (model.weights is None):
        raise GraphDataError(f"model {model.id!r}: needs either a factory or weights")
    if model.opaque is not None and model.factory is None:
        raise GraphDataError(f"model {model.id!r}: an opaque model needs a factory")
    if model.weights is not None:
        _check_beside(f"weights of model {model.id!r}", model.weights)
    if model.begun is not None:
        _check_beside(f"first call of model {model.id!r}", model.begun)
    if model.factory is not None and not is_import_path(model.factory.target):
        raise GraphDataError(
            f"model {model.id!r}: factory {model.factory.target!r} is not of the form "
            "'package.module:name'"
        )


def _check_beside(what: str, reference: FileRef) -> None:
    """A document read from elsewhere must not reach for files outside its own folder."""
    for path in (PurePosixPath(reference.file), PureWindowsPath(reference.file)):
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise GraphDataError(f"{what}: {reference.file!r} does not lie beside the document")
