from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import cgo.graph_data
from cgo.dtypes import SYMBOLS
from cgo.errors import (
    GraphDataError,
    GraphDataTooLargeError,
    GraphDataVersionError,
    MissingWeightsError,
    UnknownOperatorError,
    WeightsHashError,
)
from cgo.graph import Argument, Graph, Node, Output, Ref, Symbol, TensorType, dump, prune
from cgo.graph_data import (
    Factory,
    FileRef,
    GraphData,
    ModelEntry,
    StateEntry,
    decode_argument,
    encode_argument,
    file_sha256,
    schema,
)
from cgo.model import DataSpec, TrainingSpec

SPEC = DataSpec("json:loads", {"path": "a/b", "scale": 1.0}, batch_size=4)


def entry(id_: str = "a", **changes: Any) -> ModelEntry:
    """A model from a factory."""
    fields: dict[str, Any] = {
        "id": id_,
        "seed": 2**62 + 1,
        "data": SPEC.digest,
        "training": TrainingSpec(optimizer="AdamW", optimizer_kwargs={"betas": (0.9, 0.999)}),
        "state": (
            StateEntry("fc.weight", "parameter", "float32", (3, 8), trainable=True),
            StateEntry("tied", "parameter", "float32", (3, 8), alias_of="fc.weight"),
            StateEntry("seen", "buffer", "int64", (), persistent=False),
        ),
        "factory": Factory("nets.of.the_user:build", {"width": 3, "rates": [0.5, 1]}),
    }
    return ModelEntry(**(fields | changes))


def graph(arguments: tuple[Argument, ...] = (1, 1.0, True), **kwargs: Argument) -> Graph:
    """One model's graph around one node with the given arguments."""
    facts = (("data", SPEC.digest), ("leaf", "input"), ("size", 4), ("split", "train"))
    type_ = TensorType("float32", (4, 8))
    owners = frozenset({"a"})
    x = Node("a/train/4/x", "cgo.input", (), facts, (type_,), owners)
    y = Node(
        "a/train/4/y",
        "aten.add.Tensor",
        (Ref("a/train/4/x"), *arguments),
        tuple(sorted(kwargs.items())),
        (TensorType("float32", (4, 8), (1, 4)), None, TensorType("int64", (), None, "cpu")),
        owners,
        autocast="bfloat16",
    )
    return Graph((x, y), (Output("a", "train/4", "loss", "", Ref("a/train/4/y", 2)),))


def document(**changes: Any) -> GraphData:
    fields: dict[str, Any] = {
        "models": (entry(),),
        "data": {SPEC.digest: SPEC},
        "graph": graph(),
        "aliases": {"twin": "a"},
        "experiment": {"name": "test", "rate": 1.0, "count": 1},
    }
    return GraphData(**(fields | changes))


def wire(**changes: Any) -> dict[str, Any]:
    """A good document as JSON values, with top-level changes."""
    return json.loads(document().to_json()) | changes


# --- round trip -------------------------------------------------------------------------------


def test_round_trip_through_text_and_files(tmp_path):
    data = document()
    assert GraphData.from_json(data.to_json()) == data
    assert GraphData.from_json(data.to_json().encode()) == data
    assert GraphData.load(data.dump()) == data
    data.write(tmp_path / "graph.json")
    assert GraphData.read(tmp_path / "graph.json") == replace(data, base=tmp_path)
    assert GraphData.read(tmp_path / "graph.json").to_json() == data.to_json()


def test_defaults_are_left_out_of_nodes():
    first, second = document().dump()["nodes"]
    assert first == {
        "name": "a/train/4/x",
        "op": "cgo.input",
        "kwargs": {"data": SPEC.digest, "leaf": "input", "size": 4, "split": "train"},
        "types": [{"dtype": "float32", "shape": [4, 8]}],
        "owners": ["a"],
    }
    assert second["types"] == [
        {"dtype": "float32", "shape": [4, 8], "stride": [1, 4]},
        None,
        {"dtype": "int64", "shape": [], "device": "cpu"},
    ]


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
LITERALS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((0, 1, 0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 5e-324, 1e308, 2**70)),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(("inf", "nan", "ref", "")),
    st.sampled_from([Symbol(kind, name) for kind, names in SYMBOLS.items() for name in names]),
    st.just(Ref("a/train/4/x")),
)
ARGUMENTS = st.recursive(
    LITERALS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def exact(value: object) -> object:
    """Equal only for values of equal types and bits."""
    if type(value) is tuple:
        return tuple(map(exact, value))
    if isinstance(value, list):
        return [exact(item) for item in value]
    if isinstance(value, Mapping):
        return {key: exact(item) for key, item in value.items()}
    if type(value) is float and math.isnan(value):
        return float, "nan"
    return type(value), value.hex() if type(value) is float else value


@given(ARGUMENTS)
def test_an_argument_survives_exactly(argument):
    text = json.dumps(encode_argument(argument), allow_nan=False)
    assert exact(decode_argument(json.loads(text))) == exact(argument)


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.lists(ARGUMENTS, max_size=4).map(tuple),
    kwargs=st.dictionaries(NAMES, ARGUMENTS, max_size=3),
    experiment=st.dictionaries(NAMES, JSON, max_size=3),
    factory_kwargs=st.dictionaries(NAMES, JSON, max_size=3),
    seed=st.integers(0, 2**63 - 1),
    learning_rate=st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
)
def test_a_document_survives_exactly(
    arguments, kwargs, experiment, factory_kwargs, seed, learning_rate
):
    training = TrainingSpec(optimizer_kwargs={"lr": learning_rate})
    model = entry(seed=seed, training=training, factory=Factory("m:f", factory_kwargs))
    data = document(models=(model,), graph=graph(arguments, **kwargs), experiment=experiment)
    text = data.to_json()
    back = GraphData.from_json(text)
    assert back.to_json() == text
    for before, after in zip(data.graph.nodes, back.graph.nodes, strict=True):
        assert exact(after.args) == exact(before.args)
        assert exact(after.kwargs) == exact(before.kwargs)
        assert (after.name, after.types, after.owners) == (before.name, before.types, before.owners)
    assert back.graph.outputs == data.graph.outputs
    assert exact(back.experiment) == exact(experiment)
    assert exact(back.models[0].factory.kwargs) == exact(factory_kwargs)
    assert exact(back.models[0].training.optimizer_kwargs) == exact({"lr": learning_rate})
    assert back.models[0] == model
    assert back.data == data.data


@pytest.mark.parametrize("value", [[1], {"a": 1}, 1j, b"x", object(), {1}])
def test_what_is_no_argument_is_not_written(value):
    with pytest.raises(GraphDataError, match="cannot be an argument"):
        encode_argument((1, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1}])
def test_what_is_no_json_is_not_written(value):
    with pytest.raises(GraphDataError, match="the document cannot be written"):
        document(experiment={"value": value}).to_json()


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1]])
def test_unknown_version(version):
    with pytest.raises(GraphDataVersionError, match="this package reads version 1"):
        GraphData.load(wire(version=version))


def test_no_version():
    with pytest.raises(GraphDataVersionError, match="version None"):
        GraphData.load({})


@pytest.mark.parametrize("text", ["", "{", "nonsense", b"\xff\xfe{", "[" * 100_000, '{"a": NaN}'])
def test_not_json(text):
    with pytest.raises(GraphDataError, match="not a JSON document"):
        GraphData.from_json(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"version"'])
def test_not_an_object(text):
    with pytest.raises(GraphDataError, match="a document is a JSON object"):
        GraphData.from_json(text)


def test_oversized_text_and_file(monkeypatch, tmp_path):
    text = document().to_json()
    (tmp_path / "graph.json").write_text(text)
    monkeypatch.setattr(cgo.graph_data, "MAX_BYTES", len(text) - 1)
    with pytest.raises(GraphDataTooLargeError, match=f"{len(text):,} bytes; at most"):
        GraphData.from_json(text)
    with pytest.raises(GraphDataTooLargeError, match=r"graph\.json: "):
        GraphData.read(tmp_path / "graph.json")
    monkeypatch.setattr(cgo.graph_data, "MAX_BYTES", len(text))
    GraphData.read(tmp_path / "graph.json")


def with_node(**changes: Any) -> dict[str, Any]:
    found = wire()
    found["nodes"][1] |= changes
    return found


@pytest.mark.parametrize(
    "op",
    [
        "aten.no_such_operator.default",
        "aten.add_.Tensor",  # mutable
        "aten.add.out",
        "aten.name.upper",
        "os.system.default",
        "cgo.exec",
    ],
)
def test_unknown_and_mutable_operators(op):
    with pytest.raises(UnknownOperatorError) as caught:
        GraphData.load(with_node(op=op))
    assert "%a/train/4/y (models a)" in str(caught.value)
    assert repr(op) in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        {},
        {"ref": ["a/train/4/x"]},
        {"ref": ["a/train/4/x", "0"]},
        {"ref": ["a/train/4/x", True]},
        {"ref": ["a/train/4/x", 0], "more": 1},
        {"ref": "a/train/4/x"},
        {"symbol": ["dtype"]},
        {"symbol": [1, 2]},
        {"float": "1.0"},
        {"float": 1.0},
        {"call": "os:system"},
    ],
)
def test_what_is_no_argument_is_not_read(argument):
    with pytest.raises(GraphDataError, match="not an argument"):
        GraphData.load(with_node(args=[[argument]]))


def test_arguments_nested_without_end():
    argument: Any = 1
    for _ in range(400):
        argument = [argument]
    with pytest.raises(GraphDataError, match="nested too deeply"):
        GraphData.load(with_node(args=[argument]))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good document with one value replaced; `path` is dotted."""
    found = copy.deepcopy(wire())
    *parents, last = path.split(".")
    place: Any = found
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[int(last) if isinstance(place, list) else last] = value
    return found


REFUSED = {
    "two models have the id 'a'": wire(models=wire()["models"] * 2),
    "data 'other' is not in the document": changed("models.0.data", "other"),
    "%a/train/4/x: data 'other' is not in the document": changed("nodes.0.kwargs.data", "other"),
    "needs either a factory or weights": changed("models.0.factory", None),
    "an opaque model needs a factory": wire(
        models=[
            wire()["models"][0]
            | {"factory": None, "weights": {"file": "w", "sha256": ""}, "opaque": "why"}
        ]
    ),
    "factory 'no path' is not of the form": changed("models.0.factory.target", "no path"),
    "reads %a/train/4/z, which is not defined before it": changed(
        "nodes.1.args.0", {"ref": ["a/train/4/z", 0]}
    ),
    "reads output 1 of %a/train/4/x, which has 1": changed(
        "nodes.1.args.0", {"ref": ["a/train/4/x", 1]}
    ),
    "reads %b, which is not defined": changed("outputs.0.ref", {"ref": ["b", 0]}),
    "output loss of model 'a' is not a reference": changed("outputs.0.ref", 1),
    "two nodes are called %a/train/4/x": changed("nodes.1.name", "a/train/4/x"),
    "owned by ['b'], needed by ['a']": changed("nodes.1.owners", ["b"]),
    "outputs.0.role: Input should be 'loss', 'prediction' or 'update'": changed(
        "outputs.0.role", "other"
    ),
    "nodes.0.name: Input should be a valid string": changed("nodes.0.name", 1),
    "nodes.0.code: Extra inputs are not permitted": changed("nodes.0.code", "import os"),
    "code: Extra inputs are not permitted": wire(code="import os"),
    "alias 'a' of 'a': the twin must be a model, and the alias none": wire(aliases={"a": "a"}),
    "alias 'b' of 'c': the twin must be a model": wire(aliases={"b": "c"}),
    "'../w' does not lie beside the document": wire(constants={"file": "../w", "sha256": ""}),
    "'/etc/passwd' does not lie beside": wire(constants={"file": "/etc/passwd", "sha256": ""}),
    "'C:\\\\w' does not lie beside": wire(constants={"file": "C:\\w", "sha256": ""}),
    "epochs: Input should be greater than or equal to 1": changed("models.0.training.epochs", 0),
    "no metric 'no_such'": changed("models.0.training.metrics", ["no_such"]),
    "cannot import 'no_such_module'": changed(f"data.{SPEC.digest}.source", "no_such_module:f"),
    "'nonsense' is not of the form": changed(f"data.{SPEC.digest}.source", "nonsense"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(GraphDataError) as caught:
        GraphData.load(REFUSED[message])
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["models", "data", "nodes", "outputs"])
def test_a_missing_field(field):
    found = wire()
    del found[field]
    with pytest.raises(GraphDataError, match=f"{field}: Field required"):
        GraphData.load(found)


def test_an_output_for_an_unknown_model():
    made = graph()
    other = replace(
        made, outputs=(*made.outputs, Output("b", "train/4", "loss", "", Ref("a/train/4/x")))
    )
    with pytest.raises(GraphDataError, match="an output is for model 'b', which is not there"):
        GraphData.load(document(graph=prune(other)).dump())


def test_constants_without_their_file():
    constant = Node(
        "a/train/4/c", "cgo.constant", (), (("content", "c0"),), (None,), frozenset({"a"})
    )
    made = Graph((constant,), (Output("a", "train/4", "loss", "", Ref("a/train/4/c")),))
    with pytest.raises(
        GraphDataError, match=r"%a/train/4/c: the document has no file of constants"
    ):
        GraphData.load(document(graph=made).dump())


# --- files ------------------------------------------------------------------------------------


def test_files_are_checked_by_content(tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "w.safetensors"
    file.write_bytes(b"weights" * 300_000)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_sha256(file) == sha256
    weights = FileRef("deep/w.safetensors", sha256)
    data = document(models=(entry(factory=None, weights=weights),), base=tmp_path)
    data.write(tmp_path / "graph.json")
    read = GraphData.read(tmp_path / "graph.json")
    read.check_files()
    file.write_bytes(b"other")
    with pytest.raises(WeightsHashError, match=f"weights of model 'a': .*says {sha256}"):
        read.check_files()
    file.unlink()
    with pytest.raises(MissingWeightsError, match="weights of model 'a': there is no file"):
        read.check_files()


def test_the_constants_file_is_checked(tmp_path):
    data = document(constants=FileRef("constants.safetensors", "0" * 64), base=tmp_path)
    with pytest.raises(MissingWeightsError, match="constants: there is no file"):
        data.check_files()
    (tmp_path / "constants.safetensors").write_bytes(b"")
    with pytest.raises(WeightsHashError, match="constants: "):
        data.check_files()


# --- no code ----------------------------------------------------------------------------------


def test_reading_imports_no_factory(tmp_path, monkeypatch):
    (tmp_path / "leaves_a_trace.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    read = GraphData.load(changed("models.0.factory.target", "leaves_a_trace:build"))
    assert read.models[0].factory.target == "leaves_a_trace:build"
    assert "leaves_a_trace" not in sys.modules


@pytest.mark.parametrize("place", ["nodes.1.name", "nodes.1.group", "experiment.name"])
def test_an_import_path_elsewhere_is_only_text(place, tmp_path, monkeypatch):
    (tmp_path / "leaves_a_trace.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "a/train/4/leaves_a_trace:run" if place == "nodes.1.name" else "leaves_a_trace:run"
    found = changed(place, text)
    if place == "nodes.1.name":
        found["outputs"][0]["ref"] = {"ref": [text, 2]}
    GraphData.load(found)
    assert "leaves_a_trace" not in sys.modules


# --- the published schema ---------------------------------------------------------------------

SCHEMA = Path(cgo.graph_data.__file__).with_name("graph_data.schema.json")
REGENERATE = (
    "python -c 'import json, cgo.graph_data as g; "
    "print(json.dumps(g.schema(), indent=2))' > cgo/graph_data.schema.json"
)


def test_the_published_schema_is_the_one_in_force():
    assert json.loads(SCHEMA.read_text()) == schema(), f"write it again: {REGENERATE}"


def test_the_schema_has_no_dangling_reference():
    text = SCHEMA.read_text()
    definitions = set(json.loads(text)["$defs"])
    references = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert references <= definitions
    assert {"Argument", "Reference"} <= references


def test_the_graph_in_the_examples_is_what_it_says():
    assert dump(document().graph).splitlines()[-1] == "a train/4 loss <- %a/train/4/y#2"
