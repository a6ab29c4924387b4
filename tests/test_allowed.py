"""What a process may import for a document."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cgo
from cgo.allowed import ALLOWED_MODULES, OWN, allowed_modules, checked_modules, is_allowed
from cgo.errors import GraphDataError, ImportPathError, SpecError
from cgo.graph_data import GraphData
from cgo.imports import resolve
from cgo.model import TrainingSpec
from cgo.nni.texts import check_text
from cgo.planner import Planner
from cgo.reading import read_document

TESTS = Path(__file__).parent
POINTS = cgo.DataSpec("support.small:points", batch_size=16)


@pytest.fixture
def allow(monkeypatch):
    """Limits this process as a trial is limited."""
    return lambda *modules: monkeypatch.setenv(ALLOWED_MODULES, ",".join(modules))


def test_without_the_variable_nothing_is_limited(monkeypatch):
    monkeypatch.delenv(ALLOWED_MODULES, raising=False)
    assert allowed_modules() is None
    assert is_allowed("os", allowed_modules())
    assert resolve("os:getcwd") is os.getcwd


@pytest.mark.parametrize(("text", "modules"), [("", ()), ("a", ("a",)), ("a.b, c ,", ("a.b", "c"))])
def test_the_variable_names_modules(text, modules):
    assert allowed_modules({ALLOWED_MODULES: text}) == modules


@pytest.mark.parametrize("modules", ["support", ["a b"], [""], ["a."], ["a;b"], [1], ["é"]])
def test_other_settings_are_refused(modules):
    with pytest.raises(SpecError, match=r"^allowed_modules: "):
        checked_modules(modules)
    with pytest.raises(SpecError, match=r"^allowed_modules: "):
        cgo.CGOEngine("/nowhere/at/all", allowed_modules=modules)


def test_packages_hold_their_modules_and_no_namesakes():
    allowed = ("support", "my.nets")
    for module in ("support", "support.small", "my.nets", "my.nets.deep", *OWN):
        assert is_allowed(module, allowed)
    for module in ("supporting", "my", "my.data", "os", "cgo", "cgo.cli", "torch", "torch.hub"):
        assert not is_allowed(module, allowed)


@pytest.mark.parametrize(
    "path",
    ["support.small:mlp", "support.reexports:mlp", "support.small:Stemmed.forward",
     "cgo.zoo:mlp", "torch.nn:Linear", "torch.nn.functional:mse_loss", "torch.nn.functional:gelu",
     "support.reexports:Linear", "torch.optim:SGD"],
)  # fmt: skip
def test_allowed_names(path, allow):
    allow("support")
    assert callable(resolve(path))


@pytest.mark.parametrize(
    "path",
    ["os:system", "torch:load", "torch.hub:load", "cgo.platforms.guard:kill_tree",
     "cgo.imports:resolve", "support.reexports:os.system", "support.reexports:run",
     "support.reexports:loads", "support.reexports:os", "torch.nn.functional:torch.load",
     "torch.nn.functional:importlib.import_module", "support.small:mlp.__class__",
     "torch.nn.modules.module:register_module_forward_hook", "torch.nn:Module.register_buffer",
     "torch.nn:modules.module.register_module_forward_hook", "torch.nn:init.zeros_"],
)  # fmt: skip
def test_names_that_lead_elsewhere(path, allow):
    allow("support")
    with pytest.raises(ImportPathError, match=r"^loss: .* may not import for a document"):
        resolve(path, field="loss")


def test_what_is_refused_is_not_imported(allow, monkeypatch):
    monkeypatch.delitem(sys.modules, "support.raises_on_import", raising=False)
    allow("json")
    with pytest.raises(ImportPathError, match="may not import"):
        resolve("support.raises_on_import:x")


# --- documents --------------------------------------------------------------------------------


def model(id_="m", **changes):
    training = TrainingSpec(metrics=("accuracy",), optimizer_kwargs={"lr": 0.1})
    given = {"data": POINTS, "training": training, "model_id": id_} | changes
    return cgo.Model("support.small:mlp", {"hidden": 4}, **given)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    return json.loads(Planner().plan([model()], folder).graph_data.to_json())


def changed(document, field, path):
    found = copy.deepcopy(document)
    entry, spec = found["models"][0], found["data"][POINTS.digest]
    match field:
        case "factory":
            entry["factory"]["target"] = path
        case "source" | "augment":
            spec[field] = path
        case "metrics":
            entry["training"]["metrics"] = ["accuracy", path]
        case _:
            entry["training"][field] = path
    return found


FIELDS = ["factory", "loss", "optimizer", "scheduler", "metrics", "source", "augment"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_document_that_names_another_module(field, document, allow, monkeypatch):
    monkeypatch.delitem(sys.modules, "support.raises_on_import", raising=False)
    allow("support.small")
    found = changed(document, field, "support.raises_on_import:x")
    with pytest.raises(GraphDataError) as caught:
        GraphData.load(found)
    text = str(caught.value)
    assert text.startswith("model 'm'")
    assert f"{field}: 'support.raises_on_import:x' is of module" in text
    assert "allowed: support.small" in text
    assert "support.raises_on_import" not in sys.modules


def test_a_document_of_allowed_modules_is_read(document, allow):
    allow("support.small")
    assert GraphData.load(document).models[0].id == "m"


def test_the_setting_stands_in_no_document(document, tmp_path):
    with cgo.CGOEngine(tmp_path / "x", allowed_modules=("support.small",)) as engine:
        one = model("one")
        engine.submit_models(one)
        engine.wait_models(timeout_s=120)
        assert one.status is cgo.ModelStatus.TRAINED, one.error
        with pytest.raises(SpecError, match=r"model 'two': loss: 'support.losses:weighted' is of"):
            engine.submit_models(
                model("two", training=TrainingSpec(loss="support.losses:weighted"))
            )
    (written,) = tmp_path.glob("x/trials/*/graph.json")
    assert "allowed" not in written.read_text()


@pytest.mark.parametrize("how", ["environment", "command", "neither"])
def test_a_trial_reads_it_from_its_command_or_environment(how, document, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(document))
    env = {**os.environ, "CGO_IMPORT_ROOTS": str(TESTS), "OMP_NUM_THREADS": "1"}
    env |= {ALLOWED_MODULES: "json"} if how == "environment" else {}
    command = [sys.executable, "-m", "cgo.trial", str(tmp_path / "graph.json")]
    command += ["--allowed-modules", "json,math"] if how == "command" else []
    done = subprocess.run(
        command, env=env, cwd=TESTS.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (ended,) = [e for e in map(json.loads, done.stdout.splitlines()) if e["kind"] == "ended"]
    assert ended["value"]["success"] is (how == "neither")
    said = "source: 'support.small:points' is of module 'support.small'"
    assert how == "neither" or said in ended["value"]["error"]


def test_what_one_model_may_not_import_costs_no_other(document, tmp_path, allow):
    good = document["models"][0]
    bad = {**good, "id": "bad", "factory": {"target": "support.raises_on_import:x", "kwargs": {}}}
    allow("support.small")
    text = json.dumps({**document, "models": [bad, good]})
    data, refused = read_document(text, tmp_path)
    assert [entry.id for entry in data.models] == ["m"]
    assert "factory: 'support.raises_on_import:x' is of module" in refused["bad"]
    assert "support.raises_on_import" not in sys.modules


# --- NNI's texts ------------------------------------------------------------------------------

TRACED = json.dumps(
    {"__symbol__": "path:support.small.points", "__kwargs__": {"samples": {"__symbol__": "X"}}}
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRACED.replace("X", "path:os.system"), "'os.system' is of module 'os'"),
        (TRACED.replace("X", "path:support.reexports.run"), "'subprocess'"),
        (TRACED.replace("X", "os.system"), "'os.system' is of module 'os'"),
        (TRACED.replace("X", "bytes:gASV"), "a pickled class or function"),
        ('{"__nni_type__": "path:posix.system"}', "'posix'"),
        ('{"__instance_type__": "path:nni.nas.space.x"}', "'nni.nas.space'"),
        ('{"a": [{"__nni_obj__": "gASV"}]}', "'__nni_obj__' in an NNI text holds code"),
        ('{"framework": "pytorch"}', "'framework' in an NNI text holds code"),
        ('{"__symbol__": "path:os.x", "__symbol__": "path:support.small.points"}', "'os'"),
        ("{", "not a text of nni.dump's"),
        ("[" * 100_000, "not a text of nni.dump's"),
        (None, "expected a text"),
    ],
)
def test_names_in_an_nni_text(text, message, allow):
    allow("support")
    with pytest.raises(ImportPathError, match=message):
        check_text(text, "source")


def test_an_nni_text_of_allowed_modules(allow, monkeypatch):
    allow("support")
    check_text(TRACED.replace("X", "path:support.small.mlp"), "source")
    monkeypatch.delenv(ALLOWED_MODULES)
    check_text("no text of nni.dump's", "source")


@pytest.mark.parametrize("path", ["cgo.nni.data:traced", "cgo.nni.spaces:build"])
def test_what_builds_from_nni_texts_looks_first(path, allow):
    allow()
    text = TRACED.replace("X", "path:os.system")
    kwargs = {"space": text} if path.endswith("build") else {"train": text, "validation": text}
    with pytest.raises(ImportPathError, match=r"'os.system' is of module 'os'"):
        resolve(path)(**kwargs)
