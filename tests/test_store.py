"""The experiment directory."""

import sqlite3
import subprocess
import sys

import pytest
import torch

import cgo
from cgo import ModelStatus, weights
from cgo.errors import StoreError
from cgo.events import Event
from cgo.graph_data import file_sha256
from cgo.store import JOURNAL, Store

DATA = cgo.DataSpec("support.small:points", batch_size=16)


def model(id_, **kwargs):
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=2)
    return cgo.Model("support.small:mlp", kwargs, data=DATA, training=training, model_id=id_)


def epoch(id_, number, value=0.5):
    return Event(id_, "epoch", number, {"val_accuracy": value, "val_loss": 1.0})


def trained(store, id_, trial="t0000"):
    """Write what a trial tells of a model that it trains."""
    path = store.trial_folder(trial) / "weights" / f"{id_}.safetensors"
    weights.save(path, {"w": torch.arange(3.0)})
    store.record(trial, Event(id_, "started", None, None))
    store.record(trial, epoch(id_, 0))
    store.record(trial, Event(id_, "final", None, 0.5))
    ended = {"success": True, "error": None, "weights": f"weights/{id_}.safetensors"}
    store.record(trial, Event(id_, "ended", None, ended | {"sha256": file_sha256(path)}))
    return path


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "experiment")
    yield opened
    opened.close()


def test_an_experiment_is_read_while_it_is_written(store):
    store.add_models([model("a"), model("b", hidden=3), model("c")])
    trained(store, "a")
    store.record("t0000", Event("b", "started", None, None))
    store.record("t0000", epoch("b", 0, 0.25))
    a, b, c = cgo.open_experiment(store.folder).models()
    assert (a.status, a.metric, b.status, c.status) == (
        ModelStatus.TRAINED, 0.5, ModelStatus.TRAINING, ModelStatus.SUBMITTED,
    )  # fmt: skip
    assert b.intermediate_metrics == [0.25]
    assert (b.module, b.kwargs, b.data, b.training) == (
        "support.small:mlp", {"hidden": 3}, DATA, a.training,
    )  # fmt: skip


def test_weights_load_from_the_experiment(store):
    store.add_models([model("a"), model("b")])
    trained(store, "a")
    experiment = cgo.open_experiment(store.folder)
    assert experiment.state_dict("a")["w"].tolist() == [0, 1, 2]
    with pytest.raises(StoreError, match="'b' is submitted: no weights"):
        experiment.state_dict("b")
    with pytest.raises(StoreError, match="no model 'z'"):
        experiment.state_dict("z")


def test_a_result_is_found_by_content_while_its_weights_are_whole(store):
    store.add_models([model("a")])
    store.set_content("a", "abc")
    path = trained(store, "a")
    assert [event.kind for _, event in store.find_result("abc")] == [
        "started", "epoch", "final", "ended",
    ]  # fmt: skip
    assert store.find_result("other") is None
    path.write_bytes(b"changed")
    assert store.find_result("abc") is None
    path.unlink()
    assert store.find_result("abc") is None


def test_failed_models_leave_no_result(store):
    store.add_models([model("a")])
    store.set_content("a", "abc")
    ended = {"success": False, "error": "broke", "weights": None, "sha256": None}
    store.record("t0000", Event("a", "ended", None, ended))
    assert store.find_result("abc") is None
    assert cgo.open_experiment(store.folder).models()[0].error == "broke"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_what_was_written_outlives_a_process_that_is_killed(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cgo.events import Event\n"
        "from cgo.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for epoch in range(500):\n"
        "    store.record('t0000', Event('a', 'epoch', epoch, {'val_loss': 1.0}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    first = Store(tmp_path)
    first.add_models([model("a")])
    first.close()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode < 0
    second = Store(tmp_path)
    assert [event.epoch for _, event in second.events("a")] == list(range(500))
    second.close()


def test_an_event_told_again_by_the_same_trial_is_written_once(store):
    store.add_models([model("a")])
    store.record("t0000", epoch("a", 0))
    store.record("t0000", epoch("a", 0))
    assert len(cgo.open_experiment(store.folder).events("a")) == 1


def test_submitting_an_untrained_model_again_begins_anew(store):
    store.add_models([model("a"), model("b")])
    cancelled = {"success": False, "error": "cancelled", "cancelled": True}
    store.record("-", Event("a", "ended", None, cancelled))
    trained(store, "b")
    store.add_models([model("a"), model("b")])
    a, b = cgo.open_experiment(store.folder).models()
    assert a.status is ModelStatus.SUBMITTED
    assert b.status is ModelStatus.TRAINED
    trained(store, "a", "t0001")
    assert cgo.open_experiment(store.folder).models()[0].status is ModelStatus.TRAINED


def test_trial_ids_are_new(store):
    assert store.next_trial_id() == "t0000"
    store.add_trial("t0000", ["a"], {"models": 1})
    assert store.next_trial_id() == "t0001"
    (record,) = cgo.open_experiment(store.folder).trials()
    assert (record.trial_id, record.models, record.report) == ("t0000", ("a",), {"models": 1})


def test_one_engine_at_a_time(store):
    with pytest.raises(StoreError, match="in use by another engine"):
        Store(store.folder)
    code = (
        f"from cgo.store import Store; from pathlib import Path; Store(Path({str(store.folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another engine" in done.stderr


def test_a_closed_experiment_opens_again(tmp_path):
    first = Store(tmp_path)
    first.add_models([model("a")])
    first.close()
    second = Store(tmp_path)
    assert list(second.specs()) == ["a"]
    second.close()


def test_what_is_no_experiment_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no experiment directory"):
        cgo.open_experiment(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"this is not a database, it only looks like one" * 50)
    with pytest.raises(StoreError, match="damaged"):
        cgo.open_experiment(tmp_path)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path)


def test_another_version_is_refused(tmp_path):
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / JOURNAL) as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    with pytest.raises(StoreError, match="journal version 99, expected 1"):
        cgo.open_experiment(tmp_path)


def test_models_that_join_a_trial_stand_in_its_row(store):
    store.add_trial("t0000", ["a"], {"models": 1})
    store.join_trial("t0000", ["b", "c"], {"models": 2})
    store.join_trial("t0000", ["d"], {"models": 1})
    (record,) = cgo.open_experiment(store.folder).trials()
    assert record.models == ("a", "b", "c", "d")
    assert record.report == {"models": 1, "joined": [{"models": 2}, {"models": 1}]}
