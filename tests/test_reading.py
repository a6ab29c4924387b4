"""Documents that name what this process cannot import: the models that do not need it are read."""

import json

import pytest

import cgo
from cgo.errors import GraphDataError, GraphDataVersionError
from cgo.graph import verify
from cgo.planner import Planner
from cgo.reading import read_document


def model(id_, source="points", **training):
    data = cgo.DataSpec(f"support.small:{source}", batch_size=20)
    return cgo.Model(
        "support.small:mlp", data=data, training=cgo.TrainingSpec(**training), model_id=id_
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    given = [
        model("plain"),
        model("loss", loss="support.losses:smoothed"),
        model("data", source="noisy_points"),
        model("scheduler", scheduler="support.losses:Decaying"),
        model("twin"),
        model("loss-twin", loss="support.losses:smoothed"),
    ]
    folder = tmp_path_factory.mktemp("reading")
    Planner().plan(given, folder)
    return (folder / "graph.json").read_text()


def test_a_document_whose_names_are_all_there_is_read_whole(text, tmp_path):
    document, refused = read_document(text, tmp_path)
    assert document == cgo.GraphData.from_json(text, base=tmp_path)
    assert refused == {}


def test_models_that_name_what_is_not_there_are_left_out_with_their_reasons(text, tmp_path):
    missing = text.replace("support.losses", "support.gone").replace(
        "support.small:noisy_points", "support.small:missing_points"
    )
    document, refused = read_document(missing, tmp_path)
    assert [entry.id for entry in document.models] == ["plain"]
    assert document.aliases == {"twin": "plain"}
    assert {output.model for output in document.graph.outputs} == {"plain"}
    verify(document.graph)
    assert len(document.data) == 1
    assert set(refused) == {"loss", "data", "scheduler"}
    assert refused["loss"].startswith("model 'loss': training.loss: ")
    assert "cannot import 'support.gone'" in refused["scheduler"]
    assert refused["data"] == (
        "model 'data': source: module 'support.small' has no 'missing_points'"
    )


def test_a_document_none_of_whose_models_can_be_read_holds_none(text, tmp_path):
    document, refused = read_document(text.replace("support.small:", "support.gone:"), tmp_path)
    assert document.models == ()
    assert len(refused) == 4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda document: document | {"version": 9}, GraphDataVersionError),
        (lambda document: document | {"nodes": 3}, GraphDataError),
        (lambda document: {"version": 1}, GraphDataError),
        (lambda document: document | {"models": [{}]}, GraphDataError),
        (lambda document: document | {"extra": 1}, GraphDataError),
        (lambda document: [], GraphDataError),
    ],
)
def test_whatever_else_is_wrong_refuses_the_document(change, error, text, tmp_path):
    for source in (text, text.replace("support.losses", "support.gone")):
        with pytest.raises(error):
            read_document(json.dumps(change(json.loads(source))), tmp_path)


def test_a_field_that_is_wrong_refuses_the_document_and_not_its_model_alone(text, tmp_path):
    document = json.loads(text)
    document["models"][1]["training"]["epochs"] = 0
    with pytest.raises(GraphDataError, match="epochs"):
        read_document(json.dumps(document), tmp_path)
