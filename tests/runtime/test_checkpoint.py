"""Checkpoints: whole or not there, without what cannot be kept, and never a reason to fail."""

import time

import pytest
import torch
from support import escapes, small

import cgo
from cgo import trial, weights
from cgo.errors import TrialError
from cgo.planner import Planner
from cgo.runtime import checkpoint
from cgo.runtime.state import marks
from cgo.user_code import Terminated

pytestmark = pytest.mark.usefixtures("checkpoint_after_every_epoch")


def test_what_is_saved_is_loaded_and_parts_of_it_are_taken(tmp_path):
    records = {name: {"history": [{"loss": 1.0}], "ended": None} for name in "abc"}
    checkpoint.save(tmp_path, records)
    assert checkpoint.load(tmp_path) == records
    part, none = tmp_path / "part", tmp_path / "none"
    part.mkdir()
    none.mkdir()
    checkpoint.take(tmp_path, part, {"a", "z"})
    checkpoint.take(tmp_path, none, {"z"})
    assert checkpoint.load(part) == {"a": records["a"]}
    assert checkpoint.load(none) is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_no_part(
    tmp_path, monkeypatch
):
    checkpoint.save(tmp_path, {"a": 1})

    def full(values, stream):
        stream.write(b"as far as it goes")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(TrialError, match=r"cannot write checkpoint .*: no space left on device"):
        checkpoint.save(tmp_path, {"a": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_models_that_ended_late_are_marked_and_the_others_stay(tmp_path):
    running = {"history": [1], "ended": None}
    done = {"history": [1, 2], "ended": {"success": True}}
    checkpoint.save(tmp_path, {"a": running, "b": running, "c": done})
    checkpoint.end(tmp_path, ["b", "c", "d"])
    found = checkpoint.load(tmp_path)
    assert (found["a"], found["c"]) == (running, done)
    for id_ in "bd":
        assert found[id_]["history"] == []
        assert found[id_]["ended"] is not None


def test_a_record_that_could_not_be_read_again_is_found_out():
    checkpoint.check({"state": torch.ones(2), "lr": 0.1})
    for record in ({"state": escapes.Vanish("away")}, {"state": lambda: 3}):
        with pytest.raises(TrialError, match="its record cannot be written and read"):
            checkpoint.check(record)


def model(id_, kwargs=None, **training):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=3, **training)
    return cgo.Model("support.small:mlp", kwargs, data=data, training=spec, model_id=id_)


def run(data, folder, until=None):
    """Train; in the midst of epoch `until` of the model "plain" the trial is ended."""
    events = []

    def report(event):
        if event.model == "plain" and event.kind == "epoch" and event.epoch == until:
            raise Terminated(143)
        events.append(event)

    trial.execute(data, folder=folder, report=report)
    return events


def rows(events, id_):
    found = [
        (e.epoch, e.value["train_loss"]) for e in events if (e.model, e.kind) == (id_, "epoch")
    ]
    return [epoch for epoch, _ in found], [loss for _, loss in found]


@pytest.mark.parametrize("how", ["keeps", "raises", "refuses"])
def test_an_optimizer_that_cannot_be_kept_starts_anew_after_a_crash(how, tmp_path, caplog):
    """Its state is of a class of the user's, cannot be had, or cannot be loaded again."""
    given = [model("plain"), model("odd", {"hidden": 5}, optimizer="support.keepers:Optimizer",
                                   optimizer_kwargs={"lr": 0.1, "how": how})]  # fmt: skip
    settings = {"tuning": {"measure": False}}
    planner = Planner(batch_operators=None)
    whole = planner.plan(given, tmp_path / "whole", settings).graph_data
    expected = run(whole, tmp_path / "whole")
    killed = planner.plan(given, tmp_path / "killed", settings).graph_data
    with pytest.raises(Terminated):
        run(killed, tmp_path / "killed", until=1)
    events = run(killed, tmp_path / "killed")
    assert all(e.value["success"] for e in events if e.kind == "ended")
    assert rows(events, "plain")[0] == [1, 2]
    assert rows(events, "odd") == rows(expected, "odd")  # from the beginning
    kept = "starts anew" if how == "refuses" else "is in no checkpoint"
    assert f"model 'odd' {kept}" in caplog.text


def stemmed(id_, **training):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=4, **training)
    return cgo.Model("support.small:frozen_stem", data=data, training=spec, seed=3, model_id=id_)


def test_a_checkpoint_is_written_as_often_as_its_time_allows(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint, "_MOST", 0.05)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = checkpoint.Pace()
    written = []
    for epoch in range(100):
        now[0] += 1.0
        if epoch == 62:  # others have joined
            pace.renew()
        if pace.due():
            written.append(epoch)
            now[0] += 0.5
            pace.wrote(0.5)
    assert written == [0, 10, 20, 30, 40, 50, 60, 62, 72, 82, 92]


@pytest.mark.parametrize("tuning", [{}, {"capture": True}])
def test_what_never_changes_is_in_no_checkpoint_and_training_goes_on_with_it(tuning, tmp_path):
    adam = {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.1}}
    given = [stemmed("plain", **adam), stemmed("other", optimizer_kwargs={"lr": 0.3})]
    settings = {"tuning": {"measure": False, **tuning}}
    whole = Planner().plan(given, tmp_path / "whole", settings).graph_data
    expected = run(whole, tmp_path / "whole")
    killed = Planner().plan(given, tmp_path / "killed", settings).graph_data
    with pytest.raises(Terminated):
        run(killed, tmp_path / "killed", until=2)
    for record in checkpoint.load(tmp_path / "killed").values():
        state = record["state"]
        frozen = {"stem.0.weight", "stem.0.bias", "scale"}
        assert set(state["unchanged"]) == frozen
        # The norm of the frozen stem goes on counting.
        assert {"head.weight", "stem.1.running_mean"} <= set(state["tensors"])
        assert frozen.isdisjoint(state["tensors"])
    events = run(killed, tmp_path / "killed")
    for id_ in ("plain", "other"):
        assert rows(events, id_)[1] == rows(expected, id_)[1][2:]
        name = f"weights/{id_}.safetensors"
        ours, theirs = (weights.load(tmp_path / part / name) for part in ("killed", "whole"))
        assert ours.keys() == theirs.keys() == small.frozen_stem().state_dict().keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_frozen_part_that_is_built_otherwise_starts_anew(tmp_path, monkeypatch, caplog):
    data = Planner().plan([stemmed("plain")], tmp_path).graph_data
    with pytest.raises(Terminated):
        run(data, tmp_path, until=2)
    plain = small.frozen_stem

    def other():
        net = plain()
        torch.nn.init.zeros_(net.stem[0].bias)
        return net

    monkeypatch.setattr(small, "frozen_stem", other)
    assert rows(run(data, tmp_path), "plain")[0] == [0, 1, 2, 3]
    assert "stem.0.bias has other values here than when the training began" in caplog.text


@pytest.mark.parametrize("part", ["optimizer", "scheduler"])
def test_what_a_part_of_the_users_may_change_is_kept(part, tmp_path):
    given = {"optimizer": {"optimizer": "support.small:Shrinking", "optimizer_kwargs": {"lr": 0.1}},
             "scheduler": {"scheduler": "support.losses:Decaying"}}[part]  # fmt: skip
    data = Planner().plan([stemmed("plain", **given)], tmp_path).graph_data
    with pytest.raises(Terminated):
        run(data, tmp_path, until=2)
    state = checkpoint.load(tmp_path)["plain"]["state"]
    assert state["unchanged"] == {}
    assert set(state["tensors"]) >= {"stem.0.weight", "scale", "head.weight"}


def test_marks_tell_bits_apart():
    tensors = {"a": torch.rand(7, 3), "b": torch.rand(5).double(), "c": torch.ones(3, dtype=bool),
               "d": torch.tensor(2.0), "e": torch.zeros(0), "f": torch.rand(4, 3)[1]}  # fmt: skip
    found = marks(tensors)
    assert found == marks({path: tensor.clone() for path, tensor in tensors.items()})
    for path in "abcdf":
        changed = tensors[path].clone()
        changed.view(-1)[-1] = 0
        assert marks({path: changed})[path] != found[path]


def test_a_trial_whose_checkpoints_cannot_be_written_trains_on_and_says_so(tmp_path, monkeypatch):
    def full(folder, members):
        raise TrialError("cannot write checkpoint: no space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    data = Planner().plan([model("plain")], tmp_path, {"tuning": {"measure": False}}).graph_data
    events = run(data, tmp_path)
    assert rows(events, "plain")[0] == [0, 1, 2]
    told = [e.value for e in events if e.kind == "trial" and e.value["what"] == "checkpoint"]
    reason = "cannot write checkpoint: no space left on device; training goes on without it"
    assert told == [{"what": "checkpoint", "reason": reason}]  # once


def test_weights_that_cannot_be_written_fail_their_model_alone(tmp_path):
    (tmp_path / "weights" / "odd.safetensors").mkdir(parents=True)  # no file can be put there
    given = [model("plain"), model("odd", {"hidden": 5})]
    events = run(Planner().plan(given, tmp_path).graph_data, tmp_path)
    ended = {e.model: e.value for e in events if e.kind == "ended"}
    assert ended["plain"]["success"]
    assert ended["odd"]["error"].startswith("its weights cannot be written: ")
    assert [path.name for path in (tmp_path / "weights").iterdir() if path.is_file()] == [
        "plain.safetensors"
    ]
