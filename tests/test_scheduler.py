"""Trials that crash are divided until the model at fault is alone: which, and in how many starts.

The trials are processes of this machine that train nothing (`support.scripted_trial`), so that
many cases can be tried; `faults/test_bisection.py` does the same with models that are trained.
"""

import math
import threading
from pathlib import Path

import pytest
from support import awkward
from support.crashers import WAYS

import cgo
from cgo import ModelStatus
from cgo.platforms.local import LocalPlatform

WAIT_S = 120


class Counted(LocalPlatform):
    """Says which trials were started, and how many ran at once."""

    def __init__(self, workers=1, **env):
        env = {"PYTHONPATH": str(Path(__file__).parent), **env}
        super().__init__(workers, env=env, module="support.scripted_trial", warm=False)
        self.started, self.most = [], 0

    def submit(self, request):
        super().submit(request)
        self.started.append(request.trial_id)
        self.most = max(self.most, len(self._running))


def models(count, culprits=(), **kwargs):
    """Models m0, m1, ...; those of `culprits` crash."""
    data = cgo.DataSpec("support.small:points", batch_size=20)
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=2)
    return [
        cgo.Model(
            "support.scripted_trial:scripted",
            {"script": "kill", **kwargs} if number in culprits else {},
            data=data,
            training=training,
            seed=number,
            model_id=f"m{number}",
        )
        for number in range(count)
    ]


def search(folder, given, platform):
    with cgo.CGOEngine(folder, platform=platform, merge_always=True) as engine:
        engine.submit_models(*given)
        engine.wait_models(timeout_s=WAIT_S)
    return platform.started


def assert_only(given, culprits, way="signal SIGKILL"):
    for number, model in enumerate(given):
        if number in culprits:
            assert model.status is ModelStatus.FAILED
            assert model.error.startswith(f"model '{model.model_id}': trial t")
            assert way in model.error
            assert f"{model.model_id} crashes" in model.error  # the end of its log
        else:
            assert model.status is ModelStatus.TRAINED, model.error
            assert len(model.history) == 2


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_culprit_is_found_in_few_starts(count, place, tmp_path):
    culprit = {"first": 0, "middle": count // 2, "last": count - 1}[place]
    given = models(count, [culprit], epoch=1)
    started = search(tmp_path, given, Counted())
    assert_only(given, [culprit])
    assert len(started) <= 2 * math.log2(count) + 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("epoch", [-1, 0, 1])
def test_every_way_of_ending_a_trial_is_a_crash(way, epoch, tmp_path):
    given = models(5, [3], script=way, epoch=epoch)
    started = search(tmp_path, given, Counted())
    assert_only(given, [3], WAYS[way])
    assert len(started) <= 2 * math.log2(5) + 2


@pytest.mark.parametrize("culprits", [(0, 1), (0, 7), (3, 4), (2, 3, 6)])
def test_several_culprits_are_found(culprits, tmp_path):
    given = models(8, culprits, epoch=1)
    started = search(tmp_path, given, Counted())
    assert_only(given, culprits)
    assert len(started) <= len(culprits) * 2 * math.log2(8) + 2


@pytest.mark.parametrize("least", [2, 3, 5, 8])
def test_what_crashes_only_in_company_is_trained_in_less(least, tmp_path):
    given = models(8, [2], epoch=1, least=least)
    started = search(tmp_path, given, Counted())
    assert_only(given, [])
    assert len(started) <= 2 * math.log2(8) + 2


def test_halves_run_side_by_side_where_workers_are_idle(tmp_path):
    given = models(3, [1], epoch=1)  # too few to be divided before
    platform = Counted(workers=2)
    started = search(tmp_path, given, platform)
    assert_only(given, [1])
    assert len(started) <= 2 * math.ceil(math.log2(3)) + 2
    assert platform.most == 2


def test_models_that_ended_before_a_crash_are_left_alone(tmp_path):
    given = models(4, [1], epoch=1)
    platform = Counted()
    search(tmp_path, given, platform)
    trials = {record.trial_id: record for record in cgo.open_experiment(tmp_path).trials()}
    assert set(trials["t0000"].models) == {"m0", "m1", "m2", "m3"}
    assert platform.started[:2] == ["t0000", "t0000"]  # once more, where it was
    for record in trials.values():
        assert len(record.models) == record.report["models"]
        if record.trial_id != "t0000":
            assert record.report["part_of"] in trials


def test_where_no_trial_can_run_no_model_is_looked_for(tmp_path):
    given = models(8)
    started = search(tmp_path, given, Counted(CGO_TEST_BROKEN="1"))
    assert len(started) == 2
    for each in given:
        assert each.status is ModelStatus.FAILED
        assert each.error.startswith("not even a trial of no models runs here: trial t0001 ended")
        assert "SIGABRT" in each.error


def test_an_alias_shares_its_twins_fate(tmp_path):
    given = models(4, [1], epoch=1)
    data, training = given[0].data, given[0].training
    twins = [
        cgo.Model(given[n].module, given[n].kwargs, data=data, training=training, seed=n,
                  model_id=f"twin{n}")
        for n in (0, 1)
    ]  # fmt: skip
    search(tmp_path, [*given, *twins], Counted())
    assert_only(given, [1])
    assert twins[0].history == given[0].history
    assert (twins[0].status, twins[0].metric) == (given[0].status, given[0].metric)
    assert (twins[1].status, twins[1].error) == (ModelStatus.FAILED, given[1].error)


def test_cancelling_ends_what_waits_to_go_on(tmp_path):
    given = models(8, [0], epoch=1)
    first_crash = threading.Event()

    class Cancels(Counted):
        def submit(self, request):
            super().submit(request)
            if len(self.started) == 3:  # a half runs, and the other waits
                first_crash.set()

    platform = Cancels()
    with cgo.CGOEngine(tmp_path, platform=platform, merge_always=True) as engine:
        engine.submit_models(*given)
        assert first_crash.wait(WAIT_S)
    statuses = {model.status for model in given}
    assert statuses <= {ModelStatus.CANCELLED, ModelStatus.TRAINED, ModelStatus.FAILED}
    assert ModelStatus.CANCELLED in statuses
    assert all(m.error.startswith("cancelled") for m in given if m.status is ModelStatus.CANCELLED)


# --- planning -------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_planned_together_is_planned_apart(tmp_path, monkeypatch):
    from cgo import planner

    def merge(graphs):
        if any("m2" in node.owners for graph in graphs for node in graph.nodes):
            raise ZeroDivisionError("no such graph")
        return true(graphs)

    true = planner.merge
    monkeypatch.setattr(planner, "merge", merge)
    given = models(5)
    started = search(tmp_path, given, Counted())
    for each in (*given[:2], *given[3:]):
        assert each.status is ModelStatus.TRAINED, each.error
    assert given[2].status is ModelStatus.FAILED
    text = "model 'm2' could not be planned: ZeroDivisionError: no such graph ("
    assert given[2].error.startswith(text)
    assert "in merge)" in given[2].error
    assert len(started) == 2  # of m0 and m1, and of m3 and m4


def test_models_that_are_wrong_in_every_way_cost_a_good_one_nothing(tmp_path):
    data, training = models(1)[0].data, models(1)[0].training
    bad = [
        cgo.Model(what, data=data, training=training, model_id=f"bad{number}")
        for number, what in enumerate(
            (
                awkward.awkward("modules"),
                awkward.awkward("uncopyable"),
                "support.awkward:interrupts",
            )
        )
    ]
    given = models(2)
    search(tmp_path, [given[0], *bad, given[1]], Counted())
    assert_only(given, [])
    assert [each.status for each in bad] == [ModelStatus.FAILED] * 3
    assert "RuntimeError: no modules" in bad[0].error
    assert "cannot pickle" in bad[1].error
    assert bad[2].error == (
        "model 'bad2': factory support.awkward:interrupts raised KeyboardInterrupt"
    )


def test_a_journal_that_cannot_be_asked_means_that_models_are_trained(
    tmp_path, monkeypatch, caplog
):
    from cgo.store import Store

    def find_result(self, content):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Store, "find_result", find_result)
    given = models(2)
    search(tmp_path, given, Counted())
    assert_only(given, [])
    assert "results of 'm0' cannot be looked up: OSError: the disk is gone" in caplog.text


def test_a_trial_that_cannot_be_started_is_an_error_of_its_models_at_once(tmp_path):
    class Broken(Counted):
        def submit(self, request):
            raise OSError("no more processes")

    given = models(3)
    search(tmp_path, given, Broken())
    for each in given:
        assert each.error == "trial t0000 could not be started: OSError: no more processes"
