"""Hostile documents: what each is answered with. SECURITY.md names these tests, row by row."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import hostile
from support.special import special

import cgo
from cgo import limits, weights
from cgo.errors import CgoError, GraphDataError, MissingWeightsError, SpecError, TrialError
from cgo.graph_data import GraphData
from cgo.runtime.member import Member
from cgo.runtime.watching import Limits
from cgo.trial import execute

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Real documents and the folders that their files lie in."""
    folder = tmp_path_factory.mktemp("documents")
    return hostile.write_documents(folder), folder


@pytest.fixture
def documents(made):
    return copy.deepcopy(made[0])


def put(document, path, value):
    """The document with one value set; `path` is dotted, with numbers for places in lists."""
    *parents, last = path.split(".")
    place = document
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[int(last) if isinstance(place, list) else last] = value
    return document


def node_of(document, op, model="a"):
    """The first training node of an operator that a model owns."""
    return next(
        node
        for node in document["nodes"]
        if node["op"] == op and model in node["owners"] and "/train/" in node["name"]
    )


def refusal(document, base="."):
    """Our own error, fit for a terminal."""
    text = document if isinstance(document, (str, bytes)) else json.dumps(document)
    with pytest.raises(GraphDataError) as caught:
        GraphData.from_json(text, base=base)
    said = str(caught.value)
    assert said.replace("\n", "").isprintable()
    assert len(said) < 10_000
    return said


def trained(document, base, folder, limits=None):
    """How each model ended."""
    events = []
    data = GraphData.from_json(json.dumps(document), base=base)
    execute(data, folder=folder, report=events.append, limits=limits)
    return {event.model: event.value for event in events if event.kind == "ended"}


# --- ids and file names -----------------------------------------------------------------------

IDS = ["../../x", "/x", "a/b", "a\\b", "", "a\0", "a\n", "\x1b[31m", "\ud800", "x" * 300, "é", "."]


@pytest.mark.parametrize("id_", IDS)
def test_ids(id_, documents):
    document = documents["points"]
    for place, key in list(hostile.places(document)):
        if place[key] == "a" and isinstance(place[key], str):
            place[key] = id_
    assert re.search(r"models.0.id|half a character", refusal(document))
    assert "aliases" in refusal(documents["stems"] | {"aliases": {id_: "a"}}) or id_ == "\ud800"
    with pytest.raises(SpecError, match="model_id"):
        cgo.Model(
            "support.hostile:mlp",
            data=cgo.DataSpec("support.hostile:points", batch_size=4),
            training=cgo.TrainingSpec(),
            model_id=id_,
        )


def test_file_names(made, documents, tmp_path):
    """Ids that one file system takes for each other, or for a device, have files of their own."""
    document = documents["points"]
    for old, new in {"a": "CON", "b": "con", "c": "b."}.items():
        for place, key in list(hostile.places(document)):
            if place[key] == old and isinstance(place[key], str):
                place[key] = new
    ended = trained(document, made[1] / "points", tmp_path)
    files = [value["weights"] for value in ended.values()]
    assert len({file.lower().rstrip(".") for file in files}) == 3
    assert not {"weights/con.safetensors", "weights/CON.safetensors"} & set(files)
    for id_, file in zip(ended, files):
        assert (tmp_path / file).is_file(), id_
    assert {p.name for p in (tmp_path / "weights").iterdir()} == {Path(f).name for f in files}


# --- fixed lists ------------------------------------------------------------------------------

NAMES = ["load", "quint8", "hub", "os", "FLOAT32", "", "__dict__", "float32.__class__"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_torch(name, documents, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(a))
    points = documents["points"]
    for path in ("nodes.0.types.0.dtype", "models.0.state.0.dtype", "nodes.20.autocast"):
        assert "Input should be" in refusal(put(copy.deepcopy(points), path, name))
    for kind in ("dtype", "layout", "memory_format", "device", name):
        changed = put(copy.deepcopy(points), "nodes.20.args", [{"symbol": [kind, name]}])
        assert "is none of" in refusal(changed)
    for field in ("loss", "optimizer", "scheduler"):
        changed = put(copy.deepcopy(points), f"models.0.training.{field}", name)
        assert f"{field}: " in refusal(changed)
    assert not calls


@pytest.mark.parametrize(
    "op",
    ["aten.from_file.default", "aten.add_.Tensor", "aten.set.source_Tensor", "aten.save.default",
     "aten.manual_seed.default", "aten._cudnn_rnn.default", "aten.quantize_per_tensor.default",
     "aten.special_hermite_polynomial_h.default", "aten.to_sparse.default", "aten.__dict__.x",
     "aten.resize.default", "prims.add.default", "os.system", "cgo.exec", "aten.a b.c\n"],
)  # fmt: skip
def test_operators(op, documents, tmp_path):
    document = documents["points"]
    node = node_of(document, "aten.linear.default")
    node |= {"op": op, "args": [str(tmp_path / "made"), True, 1000], "kwargs": {}}
    assert re.search(r"is not known here|cannot be printed", refusal(document))
    assert not list(tmp_path.iterdir())


# --- numbers and sizes ------------------------------------------------------------------------

RANGES = {
    "models.0.seed": [-1, 2**63, 2**64, 1.5, "x", None],
    "models.0.training.epochs": [0, -1, 2**31, 2**64],
    "models.0.training.grad_clip_norm": [0, -1.0],
    "models.0.state.0.shape": [[-1], [2**60], [2**20, 2**20], ["x"], [1] * 65, None],
    "nodes.0.types.0.shape": [[-1], [2**60], [2**20, 2**20], [0, 2**62], [1.5], [1] * 65],
    "nodes.0.types.0.stride": [[-1, 1], [1], [2**40, 1], [2**36, 2**36], ["x", 1]],
    "data.SPEC.batch_size": [0, -1, 2**31, "x", None],
    "data.SPEC.seed": [-1, 2**63, 2**64],
    "data.SPEC.num_workers": [-1, 10_000],
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, vs in RANGES.items() for v in vs])
def test_ranges(path, value, documents):
    document = documents["points"]
    (digest,) = document["data"]
    assert refusal(put(document, path.replace("SPEC", digest), value))


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity", "1" * 5000])
@pytest.mark.parametrize(
    "path",
    ["models.0.training.optimizer_kwargs.lr", "models.0.factory.kwargs.dropout",
     "experiment.rate", "nodes.20.args", "models.0.seed", "models.0.training.loss_scale"],
)  # fmt: skip
def test_numbers_without_end(path, text, documents):
    changed = put(documents["points"], path, "@here@")
    said = refusal(json.dumps(changed).replace('"@here@"', text))
    assert said.startswith("not a JSON document: ")


def test_numbers_that_are_infinite_already(documents):
    """As NNI hands a document over: values, and no text."""
    changed = put(documents["points"], "models.0.factory.kwargs.dropout", float("inf"))
    with pytest.raises(GraphDataError, match=r"models.0.factory.kwargs.dropout: inf is no finite"):
        GraphData.load(changed)
    for value in (object(), {1: 2}, b"x", {1}):
        with pytest.raises(GraphDataError, match=r"no JSON value|is no text"):
            GraphData.load(documents["stems"] | {"experiment": {"x": value}})


def test_sizes(documents, monkeypatch, tmp_path):
    document = documents["points"]
    deep = json.dumps(document).replace('"fuzz"', "[" * 100 + "]" * 100)
    assert "nested too deeply; at most 64 levels" in refusal(deep)
    assert "not a JSON document" in refusal("[" * 10_000_000)
    circle = {"experiment": {}} | document
    circle["experiment"] = {"x": circle}
    with pytest.raises(GraphDataError, match="nested too deeply"):
        GraphData.load(circle)
    long = put(copy.deepcopy(document), "nodes.0.name", "x" * 3000)
    assert "at most 2000 characters" in refusal(long)
    monkeypatch.setattr(limits, "MOST_TEXT", 1000)
    assert "a text of 1,001 char" in refusal(put(documents["stems"], "experiment.x", "y" * 1001))
    monkeypatch.setattr(limits, "MOST_MODELS", 2)
    assert "the document has 3 models; at most 2" in refusal(document)
    monkeypatch.setattr(limits, "MOST_MODELS", 20)
    monkeypatch.setattr(limits, "MOST_NODES", 10)
    assert f"the document has {len(document['nodes'])} nodes; at most 10" in refusal(document)


def test_large_types(documents):
    """What no device holds is refused before anything is made of it."""
    document = documents["points"]
    node = node_of(document, "aten.linear.default")
    node["types"][0]["shape"] = [2**30, 2**30]
    assert f"%{node['name']}: a tensor of [{2**30}, {2**30}]; at most" in refusal(document)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_halves_of_characters(text, documents):
    for path in ("nodes.0.name", "experiment.name", "models.0.factory.kwargs.x"):
        assert "half a character" in refusal(put(copy.deepcopy(documents["points"]), path, text))


@pytest.mark.parametrize("text", ["\0", "\x1b[2J", "a\nb", "\u202e", "\u2028"])
def test_texts_that_cannot_be_printed(text, documents):
    for path in ("nodes.0.name", "nodes.0.op", "outputs.0.key", "models.0.state.0.path"):
        changed = put(copy.deepcopy(documents["points"]), path, text)
        assert "cannot be printed" in refusal(changed)


@pytest.mark.parametrize(
    "tuning",
    [[], "x", None, {"x": 1}, {"width": "x"}, {"most_s": None}, {"tape": 1}, {"record": 1}],
)
def test_tuning(tuning, documents):
    assert refusal(put(documents["points"], "experiment.tuning", tuning)).startswith(
        "experiment: tuning: "
    )


# --- files ------------------------------------------------------------------------------------

OUTSIDE = ["../w", "/etc/passwd", "C:\\w", "a/../../w", "\\\\host\\w", "", ".", "a\0", "..\\w"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside(name, documents):
    document = documents["files"]
    reference = {"file": name, "sha256": "0" * 64}
    for path in ("constants", "models.0.weights"):
        said = refusal(put(copy.deepcopy(document), path, reference))
        assert re.search(r"does not lie beside|cannot be printed", said)
    said = refusal(put(documents["lazy"], "models.0.begun", reference))
    assert re.search(r"does not lie beside|cannot be printed", said)


@pytest.mark.parametrize(
    "change",
    [
        {"0.weight": None}, {"9.weight": torch.zeros(3)}, {"0.weight": torch.zeros(5, 5)},
        {"0.bias": torch.zeros(1)}, {"0.weight": torch.zeros(4, 6, dtype=torch.int64)},
        {"2.weight": torch.zeros(1, 1)}, {"0.more": torch.zeros(2)}, {"training": torch.zeros(2)},
        {"0.forward": torch.zeros(2)}, {"": torch.zeros(2)}, {"cgo.stream": torch.zeros(3)},
        {"cgo.stream": torch.zeros(5056, dtype=torch.uint8)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model", [0, 2], ids=["captured", "opaque"])
def test_what_first_calls_have_not_made(model, change, made, documents, tmp_path):
    """Tensors of other names, shapes and kinds: that model fails, or computes with its numbers."""
    document, base = documents["lazy"], tmp_path / "lazy"
    whole = trained(document, made[1] / "lazy", tmp_path / "whole")
    shutil.copytree(made[1] / "lazy", base)
    begun = document["models"][model]["begun"]
    tensors = weights.load(base / begun["file"])
    prefix = "body." if model == 2 else ""
    for path, value in change.items():
        path = path.replace("0.", prefix) if path.startswith("0.") and prefix else path
        tensors = {**tensors, path: value} if value is not None else _without(tensors, path)
    weights.save(base / begun["file"], tensors)
    begun["sha256"] = cgo.graph_data.file_sha256(base / begun["file"])
    ended = trained(document, base, tmp_path / "out")
    bad = document["models"][model]["id"]
    assert {id_: v for id_, v in ended.items() if id_ != bad} == {
        id_: v for id_, v in whole.items() if id_ != bad
    }
    assert ended[bad]["error"] is None or len(ended[bad]["error"]) < 1000


def _without(tensors, path):
    return {key: value for key, value in tensors.items() if key != path}


def test_links_that_lead_outside(made, documents, tmp_path):
    folder = tmp_path / "trial"
    folder.mkdir()
    secret = tmp_path / "secret.safetensors"
    weights.save(secret, {"x": torch.zeros(1)})
    (folder / "link.safetensors").symlink_to(secret)
    reference = {"file": "link.safetensors", "sha256": cgo.graph_data.file_sha256(secret)}
    data = GraphData.load(put(documents["files"], "models.0.weights", reference), base=folder)
    with pytest.raises(GraphDataError, match=r"weights of model 'a': .* leads out of its folder"):
        data.check_files()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
def test_files_that_are_none(kind, made, documents, tmp_path):
    """Nothing waits for the other end of a pipe, or reads a device without end."""
    folder = made[1] / "files"
    with pytest.raises(GraphDataError, match="no document can be read"):
        GraphData.read(special(kind, tmp_path / "graph.json"))
    file = f"{kind}.safetensors"
    special(kind, folder / file)
    reference = {"file": file, "sha256": "0" * 64}
    data = GraphData.load(put(documents["files"], "models.0.weights", reference), base=folder)
    with pytest.raises((MissingWeightsError, GraphDataError), match="weights of model 'a'"):
        data.check_files()
    if kind != "missing":
        (out := tmp_path / "out").mkdir()
        special(kind, out / "checkpoint.pt")
        with pytest.raises(TrialError, match="cannot read checkpoint"):
            trained(documents["points"], folder.parent / "points", out)
    tuning = documents["points"]["experiment"]["tuning"] | {"record": str(folder / file)}
    with pytest.raises(TrialError, match="is no record of lowering choices"):
        trained(
            put(documents["points"], "experiment.tuning", tuning), folder, tmp_path / "elsewhere"
        )


RECORDS = ["", "[]", "{}", "[" * 100_000, '{"device": 1, "choices": {}}',
           '{"device": "x", "choices": {"k": {"g0": ["vmap", "stacked", 0, 1.0]}}}',
           '{"device": "x", "choices": {"k": {"g0": ["vmap", "stacked", "4", 1.0]}}}',
           '{"device": "x", "choices": {"k": {"g0": ["vmap"]}}}',
           '{"device": "x", "choices": {"k": []}}',
           '{"device": "x", "choices": {}, "compiled": {"s": "yes"}}']  # fmt: skip


@pytest.mark.parametrize("text", RECORDS)
def test_records(text, made, documents, tmp_path):
    (tmp_path / "lowering.json").write_text(text)
    with pytest.raises(TrialError, match=r"lowering\.json is no record of lowering choices"):
        trained(documents["points"], made[1] / "points", tmp_path)


@pytest.mark.parametrize(
    "found",
    [{}, {"version": 1, "members": []}, [1], {"version": 2}],
)
def test_checkpoints(found, made, documents, tmp_path):
    torch.save(found, tmp_path / "checkpoint.pt")
    with pytest.raises(TrialError, match=r"checkpoint .*"):
        trained(documents["points"], made[1] / "points", tmp_path)


def dumped(document, folder, tmp_path):
    """A checkpoint's record of a model before its first step."""
    data = GraphData.load(document, base=folder)
    (entry,) = [entry for entry in data.models if entry.id == "a"]
    return Member(entry, data, torch.device("cpu"), tmp_path, lambda event: None).dump()


@pytest.mark.parametrize("how", ["empty", "no state", "shape", "number"])
def test_a_part_of_a_checkpoint_that_does_not_fit(how, made, documents, tmp_path):
    """That model starts anew, and says so; the result is that of a folder without checkpoint."""
    folder = made[1] / "points"
    record = {"empty": {}, "no state": {"history": [], "ended": None, "state": 1}}.get(how)
    if record is None:
        record = dumped(documents["points"], folder, tmp_path)
        record["state"]["tensors"]["0.weight"] = torch.ones(()) if how == "shape" else 1.0
    torch.save({"version": 1, "members": {"a": record}}, tmp_path / "checkpoint.pt")
    found = trained(documents["points"], folder, tmp_path)
    assert found == trained(documents["points"], folder, tmp_path / "new")


class Exploit:
    """What unpickling would run."""

    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_checkpoints_that_hold_code(made, documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"version": 1, "members": {"a": Exploit()}}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrialError, match="cannot read checkpoint"):
        trained(documents["points"], made[1] / "points", tmp_path)
    assert not (tmp_path / "exploited").exists()


# --- what later code relies on ----------------------------------------------------------------


def renamed(document, new):
    """The first operator under another name, wherever it is referred to."""
    old = node_of(document, "aten.linear.default")["name"]
    for place, key in list(hostile.places(document)):
        if place[key] == old and isinstance(place[key], str):
            place[key] = new
    return document


@pytest.mark.parametrize(
    "name", ["a", "a/train", "a/train/x/y", "a/train/4", "a/train/0/x", "a/test/4/x",
             "a/train/-4/x", "/train/4/x", "a/train/4/", "a/train/" + "9" * 40 + "/x", "a//4/x"],
)  # fmt: skip
def test_names_of_nodes(name, documents):
    said = refusal(renamed(documents["points"], name))
    assert f"%{name}: its name does not say which program it is of" in said


@pytest.mark.parametrize("program", ["", "train", "train/x", "train/0", "test/4", "train/4/5"])
def test_names_of_programs(program, documents):
    assert "is not of the form 'train/64'" in refusal(
        put(documents["points"], "outputs.0.program", program)
    )


SOURCES = {
    "cgo.input": ({"leaf": "other"}, {"split": "test"}, {"size": -1}, {"size": "4"}, {"data": 1},
                  {"more": 1}, {"leaf": None}),
    "cgo.parameter": ({"path": "none"}, {"model": "z"}, {"trainable": False}, {"content": 1},
                      {"trainable": 1}, {"more": 1}, {"twins": 1}, {"twins": [["a", 1]]}),
    "cgo.buffer": ({"path": "0.weight"}, {"model": "b"}, {"twins": [["a", "none"]]}),
    "cgo.random": ({"model": "z"}, {"order": -1}, {"order": "1"}, {"distribution": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("op", "fields"), [(op, f) for op, fs in SOURCES.items() for f in fs])
def test_sources(op, fields, documents):
    document = documents["points"]
    node = next(node for node in document["nodes"] if node["op"] == op)
    node["kwargs"] = dict(sorted((node["kwargs"] | fields).items()))
    assert f"%{node['name']}" in refusal(document)


def test_state_that_does_not_agree(documents):
    points = documents["points"]
    said = refusal(put(copy.deepcopy(points), "models.0.state.0.shape", [4, 7]))
    assert "float32 [4, 6], but '0.weight' of model 'a' is float32 [4, 7]" in said
    twice = copy.deepcopy(points)
    twice["models"][0]["state"] *= 2
    assert "'0.weight' stands twice in its state" in refusal(twice)
    for alias in ("none", "0.weight", "4.bias"):
        tied = put(copy.deepcopy(points), "models.0.state.0.alias_of", alias)
        assert "which is no tensor before it" in refusal(tied)
    update = next(o for o in points["outputs"] if o["role"] == "update")
    update["key"] = "0.weight"
    assert "'0.weight' is no buffer of it" in refusal(points)


def test_modules_that_do_not_agree(made, documents, tmp_path):
    """What the factory builds is compared with what the programs were planned for."""
    document = put(documents["stems"], "models.0.factory.kwargs", {"hidden": 5})
    document = put(document, "models.1.factory", {"target": "support.hostile:decides"})
    ended = trained(document, made[1] / "stems", tmp_path)
    assert "must build the same module each time" in ended["a"]["error"]
    assert "must build the same module each time" in ended["b"]["error"]
    assert ended["o"]["success"]


def test_groups(made, documents, tmp_path):
    document = documents["points"]
    node = next(n for n in document["nodes"] if n.get("group") and n["op"] == "cgo.batch_norm")
    node["args"][-1] = 1e-3
    with pytest.raises(GraphDataError, match=r"are of one group 'g\d+', and differ in arguments"):
        trained(document, made[1] / "points", tmp_path)


# --- operators --------------------------------------------------------------------------------


@pytest.fixture
def alone(documents):
    """The document of one model of vectors: what happens to it is nobody else's."""
    document = documents["stems"]
    return document, node_of(document, "aten.softplus.default", "b")


CALLS = {
    "gives float32 [4, 3], the document has float32 [5, 3]": {"types": [[5, 3]]},
    "gives float32 [4, 3], the document has int64 [4, 3]": {"dtype": "int64"},
    "the document has 2": {"types": [[4, 3], [4, 3]]},
    "expected at most": {"more": [1, 2, 3, 4, 5]},
    "Expected a value of type": {"more": ["x"]},
    "Dimension out of range": {"op": "aten.sum.dim_IntList", "more": [[7]]},
    "only Tensors of floating point dtype": {"op": "aten.view_as_complex.default"},
    "no tensors in tensors": {"op": "aten.cat.default", "args": [[]]},
    "dtype 1000 is no dtype": {"op": "aten.softmax.int", "more": [1, 1000]},
    "is no dtype": {"op": "aten.softmax.int", "more": [1, {"symbol": ["layout", "strided"]}]},
    "dtype 6 is no dtype": {"op": "aten.cumsum.default", "more": [0], "kwargs": {"dtype": 6}},
    "memory_format 7 is no": {"op": "aten.clone.default", "kwargs": {"memory_format": 7}},
    "layout -1 is no layout": {"op": "aten.zeros_like.default", "kwargs": {"layout": -1}},
    "process's random stream": {"op": "aten.random.from", "more": [0, 5]},
    "_fft_r2c.default cannot be called so": {
        "op": "aten._fft_r2c.default",
        "args": [1, [0], 0, True],
    },
    "range.step cannot be called so": {
        "op": "aten.range.step",
        "args": [0, 5, "x"],
        "kwargs": {"dtype": {"symbol": ["dtype", "int8"]}},
    },
    "as_strided.default cannot be called so": {
        "op": "aten.as_strided.default",
        "more": [[1], [1], "x"],
    },
    "draws from the process": {"op": "aten.dropout.default", "more": [0.5, True]},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls(message, made, alone, tmp_path):
    document, node = alone
    change = CALLS[message]
    node["op"] = change.get("op", node["op"])
    node["args"] = change.get("args", node.get("args", []) + change.get("more", []))
    node["kwargs"] = change.get("kwargs", {})
    shapes = change.get("types", [node["types"][0]["shape"]])
    node["types"] = [{"dtype": change.get("dtype", "float32"), "shape": s} for s in shapes]
    if change.get("args"):
        hostile_owners(document)
    ended = trained(document, made[1] / "stems", tmp_path)
    if message == "only Tensors of floating point dtype":
        message = "cannot be called so"
    assert message in ended["b"]["error"], ended["b"]["error"]
    assert ended["b"]["error"].startswith(f"%{node['name']}: ")
    assert ended["a"]["success"]
    assert ended["o"]["success"]


def hostile_owners(document):
    from support.calls_drawn import own_again

    own_again(document)


LARGE = {
    "full": ("aten.full.default", [[2**17, 2**18], 1.0], [2**17, 2**18]),
    "repeat": ("aten.repeat.default", ["x", [2**17, 2**14]], [4 * 2**17, 3 * 2**14]),
    "arange": ("aten.arange.default", [2**35], [2**35]),
    "eye": ("aten.eye.default", [2**17], [2**17, 2**17]),
    "pad": ("aten.constant_pad_nd.default", ["x", [2**33, 0]], [4, 3 + 2**33]),
    "outer": ("aten.kron.default", ["big", "big"], [2**18, 2**16]),
    "combinations": ("aten.combinations.default", ["line", 12], [455, 12]),
    "product": ("aten.mm.default", ["wide", "tall"], [2**16, 2**16]),
    "dimensions": ("aten.combinations.default", ["line", 2**15], [1]),
    "view": ("aten.view.default", ["x", [12, *[1] * 2**15]], [12]),
    "reshape": ("aten.reshape.default", ["x", [12, *[1] * 2**15]], [12]),
    "expand": ("aten.expand.default", ["x", [*[1] * 2**15, 4, 3]], [4, 3]),
    "tile": ("aten.tile.default", ["x", [1] * 2**15], [4, 3]),
}


@pytest.mark.parametrize("name", LARGE)
def test_calls_that_would_take_too_much(name, made, alone, tmp_path):
    """By an argument that no type shows, or by a type that torch would believe."""
    document, node = alone
    op, args, shape = LARGE[name]
    model, program, read = "b", "b/train/4", node["args"][0]
    given = {
        "x": read,
        "big": _expanded(document, node, program, "big", [2**9, 2**8]),
        "line": _expanded(document, node, program, "line", [15]),
        "wide": _expanded(document, node, program, "wide", [2**16, 2**20]),
        "tall": _expanded(document, node, program, "tall", [2**20, 2**16]),
    }
    args = [given.get(a, a) if isinstance(a, str) else a for a in args]
    _use(document, node, model, program, op, args, shape)
    bounds = Limits(tensor_bytes=2**36, inner_bytes=2**38, flops=2**50)
    ended = trained(document, made[1] / "stems", tmp_path, bounds)
    assert re.search(r"bytes|operations|dimensions", ended["b"]["error"]), ended["b"]["error"]
    assert f"%{program}/large" in ended["b"]["error"]
    assert ended["a"]["success"]


def _expanded(document, node, program, name, shape):
    """A tensor of any size that takes no memory: one element, expanded."""
    name = f"{program}/{name}"
    types = [{"dtype": "float32", "shape": [1] * len(shape)}]
    large = [{"dtype": "float32", "shape": shape, "stride": [0] * len(shape)}]
    place = document["nodes"].index(node)
    document["nodes"][place:place] = [
        {"name": f"{name}_one", "op": "aten.ones.default", "args": [[1] * len(shape)],
         "types": types, "owners": ["b"]},
        {"name": name, "op": "aten.expand.default", "args": [{"ref": [f"{name}_one", 0]}, shape],
         "types": large, "owners": ["b"]},
    ]  # fmt: skip
    return {"ref": [name, 0]}


def _use(document, node, model, program, op, args, shape):
    """Put a call's sum into the model's loss, and drop what nothing reads."""
    from support.calls_drawn import own_again

    output = next(
        o for o in document["outputs"]
        if (o["model"], o["program"], o["role"]) == (model, "train/4", "loss")
    )  # fmt: skip
    scalar = [{"dtype": "float32", "shape": []}]
    name = f"{program}/large"
    document["nodes"] += [
        {"name": name, "op": op, "args": args, "types": [{"dtype": "float32", "shape": shape}]},
        {"name": f"{name}_sum", "op": "aten.sum.default", "args": [{"ref": [name, 0]}],
         "types": scalar},
        {"name": f"{name}_add", "op": "aten.add.Tensor",
         "args": [output["ref"], {"ref": [f"{name}_sum", 0]}], "types": scalar},
    ]  # fmt: skip
    output["ref"] = {"ref": [f"{name}_add", 0]}
    own_again(document)
    document["nodes"] = [node for node in document["nodes"] if node["owners"]]


def test_convolutions_and_windows_without_bound(made, documents, tmp_path):
    """A padding that makes room for a dilation is right; a window of any size is none."""
    document = documents["images"]
    conv = node_of(document, "aten.conv2d.default", "a")
    for node in document["nodes"]:
        node.pop("group", None)
    conv["args"] = [*conv["args"][:3], [1, 1], [2**31 - 1] * 2, [2**31 - 1] * 2]
    pool = node_of(document, "aten.max_pool2d.default", "b")
    pool["args"][1] = [2**62, 2**62]
    ended = trained(document, made[1] / "images", tmp_path)
    assert ended["a"]["success"]
    assert ended["b"]["error"].startswith(f"%{pool['name']}: aten.max_pool2d.default: kernel_size")


def test_an_operator_that_gives_its_argument_itself(made, documents, tmp_path):
    """`lift_fresh` of a parameter takes its gradient away in plain torch; here it is an alias."""
    ended = {}
    for op in ("aten.alias.default", "aten.lift_fresh.default", "aten.lift.default"):
        document = copy.deepcopy(documents["points"])
        linear = node_of(document, "aten.linear.default", "a")
        linear.pop("group", None)
        source = linear["args"][1]
        kind = next(n for n in document["nodes"] if n["name"] == source["ref"][0])["types"]
        name = f"{linear['name']}_lifted"
        linear["args"][1] = {"ref": [name, 0]}
        lifted = {"name": name, "op": op, "args": [source], "types": kind,
                  "owners": linear["owners"]}  # fmt: skip
        document["nodes"].insert(document["nodes"].index(linear), lifted)
        folder = tmp_path / op
        ended[op] = trained(document, made[1] / "points", folder)["a"]
        assert ended[op]["success"], ended[op]["error"]
        ended[op] = weights.load(folder / ended[op]["weights"])
    first, *others = ended.values()
    for other in others:
        assert all(torch.equal(other[path], value) for path, value in first.items())


def test_what_kernels_would_cut_to_32_bits(made, documents, tmp_path):
    """torch 2.9 ends the process here: it divides by a dilation of which nothing is left."""
    document = documents["images"]
    conv = node_of(document, "aten.conv2d.default", "a")
    for node in document["nodes"]:
        node.pop("group", None)
    conv["args"] = [*conv["args"][:3], [1, 1], [2**40, 2**40], [2**40, 2**40]]
    pool = node_of(document, "aten.max_pool2d.default", "b")
    pool["args"][1] = [8, 8]
    ended = trained(document, made[1] / "images", tmp_path)
    assert "aten.conv2d.default: padding (1099511627776" in ended["a"]["error"]
    assert ended["b"]["error"].startswith(f"%{pool['name']}: aten.max_pool2d.default cannot be")


def test_a_failing_operator_is_its_models_own_failure(made, documents, tmp_path):
    """What only the values show: an index out of range, found while it runs."""
    document = documents["tokens"]
    for node in document["nodes"]:
        if node["op"] == "aten.embedding.default" and node["owners"] == ["a"]:
            source = node["args"][1]
            node["args"][1] = {"ref": [_shifted(document, node, source), 0]}
            break
    ended = trained(document, made[1] / "tokens", tmp_path)
    assert ended["a"]["error"].startswith("IndexError: ")
    assert ended["b"]["success"]


def _shifted(document, node, source):
    """The same indices, all too large."""
    kind = next(n for n in document["nodes"] if n["name"] == source["ref"][0])["types"]
    name = f"{node['name']}_shifted"
    place = document["nodes"].index(node)
    more = {"name": name, "op": "aten.add.Tensor", "args": [source, 1000], "types": kind,
            "owners": node["owners"]}  # fmt: skip
    document["nodes"].insert(place, more)
    return name


def test_company_keeps_its_bits(made, documents, tmp_path):
    """A model that is refused changes nothing of its neighbours."""
    good = trained(documents["points"], made[1] / "points", tmp_path / "good")
    bad = copy.deepcopy(documents["points"])
    for node in bad["nodes"]:
        if node["op"] == "aten.linear.default" and node["owners"] == ["b"]:
            node["args"].append("x")
            node.pop("group", None)
    for node in bad["nodes"]:
        node.pop("group", None)
    plain = copy.deepcopy(documents["points"])
    for node in plain["nodes"]:
        node.pop("group", None)
    with_it = trained(bad, made[1] / "points", tmp_path / "bad")
    without = trained(plain, made[1] / "points", tmp_path / "plain")
    assert "cannot be called so" in with_it["b"]["error"]
    assert good["b"]["success"]
    for id_ in ("a", "c"):
        assert with_it[id_]["sha256"] == without[id_]["sha256"]


def test_a_model_that_cannot_be_planned(made, documents, tmp_path):
    """Found while all are planned together: the others are, without it, and keep their bits."""
    document = documents["points"]
    for node in document["nodes"]:
        node.pop("group", None)
    alone = copy.deepcopy(document)
    relu = node_of(document, "aten.relu.default", "b")
    assert relu["owners"] == ["b"]
    relu["autocast"] = "bfloat16"  # its neighbours in the model have none
    relu["types"][0]["dtype"] = "float32"
    ended = trained(document, made[1] / "points", tmp_path / "with")
    without = trained(alone, made[1] / "points", tmp_path / "without")
    assert "relu (autocast bfloat16) reads %b/train/4/batch_norm (autoc" in ended["b"]["error"]
    for id_ in ("a", "c"):
        assert ended[id_]["sha256"] == without[id_]["sha256"]


# --- training ---------------------------------------------------------------------------------

KWARGS = [
    ("optimizer", "SGD", {"lr": "fast"}), ("optimizer", "SGD", {"lr": 10**400}),
    ("optimizer", "SGD", {"lr": 0.1, "dampening": "x"}),
    ("optimizer", "SGD", {"lr": 0.1, "momentum": [1]}), ("optimizer", "SGD", {"lr": 10**30}),
    ("optimizer", "Adam", {"betas": [0.9]}), ("optimizer", "Adam", {"betas": [0.9, 0.9, 0.9]}),
    ("optimizer", "Adam", {"differentiable": True}), ("optimizer", "SparseAdam", {}),
    ("optimizer", "Adam", {"eps": None}), ("optimizer", "Muon", {"ns_steps": 10**9}),
    ("scheduler", "StepLR", {"step_size": 0}), ("scheduler", "OneCycleLR", {"max_lr": 1.0}),
    ("scheduler", "OneCycleLR", {"max_lr": 1.0, "total_steps": 1}),
    ("scheduler", "PolynomialLR", {"power": 0.5, "total_iters": -3}),
    ("scheduler", "CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 0}),
    ("scheduler", "MultiStepLR", {"milestones": "x"}), ("scheduler", "LambdaLR", {"lr_lambda": 1}),
    ("scheduler", "SequentialLR", {"schedulers": [], "milestones": []}),
    ("scheduler", "CosineAnnealingWarmRestarts", {"T_0": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "name", "kwargs"), KWARGS)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_kwargs_of_optimizers_and_schedulers(
    field, name, kwargs, interval, made, documents, tmp_path
):
    """Refused, or the failure of that model alone; its neighbours train on."""
    document = documents["points"]
    training = document["models"][1]["training"]
    training |= {field: name, f"{field}_kwargs": kwargs, "epochs": 4}
    training["scheduler_interval"] = interval
    try:
        ended = trained(document, made[1] / "points", tmp_path)
    except CgoError:
        return
    assert ended["a"]["success"]
    assert ended["c"]["success"]
    if not ended["b"]["success"]:
        assert ended["b"]["error"]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("tuning", [{}, {"capture": True}])
def test_a_scheduler_that_ends_too_early(interval, tuning, made, documents, tmp_path):
    """OneCycleLR raises past its last step, which ends its model and no other."""
    document = documents["points"]
    document["experiment"]["tuning"] |= tuning
    for model in document["models"]:
        model["training"]["epochs"] = 4
    training = document["models"][1]["training"]
    training |= {"scheduler": "OneCycleLR", "scheduler_interval": interval}
    training["scheduler_kwargs"] = {"max_lr": 1.0, "total_steps": 2}
    ended = trained(document, made[1] / "points", tmp_path)
    assert "Tried to step 3 times" in ended["b"]["error"]
    assert ended["a"]["success"]
    assert ended["c"]["success"]


def test_a_document_of_other_data(made, documents, tmp_path):
    """Batches that the document has no programs for."""
    document = documents["points"]
    (digest,) = document["data"]
    document["data"][digest]["batch_size"] = 3
    ended = trained(document, made[1] / "points", tmp_path)
    for value in ended.values():
        assert "the document has no program train/2 for it" in value["error"]


# --- the list in SECURITY.md ------------------------------------------------------------------


def test_every_row_of_the_table_names_a_test():
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "tests/" in line]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(rows) >= 25
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", row), row
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_a_trial_says_why_and_ends(documents, tmp_path):
    """As a process: one line of ours on its log, and no document that hangs it."""
    document = put(documents["points"], "nodes.0.types.0.dtype", "load")
    (tmp_path / "graph.json").write_text(json.dumps(document))
    done = subprocess.run(
        [sys.executable, "-m", "cgo.trial", str(tmp_path / "graph.json")],
        env={**os.environ, "CGO_IMPORT_ROOTS": str(ROOT / "tests")},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "GraphDataError: refused: nodes.0.types.0.dtype: Input should be" in done.stderr
