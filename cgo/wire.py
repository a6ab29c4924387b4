"""The wire form of a document: JSON values, their schema, and what stands for arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cgo.dtypes import SYMBOLS, AutocastDtype, Dtype
from cgo.entries import FileRef, Id, ModelEntry, Name, Size
from cgo.errors import GraphDataError, GraphDataVersionError, SpecError, UnknownOperatorError
from cgo.graph import Argument, Graph, Node, Output, Ref, Symbol, TensorType
from cgo.limits import MOST_OUTPUTS, check_counts, check_tensor, check_values
from cgo.model import DataSpec, describe
from cgo.operators import known
from cgo.text import printable

VERSION = 1

#: Levels of lists in an argument; operators take two.
MAX_DEPTH = 32


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TypeDoc(_Strict):
    dtype: Dtype
    shape: list[Size]
    stride: list[Size] | None = None
    device: Literal["trial", "cpu"] = "trial"


class _NodeDoc(_Strict):
    name: Name
    op: Name
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    types: Annotated[list[_TypeDoc | None], Field(max_length=MOST_OUTPUTS)]
    owners: list[Id]
    autocast: AutocastDtype | None = None
    group: Name | None = None


class _OutputDoc(_Strict):
    model: Id
    program: Name
    role: Literal["loss", "prediction", "update"]
    key: Name
    ref: Any


class _Document(BaseModel):
    """A GraphData document."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    version: Literal[1]
    models: list[ModelEntry]
    data: dict[Name, DataSpec]
    nodes: list[_NodeDoc]
    outputs: list[_OutputDoc]
    constants: FileRef | None = None
    aliases: dict[Id, Id] = {}
    experiment: dict[str, Any] = {}


# --- schema -----------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON schema of a document; published as `cgo/graph_data.schema.json`."""
    document = _Document.model_json_schema()
    argument = {"$ref": "#/$defs/Argument"}
    nodes = document["$defs"]["_NodeDoc"]["properties"]
    nodes["args"]["items"] = argument
    nodes["kwargs"]["additionalProperties"] = argument
    document["$defs"]["_OutputDoc"]["properties"]["ref"] = {"$ref": "#/$defs/Reference"}
    document["$defs"] |= _argument_schema()
    return document


def _pair(*items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "prefixItems": list(items), "minItems": 2, "maxItems": 2}


def _object(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: value},
        "required": [key],
        "additionalProperties": False,
    }


def _argument_schema() -> dict[str, Any]:
    symbols = [_pair({"const": kind}, {"enum": sorted(names)}) for kind, names in SYMBOLS.items()]
    reference = _pair({"type": "string"}, {"type": "integer", "minimum": 0})
    return {
        "Argument": {
            "description": "A reference, a torch constant, a float that JSON lacks, or a literal.",
            "anyOf": [
                {"$ref": "#/$defs/Reference"},
                _object("symbol", {"anyOf": symbols}),
                _object("float", {"enum": ["inf", "-inf", "nan"]}),
                {"type": "array", "items": {"$ref": "#/$defs/Argument"}},
                {"type": ["null", "boolean", "number", "string"]},
            ],
        },
        "Reference": {
            "description": "An output of a node: its name and the output's index.",
            **_object("ref", reference),
        },
    }


# --- writing ----------------------------------------------------------------------------------

_ENTRY = TypeAdapter(ModelEntry)
_SPEC = TypeAdapter(DataSpec)
_FILE = TypeAdapter(FileRef)


def encode(
    models: Iterable[ModelEntry],
    data: Mapping[str, DataSpec],
    graph: Graph,
    constants: FileRef | None,
    aliases: Mapping[str, str],
    experiment: Mapping[str, Any],
) -> dict[str, Any]:
    """The parts of a document as JSON values."""
    file = None if constants is None else _FILE.dump_python(constants, mode="json")
    return {
        "version": VERSION,
        "models": [_ENTRY.dump_python(model, mode="json") for model in models],
        "data": {key: _SPEC.dump_python(spec, mode="json") for key, spec in data.items()},
        **written_graph(graph),
        "constants": file,
        "aliases": dict(aliases),
        "experiment": dict(experiment),
    }


def written_graph(graph: Graph) -> dict[str, Any]:
    """A graph as the JSON values that a document has for it."""
    return {
        "nodes": [_encode_node(node) for node in graph.nodes],
        "outputs": [_encode_output(output) for output in graph.outputs],
    }


def _encode_output(output: Output) -> dict[str, Any]:
    return {
        "model": output.model,
        "program": output.program,
        "role": output.role,
        "key": output.key,
        "ref": encode_argument(output.ref),
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


def why_unwritable(graph: Graph) -> str | None:
    """Why a graph would be refused when its document is read, or None: the first reason."""
    for node in graph.nodes:
        try:
            _decode_node(_NodeDoc.model_validate(_encode_node(node)))
        except GraphDataError as error:
            return str(error)
        except ValidationError as error:
            return f"%{node.name}: {describe(error)}"
    return None


# --- reading ----------------------------------------------------------------------------------


class Read:
    """A document that has the form of one; what it means is not checked yet.

    Args:
        document: JSON values.

    Raises:
        GraphDataVersionError: written by another version of the format.
        GraphDataTooLargeError: too deep, too long, or too many.
        UnknownOperatorError: names the node and the operator.
        GraphDataError: anything else that the schema refuses.
    """

    def __init__(self, document: Any) -> None:
        values = _checked(document)
        try:
            read = _Document.model_validate(values)
            nodes = tuple([_decode_node(node) for node in read.nodes])
            outputs = tuple([_decode_output(output) for output in read.outputs])
        except SpecError as error:
            raise GraphDataError(f"refused: {printable(str(error), _MOST_ERROR)}") from error
        except ValidationError as error:
            raise GraphDataError(f"refused: {printable(describe(error), _MOST_ERROR)}") from error
        self.graph = Graph(nodes, outputs)
        self.models, self.data = tuple(read.models), read.data
        self.constants, self.aliases = read.constants, read.aliases
        self.experiment = read.experiment


def read_graph(nodes: Any, outputs: Any) -> Graph:
    """The inverse of `written_graph`; the graph is not verified.

    Raises:
        ValidationError: pydantic's; they have another form.
        GraphDataError: an operator or an argument that is none.
    """
    read = tuple([_decode_node(_NodeDoc.model_validate(node)) for node in nodes])
    return Graph(read, tuple([_decode_output(_OutputDoc.model_validate(o)) for o in outputs]))


def _checked(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise GraphDataError(f"a document is a JSON object, not {type(document).__name__}")
    version = document.get("version")
    if version != VERSION or type(version) is not int:  # True == 1
        raise GraphDataVersionError(
            f"document version {version!r:.40}; this package reads version {VERSION}; "
            "submit the models again with one version of cgo-engine on both sides"
        )
    check_counts(document)
    check_values(document)
    return document


#: Characters of an error that lists all that is wrong with a document.
_MOST_ERROR = 4000


def _decode_node(node: _NodeDoc) -> Node:
    where = f"%{node.name}"
    if not known(node.op):
        raise UnknownOperatorError(
            f"{where} (models {', '.join(node.owners)}): operator {node.op!r} is not known "
            "here; use the same torch and cgo-engine versions on both sides"
        )
    try:
        return Node(
            name=node.name,
            op=node.op,
            args=tuple(decode_argument(argument) for argument in node.args),
            kwargs=tuple((key, decode_argument(value)) for key, value in node.kwargs.items()),
            types=tuple(_decode_type(where, type_) for type_ in node.types),
            owners=frozenset(node.owners),
            autocast=node.autocast,
            group=node.group,
        )
    except _NoArgument as error:
        raise GraphDataError(f"{where}: {error}") from error


def _decode_type(where: str, type_: _TypeDoc | None) -> TensorType | None:
    if type_ is None:
        return None
    stride = None if type_.stride is None else tuple(type_.stride)
    check_tensor(where, type_.shape, stride)
    return TensorType(type_.dtype, tuple(type_.shape), stride, type_.device)


class _NoArgument(GraphDataError):
    """Of no node yet."""


def decode_argument(value: Any, depth: int = 0) -> Argument:
    """The inverse of `encode_argument`.

    Raises:
        GraphDataError: not an argument, a constant that torch does not have, or nested too deeply.
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
                return _symbol(which, text)
            case {"float": "inf" | "-inf" | "nan" as text}:
                return float(text)
    if depth == MAX_DEPTH:
        raise _NoArgument("an argument is nested too deeply")
    raise _NoArgument(f"not an argument: {value!r:.100}")


def _symbol(kind: str, value: str) -> Symbol:
    if kind not in SYMBOLS:
        raise _NoArgument(f"symbol {kind!r:.60} is none of {', '.join(SYMBOLS)}")
    if value not in SYMBOLS[kind]:
        raise _NoArgument(f"{kind} {value!r:.60} is none of {', '.join(sorted(SYMBOLS[kind]))}")
    return Symbol(kind, value)


def _decode_output(output: _OutputDoc) -> Output:
    where = f"output {output.role} of model {output.model!r}"
    try:
        ref = decode_argument(output.ref)
    except _NoArgument as error:
        raise GraphDataError(f"{where}: {error}") from error
    if not isinstance(ref, Ref):
        raise GraphDataError(f"{where} is not a reference")
    return Output(output.model, output.program, output.role, output.key, ref)
