"""Searches as files."""

import json
from pathlib import Path

import pytest

import cgo
from cgo.errors import SpecError
from cgo.search_spec import load, schema

BASE = """
data: {source: "support.small:points", batch_size: 16}
training: {metrics: [accuracy], epochs: 2, optimizer_kwargs: {lr: 0.1}}
models:
  - module: support.small:mlp
"""


def write(tmp_path, text):
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_all_combinations_with_all_seeds(tmp_path):
    extra = """    kwargs: {dropout: 0.1}
    grid: {hidden: [3, 4], features: [6]}
    seeds: [0, 1]
    training: {epochs: 5}
"""
    models = load(write(tmp_path, BASE + extra)).build()
    assert [(m.kwargs["hidden"], m.seed) for m in models] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert [m.model_id for m in models] == [f"mlp-0.{n}" for n in range(4)]
    assert {m.training.epochs for m in models} == {5}
    assert models[0].training.optimizer_kwargs == {"lr": 0.1}
    assert models[0].data == cgo.DataSpec("support.small:points", batch_size=16)


def test_paths_are_relative_to_the_file_and_importable(tmp_path):
    (tmp_path / "beside_the_file.py").write_text("from support.small import mlp as net")
    text = BASE.replace("support.small:mlp", "beside_the_file:net")
    spec = load(write(tmp_path, text + "engine: {experiment_dir: out}\n"))
    assert spec.engine.experiment_dir == tmp_path / "out"
    assert len(spec.build()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", "not YAML"),
        ("models: []", "data: Field required"),
        (BASE + "extra: 1", "extra: Extra inputs are not permitted"),
        (BASE + "    grid: {hidden: 3}", "models.0.grid.hidden: Input should be a valid list"),
        (BASE + "    seeds: []", "models.0.seeds: List should have at least 1 item"),
        (BASE + "engine: {max_models: 0}", "engine.max_models: Input should be greater"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_by_field(tmp_path, text, message):
    with pytest.raises(SpecError, match=message):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("batch_size: 16", "batchsize: 16", "data: unknown fields batchsize"),
        ("epochs: 2", "epochs: 0", r"models\[0\].training: TrainingSpec: epochs"),
        (":mlp", ":missing", r"models\[0\]: Model: module: .* has no 'missing'"),
    ],
)
def test_what_the_specs_refuse_is_named_with_its_section(tmp_path, before, after, message):
    with pytest.raises(SpecError, match=message):
        load(write(tmp_path, BASE.replace(before, after))).build()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml: No such file"):
        load(tmp_path / "none.yaml")


def test_the_published_schema_is_current():
    path = Path(cgo.__file__).parent / "search.schema.json"
    assert json.loads(path.read_text()) == schema(), (
        'regenerate it: python -c "from cgo.search_spec import write_schema; '
        "from pathlib import Path; write_schema(Path('cgo/search.schema.json'))\""
    )
