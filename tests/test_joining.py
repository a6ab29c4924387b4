"""Models that are submitted, or cancelled, while a trial runs, through real trials."""

import doctest
import threading
import time
from pathlib import Path

import pytest
from support.crashers import WAYS

import cgo
from cgo import ModelStatus, trial
from cgo.commands import Command
from cgo.errors import SpecError
from cgo.planner import Planner
from cgo.platforms.base import Commanded
from cgo.platforms.local import LocalPlatform

WAIT_S = 120
#: A tenth of a second an epoch.
SLOW = cgo.DataSpec("support.small:slow_points", {"delay_s": 0.002}, batch_size=20)
FOREVER = 100_000


def model(id_, module="support.small:mlp", kwargs=None, data=SLOW, seed=0, **training):
    training = {"metrics": ("accuracy",), "epochs": 3, "precision": "float64"} | training
    spec = cgo.TrainingSpec(**training)
    return cgo.Model(module, kwargs, data=data, training=spec, seed=seed, model_id=id_)


class Silent:
    """A platform without a channel into its trials."""

    def __init__(self):
        inner = LocalPlatform()
        for name in ("start", "submit", "cancel", "idle_workers", "has_idle_worker", "close"):
            setattr(self, name, getattr(inner, name))


class Told(LocalPlatform):
    """Keeps what its trials are told."""

    def __init__(self, **given):
        super().__init__(**given)
        self.commands = []

    def command(self, trial_id, command):
        self.commands.append((trial_id, command))
        return super().command(trial_id, command)


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def trains(*models):
    until(lambda: all(model.history for model in models))


def trials(folder):
    return cgo.open_experiment(folder).trials()


def assert_as_alone(folder, *models):
    """Histories as in a trial of their own."""
    for each in models:
        alone = model(each.model_id, each.module, each.kwargs, each.data, each.seed,
                      epochs=each.training.epochs)  # fmt: skip
        events = []
        plan = Planner().plan([alone], folder / f"alone-{each.model_id}")
        trial.execute(plan.graph_data, report=events.append)
        told = [event.value for event in events if event.kind == "epoch"]
        for row, expected in zip(each.history, told, strict=True):
            for key in ("train_loss", "val_loss", "val_accuracy", "lr"):
                assert row[key] == pytest.approx(expected[key], rel=1e-9)


# --- joining ------------------------------------------------------------------------------------


def test_models_submitted_one_by_one_join_the_trial_that_runs(tmp_path):
    long = model("long", epochs=FOREVER)
    more = [model(f"m{n}", kwargs={"hidden": 4 + n % 2}, seed=n) for n in range(4)]
    with cgo.CGOEngine(tmp_path / "one") as engine:
        engine.submit_models(long)
        trains(long)
        for each in more:
            engine.submit_models(each)
            engine.wait_models(each, timeout_s=WAIT_S)
        assert not long.status.ended
        engine.cancel_models(long)
        engine.wait_models(timeout_s=WAIT_S)
        assert sum(report.models for report in engine.reports) == 5
    (row,) = trials(tmp_path / "one")
    assert row.models == ("long", "m0", "m1", "m2", "m3")
    assert [report["models"] for report in row.report["joined"]] == [1] * 4
    assert sorted(path.name for path in (tmp_path / "one" / "trials").iterdir()) == ["t0000"]
    assert all(each.status is ModelStatus.TRAINED for each in more)
    assert set(more[0].state_dict()) == set(more[2].state_dict())
    assert_as_alone(tmp_path, more[0], more[3])


def test_what_joins_brings_its_aliases_and_its_failures(tmp_path):
    long = model("long", epochs=FOREVER)
    more = [model("a"), model("twin"), model("misfit", kwargs={"features": 7}),
            model("raises", "support.small:raises_later", {"after": 3}),
            model("opaque", "support.small:raises_later", {"after": FOREVER})]  # fmt: skip
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(long)
        trains(long)
        engine.submit_models(*more)
        engine.wait_models(*more, timeout_s=WAIT_S)
        assert not long.status.ended
    assert len(trials(tmp_path)) == 1
    statuses = [each.status for each in more]
    good, bad = ModelStatus.TRAINED, ModelStatus.FAILED
    assert statuses == [good, good, bad, bad, good]
    assert more[0].history == more[1].history


def test_without_a_channel_models_wait_for_the_end_of_the_trial(tmp_path, caplog):
    caplog.set_level("INFO")
    platform = Silent()
    assert not isinstance(platform, Commanded)
    first, second = model("first"), model("second", seed=1)
    with cgo.CGOEngine(tmp_path, platform=platform) as engine:
        engine.submit_models(first)
        trains(first)
        engine.submit_models(second)
        engine.wait_models(timeout_s=WAIT_S)
    assert "cannot command trials" in caplog.text
    assert [row.models for row in trials(tmp_path)] == [("first",), ("second",)]


def test_the_baseline_joins_nothing(tmp_path):
    platform = Told()
    first, second = model("first"), model("second", seed=1)
    with cgo.BaseExecutionEngine(tmp_path, platform=platform) as engine:
        engine.submit_models(first)
        trains(first)
        engine.submit_models(second)
        engine.wait_models(timeout_s=WAIT_S)
    assert platform.commands == []
    assert len(trials(tmp_path)) == 2


class Deaf(Told):
    """Adds do not arrive, and nobody notices: they are as late as can be."""

    def command(self, trial_id, command):
        self.commands.append((trial_id, command))
        return True


def test_what_is_added_too_late_has_a_trial_of_its_own(tmp_path):
    platform = Deaf()
    first, second, third = (model(f"m{n}", seed=n) for n in range(3))
    with cgo.CGOEngine(tmp_path, platform=platform) as engine:
        engine.submit_models(first)
        trains(first)
        engine.submit_models(second)
        until(lambda: platform.commands)
        engine.submit_models(third)
        engine.wait_models(timeout_s=WAIT_S)
    assert [command.kind for _, command in platform.commands][:1] == ["add"]
    found = trials(tmp_path)
    assert found[0].models == ("m0",)
    assert found[1].models == ("m1",)
    assert all(each.status is ModelStatus.TRAINED for each in (first, second, third))


class Breaking(Told):
    """Cuts the first document that is added."""

    def command(self, trial_id, command):
        if command.kind == "add" and not self.commands:
            path = Path(command.document)
            path.write_text(path.read_text()[:1000])
        return super().command(trial_id, command)


def test_a_document_that_cannot_be_read_fails_its_own_models(tmp_path):
    long, broken, fine = model("long", epochs=FOREVER), model("broken"), model("fine", seed=1)
    with cgo.CGOEngine(tmp_path, platform=Breaking()) as engine:
        engine.submit_models(long)
        trains(long)
        engine.submit_models(broken)
        told = len(long.history)
        until(lambda: len(long.history) > told + 20)
        assert broken.status is ModelStatus.SUBMITTED  # it waits for a trial of its own
        engine.cancel_models(long)
        engine.submit_models(fine)
        engine.wait_models(timeout_s=WAIT_S)
    assert "not a JSON document" in broken.error
    assert fine.status is ModelStatus.TRAINED


def test_a_platform_that_cannot_tell_lets_models_wait(tmp_path):
    class Broken(Told):
        def command(self, trial_id, command):
            super().command("gone", command)
            return False

    first, second = model("first"), model("second", seed=1)
    with cgo.CGOEngine(tmp_path, platform=Broken()) as engine:
        engine.submit_models(first)
        trains(first)
        engine.submit_models(second)
        engine.wait_models(timeout_s=WAIT_S)
    assert [row.models for row in trials(tmp_path)] == [("first",), ("second",)]
    assert second.status is ModelStatus.TRAINED


@pytest.mark.long
@pytest.mark.parametrize("way", ["exit 0", "kill"])
def test_a_trial_that_crashes_goes_on_with_those_that_joined(way, tmp_path):
    """The one that joins ends the process, each time it is trained for a while."""
    first, good = model("first", epochs=50), model("good", seed=1)
    bad = model("bad", "support.crashers:crasher", {"how": way})
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(first)
        trains(first)
        engine.submit_models(good, bad)
        engine.wait_models(timeout_s=WAIT_S)
    assert bad.status is ModelStatus.FAILED
    assert WAYS[way] in bad.error
    assert trials(tmp_path)[0].models == ("first", "good", "bad")
    assert_as_alone(tmp_path, first, good)


@pytest.mark.long
def test_a_listener_that_submits_at_each_end_needs_few_trials(tmp_path):
    class Chain(cgo.AbstractGraphListener):
        def on_metric(self, model, metric):
            """Not looked at."""

        def on_training_end(self, ended, success):
            if success and waiting:
                engine.submit_models(waiting.pop())
            if not waiting:
                done.set()

    done = threading.Event()
    waiting = [model(f"m{n}", seed=n, epochs=2) for n in range(6)]
    every = list(waiting)
    with cgo.CGOEngine(tmp_path) as engine:
        engine.register_graph_listener(Chain())
        engine.submit_models(model("long", epochs=FOREVER), waiting.pop(), waiting.pop())
        assert done.wait(WAIT_S)
        engine.wait_models(*[each for each in every if each.model_id in engine._models],
                           timeout_s=WAIT_S)  # fmt: skip
    assert len(trials(tmp_path)) == 1
    assert all(each.status is ModelStatus.TRAINED for each in every)


# --- cancelling ---------------------------------------------------------------------------------


def test_models_are_cancelled_in_every_state(tmp_path):
    ended, stays = model("ended"), model("stays", seed=1, epochs=FOREVER)
    stops = model("stops", seed=2, epochs=FOREVER)
    platform = Told()
    with cgo.CGOEngine(tmp_path, platform=platform) as engine:
        engine.submit_models(ended, stays, stops)
        engine.wait_models(ended, timeout_s=WAIT_S)
        queued = model("queued", seed=3)
        engine.submit_models(queued)
        engine.cancel_models(queued)  # at the latest while it is planned
        engine.cancel_models(ended, *(m for m in engine.list_models() if m.model_id == "stops"))
        engine.cancel_models(stops)  # again
        engine.wait_models(queued, stops, timeout_s=WAIT_S)
        told = len(stays.history)
        until(lambda: len(stays.history) > told)
        history = list(stops.history)
    assert ended.status is ModelStatus.TRAINED
    assert stays.status is ModelStatus.CANCELLED  # by the engine's end
    assert (queued.status, queued.history) == (ModelStatus.CANCELLED, [])
    assert queued.error == "cancelled before it was trained"
    assert (stops.status, stops.error) == (ModelStatus.CANCELLED, "cancelled while it was trained")
    assert stops.metric is None
    assert len(history) >= 3
    again = {m.model_id: m for m in cgo.open_experiment(tmp_path).models()}
    assert again["stops"].status is ModelStatus.CANCELLED
    assert again["stops"].history == history


def test_a_trial_whose_models_are_all_cancelled_frees_its_worker(tmp_path):
    given = [model(f"m{n}", seed=n, epochs=FOREVER) for n in range(3)]
    other = model("other", seed=5)
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(*given)
        trains(*given)
        engine.cancel_models(*given)
        engine.wait_models(*given, timeout_s=WAIT_S)
        engine.submit_models(other)
        engine.wait_models(other, timeout_s=WAIT_S)
    assert other.status is ModelStatus.TRAINED
    assert all(each.history for each in given)


@pytest.mark.parametrize("first", ["twin", "alias"])
def test_a_model_is_trained_as_long_as_an_equal_one_is_wanted(first, tmp_path):
    twin, alias = model("a", epochs=FOREVER), model("b", epochs=FOREVER)
    one, other = (twin, alias) if first == "twin" else (alias, twin)
    platform = Told()
    with cgo.CGOEngine(tmp_path, platform=platform) as engine:
        engine.submit_models(twin, alias)
        trains(twin, alias)
        engine.cancel_models(one)
        engine.wait_models(one, timeout_s=WAIT_S)
        assert one.status is ModelStatus.CANCELLED
        told = len(other.history)
        until(lambda: len(other.history) > told + 1)
        assert len(one.history) < len(other.history)
        assert platform.commands == []
        engine.cancel_models(other)
        engine.wait_models(other, timeout_s=WAIT_S)
    assert other.status is ModelStatus.CANCELLED
    assert platform.commands == [("t0000", Command("stop", models=("a",)))]


def test_an_alias_has_its_result_though_its_twin_was_cancelled(tmp_path):
    twin, alias = model("a", epochs=8), model("b", epochs=8)
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(twin, alias)
        trains(twin, alias)
        engine.cancel_models(twin)
        engine.wait_models(timeout_s=WAIT_S)
    assert (twin.status, alias.status) == (ModelStatus.CANCELLED, ModelStatus.TRAINED)
    assert alias.state_dict()
    found = {m.model_id: m for m in cgo.open_experiment(tmp_path).models()}
    assert found["b"].metric == alias.metric
    assert found["b"].state_dict()


def test_without_a_channel_a_trial_ends_with_the_last_that_is_wanted(tmp_path):
    given = [model(f"m{n}", seed=n, epochs=FOREVER) for n in range(2)]
    with cgo.CGOEngine(tmp_path, platform=Silent()) as engine:
        engine.submit_models(*given)
        trains(*given)
        engine.cancel_models(given[0])
        engine.wait_models(given[0], timeout_s=WAIT_S)
        told = len(given[1].history)
        until(lambda: len(given[1].history) > told + 1)
        assert not engine.query_available_resource()
        engine.cancel_models(given[1])
        engine.wait_models(given[1], timeout_s=WAIT_S)
        until(engine.query_available_resource)
    assert [each.status for each in given] == [ModelStatus.CANCELLED] * 2


def test_misuse_cancels_nothing(tmp_path):
    known, unknown = model("known"), model("unknown", seed=1)
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(known)
        with pytest.raises(SpecError, match="cancel_models: not submitted to this engine: unknown"):
            engine.cancel_models(known, unknown)
        with pytest.raises(SpecError, match="expected a Model, got str"):
            engine.cancel_models("known")
        engine.cancel_models()
        engine.wait_models(timeout_s=WAIT_S)
    assert known.status is ModelStatus.TRAINED


def test_one_that_is_cancelled_while_it_is_captured_is_not_trained(tmp_path):
    given = [model(f"m{n}", "support.small:mlp", {"hidden": 3 + n}) for n in range(3)]
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(*given)
        engine.cancel_models(given[1])
        engine.wait_models(timeout_s=WAIT_S)
    statuses = [each.status for each in given]
    assert statuses == [ModelStatus.TRAINED, ModelStatus.CANCELLED, ModelStatus.TRAINED]
    assert given[1].history == []


def test_the_example_of_cancelling_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(cgo.CGOEngine.cancel_models, "cancel", globs={})
    assert doctest.DocTestRunner().run(example) == (0, 5)
