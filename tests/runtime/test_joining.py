"""Models that join a running trial, or leave it: everyone's numbers are those of training alone."""

import json
import math

import pytest
import torch
from support import joins
from support.joins import Joined, add_of
from support.merged import Case, Merged, assert_equal_float64
from support.small import Stemmed

import cgo
from cgo import trial
from cgo.commands import Command, Commands
from cgo.runtime.stems import StemStore

unlimited = joins.unlimited
F64 = {"precision": "float64", "optimizer_kwargs": {"lr": 0.1, "momentum": 0.9}}


def case(id_, factory="mlp", kwargs=None, epochs=4, seed=0, data_seed=0, **training):
    training = {**F64, "epochs": epochs, **training}
    return Case(id_, factory, kwargs or {}, seed=seed, data_seed=data_seed, training=training)


def first():
    return [
        case("a", kwargs={"dropout": 0.2}, scheduler="StepLR", scheduler_kwargs={"step_size": 1}),
        case("b", "cnn", {"dropout": 0.2}, seed=1, optimizer="Adam", optimizer_kwargs={}),
        case("c", "trap", {"kind": "control_flow"}),
        case("d", "frozen_norm", seed=2),
    ]


def later():
    return [
        case("j", kwargs={"dropout": 0.2}, seed=3),
        case("k", "cnn", {"width": 3}, seed=4, optimizer="Adam", optimizer_kwargs={}),
        case("l", "frozen_norm", seed=2, grad_clip_norm=0.5),
        case("m", "trap", {"kind": "control_flow"}, seed=1, epochs=2),
        case("n", seed=5, data_seed=7),
    ]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_everyone_is_trained_as_alone(epoch, tmp_path, unlimited):
    run = Joined(first(), {("a", epoch): later()}, tmp_path)
    (added,) = run.told("added")
    assert sorted(added["models"]) == ["j", "k", "l", "m", "n"]
    for one in [*first(), *later()]:
        assert_equal_float64(run, one)
    assert set(run.metrics) == set("abcdjklmn")
    assert run.told("refused") == []


def test_those_that_are_behind_catch_up_and_all_go_on_together(tmp_path, unlimited):
    one, two = case("a"), case("j", kwargs={"width": 8}, seed=1)
    run = Joined([one], {("a", 1): [two]}, tmp_path)
    order = [("a", 0), ("a", 1), ("j", 0), ("j", 1), ("a", 2), ("j", 2), ("a", 3), ("j", 3)]
    assert run.order() == order
    alone, both = run.told("joined")
    assert (alone["models"], both["models"]) == (["j"], ["a", "j"])
    for event in (alone, both):
        assert event["seconds"] > 0
        assert event["epoch_s"] > 0
    assert_equal_float64(run, one)
    assert_equal_float64(run, two)


def test_who_joins_twice_meets_as_well(tmp_path, unlimited):
    given = [case("a", epochs=6), case("j", seed=1, epochs=5), case("k", seed=2, epochs=5)]
    run = Joined(given[:1], {("a", 1): given[1:2], ("j", 0): given[2:]}, tmp_path)
    assert run.told("joined")[-1]["models"] == ["a", "j", "k"]
    for one in given:
        assert_equal_float64(run, one)


def test_those_that_stay_keep_every_bit_where_nothing_is_fused(tmp_path, unlimited):
    given = {"precision": "float32"}
    cases = [case("a", kwargs={"dropout": 0.2}, **given), case("b", "cnn", seed=1, **given),
             case("d", "frozen_norm", **given)]  # fmt: skip
    more = [case("j", kwargs={"dropout": 0.2}, seed=3, **given), case("l", "frozen_norm", **given)]
    (tmp_path / "alone").mkdir()
    (tmp_path / "more").mkdir()
    whole = Merged(cases, tmp_path / "alone", batch_operators=None)
    others = Merged(more, tmp_path / "more", batch_operators=None)
    run = Joined(cases, {("a", 1): more}, tmp_path, batch_operators=None)
    assert len(run.told("joined")) == 2
    for one, expected in [(c, whole) for c in cases] + [(c, others) for c in more]:
        assert run.losses[one.id] == expected.losses[one.id]
        left, right = run.state(one.id), expected.state(one.id)
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_stored_stem_is_computed_once_for_all(tmp_path, monkeypatch, unlimited):
    tuning = cgo.Tuning(measure=False, tape=True, store_stems=True)
    plain, computed = StemStore._compute, []

    def counted(store, leaves, size):
        computed.append(size)
        return plain(store, leaves, size)

    monkeypatch.setattr(StemStore, "_compute", counted)
    cases = [case("a", "headed"), case("j", "headed", seed=1)]
    (tmp_path / "one").mkdir()
    one = Merged(cases[:1], tmp_path / "one", tuning=tuning)
    alone = len(computed)
    computed.clear()
    run = Joined(cases[:1], {("a", 1): cases[1:]}, tmp_path, tuning=tuning)
    assert len(computed) == alone
    assert one.losses["a"] == pytest.approx(run.losses["a"], rel=1e-9)
    for each in cases:
        assert_equal_float64(run, each)


# --- when ---------------------------------------------------------------------------------------


def test_joining_waits_where_it_would_take_too_much_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("cgo.runtime.allowance.SHARE", 0.0)
    cases = [case("a"), case("j", seed=1)]
    run = Joined(cases[:1], {("a", 0): cases[1:]}, tmp_path)
    assert run.order() == [("a", n) for n in range(4)] + [("j", n) for n in range(4)]
    for each in cases:
        assert_equal_float64(run, each)


def test_nobody_waits_for_longer_than_it_had_to_train(tmp_path, unlimited):
    """Models that come again and again do not keep one that is nearly done from its end."""
    names = [f"j{n}" for n in range(6)]
    chain = ["a", *names]
    orders = {
        (who, 0 if n else 2): [case(names[n], seed=n + 1)] for n, who in enumerate(chain[:-1])
    }
    run = Joined([case("a")], orders, tmp_path)
    order = run.order()
    assert order.index(("a", 3)) < order.index(("j4", 0))
    for each in [case("a"), *(case(name, seed=n + 1) for n, name in enumerate(names))]:
        assert_equal_float64(run, each)


# --- leaving ------------------------------------------------------------------------------------


def test_a_model_stops_at_a_step_and_keeps_its_history(tmp_path):
    cases = [case("a"), case("b", "cnn", seed=1), case("c", "trap", {"kind": "control_flow"})]

    def stop(run, model, step):
        if (model, step) in (("b", 6), ("c", 7)):
            run.commands.put(Command("stop", models=(model,)))

    run = Joined(cases, {}, tmp_path, step=stop)
    steps = len(run.losses["a"]) // 4
    assert steps < 7 < 2 * steps
    for id_, taken in (("b", 7), ("c", 8)):
        assert len(run.losses[id_]) == taken
        ended = run.ended(id_)
        assert (ended["success"], ended["cancelled"]) == (False, True)
        assert ended["error"] == "cancelled while it was trained"
        assert len(run.history(id_)) == 1
        assert run.losses[id_] == pytest.approx(
            next(c for c in cases if c.id == id_).alone().losses[:taken], rel=1e-9
        )
    assert_equal_float64(run, cases[0])
    assert set(run.metrics) == {"a"}


def test_a_model_that_stops_leaves_the_others_every_bit(tmp_path):
    cases = [case(id_, precision="float32", seed=n) for n, id_ in enumerate("abc")]
    (tmp_path / "whole").mkdir()
    whole = Merged(cases[:2], tmp_path / "whole", batch_operators=None)
    orders = {("a", 1): [Command("stop", models=("c",))]}
    run = Joined(cases, orders, tmp_path, batch_operators=None)
    assert len(run.history("c")) == 2
    for each in cases[:2]:
        assert run.losses[each.id] == whole.losses[each.id]


def test_a_trial_whose_models_are_all_stopped_ends(tmp_path):
    cases = [case("a"), case("b", seed=1), case("c", seed=2, data_seed=1)]
    orders = {("a", 1): [Command("stop", models=("a", "b", "c", "unknown"))]}
    run = Joined(cases, orders, tmp_path)
    assert run.metrics == {}
    assert [run.ended(id_)["cancelled"] for id_ in "abc"] == [True] * 3
    assert run.told("finished")


def test_one_that_joins_may_be_stopped_before_it_began(tmp_path, unlimited):
    cases = [case("a"), case("j", seed=1), case("k", seed=2)]
    orders = {("a", 0): [Command("stop", models=("j",)), add_of(cases[1:], tmp_path / "added")]}
    run = Joined(cases[:1], orders, tmp_path)
    assert run.history("j") == []
    assert run.ended("j")["cancelled"]
    assert_equal_float64(run, cases[0])
    assert_equal_float64(run, cases[2])


def test_a_trial_that_drains_takes_no_more(tmp_path, unlimited):
    cases = [case("a"), case("j", seed=1)]
    orders = {("a", 0): [Command("drain"), add_of(cases[1:], tmp_path / "added")]}
    run = Joined(cases[:1], orders, tmp_path)
    (refused,) = run.told("refused")
    assert "takes no more" in refused["reason"]
    assert set(run.metrics) == {"a"}


# --- what goes wrong ----------------------------------------------------------------------------


class Killed(Exception):
    """The trial's process is gone."""


@pytest.mark.parametrize("at", [("a", 1), ("j", 0), ("j", 1), ("a", 2), ("k", 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_trial_that_was_joined_goes_on_from_its_checkpoint(at, fused, tmp_path, unlimited):
    cases = [case("a", kwargs={"dropout": 0.2}), case("b", "frozen_norm", epochs=1)]
    more = [case("j", kwargs={"dropout": 0.2}, seed=1), case("k", "frozen_norm", seed=3)]
    folder = tmp_path / "trial"

    class Dying(Joined):
        def heard(self, event):
            super().heard(event)
            if (event.model, event.epoch) == at and not getattr(self, "died", False):
                self.died = True
                raise Killed

        def run(self, data, **given):
            with pytest.raises(Killed):
                super().run(data, **given)
            self.commands = Commands()
            again = cgo.GraphData.read(folder / "graph.json")
            return super().run(again, **given)

    options = cgo.BatchOperators() if fused else None
    run = Dying(cases, {("a", 0): more}, tmp_path, batch_operators=options)
    ids = {entry.id for entry in cgo.GraphData.read(folder / "graph.json").models}
    assert ids == {"a", "j", "k"}  # the other has ended
    for one in [cases[0], *more]:
        ended = [e.value for e in run.events if e.model == one.id and e.kind == "ended"]
        assert [value["success"] for value in ended] == [True]
        expected, rows = one.alone(), {e.epoch: e.value for e in run.events
                                       if e.model == one.id and e.kind == "epoch"}  # fmt: skip
        for epoch, row in enumerate(expected.history):
            assert rows[epoch]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-9)
            assert rows[epoch]["val_loss"] == pytest.approx(row["val_loss"], rel=1e-9)


def _no_file(command, folder):
    (folder / "graph.json").unlink()


def _noise(command, folder):
    (folder / "graph.json").write_bytes(b"\0not a document")


def _cut(command, folder):
    text = (folder / "graph.json").read_text()
    (folder / "graph.json").write_text(text[: len(text) // 2])


def _taken(command, folder):
    text = (folder / "graph.json").read_text()
    (folder / "graph.json").write_text(text.replace('"j', '"a'))


def _settings(command, folder):
    document = json.loads((folder / "graph.json").read_text())
    document["version"] = "other"
    (folder / "graph.json").write_text(json.dumps(document))


@pytest.mark.parametrize("broken", [_no_file, _noise, _cut, _taken, _settings])
def test_a_document_that_cannot_be_added_hurts_nobody(broken, tmp_path, unlimited):
    given = {"precision": "float32"}
    cases = [case("a", **given), case("b", seed=1, **given)]
    command = add_of([case("j", seed=2)], tmp_path / "added")
    broken(command, tmp_path / "added")
    (tmp_path / "whole").mkdir()
    whole = Merged(cases, tmp_path / "whole")
    before = (tmp_path / "whole" / "graph.json").read_text()
    run = Joined(cases, {("a", 0): [command]}, tmp_path)
    (refused,) = run.told("refused")
    assert refused["document"] == command.document
    assert refused["reason"]
    assert run.losses == whole.losses
    assert (tmp_path / "trial" / "graph.json").read_text() == before


def test_a_disk_that_is_full_refuses_those_that_join(tmp_path, unlimited, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    given = add_of([case("j", seed=1)], tmp_path / "added")
    monkeypatch.setattr("cgo.paths.os.fsync", full)
    run = Joined([case("a")], {("a", 0): [given]}, tmp_path)
    (refused,) = run.told("refused")
    assert "No space left" in refused["reason"]
    assert set(run.metrics) == {"a"}


def test_models_that_do_not_fit_into_memory_are_refused(tmp_path, unlimited, monkeypatch):
    monkeypatch.setattr("cgo.runtime.joining.FILLED", 1e-12)
    run = Joined([case("a")], {("a", 0): [case("j", seed=1)]}, tmp_path)
    (refused,) = run.told("refused")
    assert "bytes" in refused["reason"]


def test_one_that_cannot_be_built_fails_alone(tmp_path, unlimited):
    cases = [case("a"), case("j", seed=1)]
    command = add_of([cases[1], case("bad", seed=2), case("worse", "cnn")], tmp_path / "added")
    path = tmp_path / "added" / "graph.json"
    document = json.loads(path.read_text())
    for entry in document["models"]:
        if entry["id"] == "bad":
            entry["factory"]["target"] = "support.nets:no_such_factory"
        if entry["id"] == "worse":
            entry["factory"]["kwargs"] = {"width": 9}
    path.write_text(json.dumps(document))
    run = Joined(cases[:1], {("a", 0): [command]}, tmp_path)
    assert sorted(run.told("added")[0]["models"]) == ["bad", "j", "worse"]
    assert "no_such_factory" in run.ended("bad")["error"]
    assert "must build the same module" in run.ended("worse")["error"]
    for each in cases:
        assert_equal_float64(run, each)


def test_companies_that_cannot_be_merged_train_on_apart(tmp_path, unlimited, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("a pass's bug")

    monkeypatch.setattr("cgo.union.regrouped", broken)
    cases = [case("a"), case("j", seed=1)]
    run = Joined(cases[:1], {("a", 0): cases[1:]}, tmp_path)
    assert caplog.text.count("a pass's bug") == 1
    assert [event["models"] for event in run.told("joined")] == [["j"]]
    for each in cases:
        assert_equal_float64(run, each)


def test_instances_bring_their_weights_and_constants(tmp_path, unlimited):
    data = cgo.DataSpec("support.small:points", batch_size=16)

    def model(id_, hidden):
        training = cgo.TrainingSpec(metrics=("accuracy",), epochs=3)
        return cgo.Model(Stemmed(hidden), data=data, training=training, model_id=id_)

    from cgo.planner import Planner

    settings = {"tuning": {"measure": False}}
    start = Planner().plan([model("a", 5)], tmp_path / "trial", settings).graph_data
    Planner().plan([model("j", 6)], tmp_path / "added", settings)
    commands, events = Commands(), []

    def report(event):
        events.append(event)
        if (event.model, event.epoch) == ("a", 0):
            commands.put(Command("add", str(tmp_path / "added" / "graph.json"), ("j",)))

    found = trial.execute(start, folder=tmp_path / "trial", report=report, commands=commands)
    assert set(found) == {"a", "j"}
    assert all(math.isfinite(metric) for metric in found.values())
    cgo.GraphData.read(tmp_path / "trial" / "graph.json").check_files()
