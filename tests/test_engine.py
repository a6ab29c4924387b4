"""The engines, through real trials."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from support import small

import cgo
import cgo.trial
from cgo import AbstractGraphListener, ModelStatus
from cgo.engine import get_execution_engine
from cgo.errors import (
    BudgetExhaustedError,
    CgoError,
    DuplicateModelError,
    EngineClosedError,
    SpecError,
    WaitTimeoutError,
)
from cgo.planner import Planner
from cgo.platforms.local import LocalPlatform

WAIT_S = 120
DATA = cgo.DataSpec("support.small:points", batch_size=16)


def model(id_, module="support.small:mlp", kwargs=None, data=DATA, seed=0, **training):
    training = {"metrics": ("accuracy",), "epochs": 2, "optimizer_kwargs": {"lr": 0.1}} | training
    spec = cgo.TrainingSpec(**training)
    return cgo.Model(module, kwargs, data=data, training=spec, seed=seed, model_id=id_)


class Calls(AbstractGraphListener):
    def __init__(self):
        self.seen, self.threads = [], set()

    def _note(self, *what):
        self.seen.append(what)
        self.threads.add(threading.get_ident())

    def on_metric(self, model, metric):
        assert isinstance(metric, float)
        self._note(model.model_id, "final")

    def on_intermediate_metric(self, model, metric):
        assert isinstance(metric, float)
        self._note(model.model_id, "epoch")

    def on_training_end(self, model, success):
        self._note(model.model_id, success)

    def of(self, id_):
        return [what for name, what in self.seen if name == id_]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One search with all kinds of ends, and what its listener heard."""
    folder = tmp_path_factory.mktemp("experiment")
    models = [
        model("a"),
        model("b", kwargs={"hidden": 5}, epochs=3),
        model("twin"),
        model("opaque", "support.small:raises_later", {"after": 1000}),
        model("raises", "support.small:raises_later", {"after": 2}),
        model("nan", "support.small:explodes"),
        model("misfit", kwargs={"features": 7}),
        model("instance", small.mlp(hidden=6)),
    ]
    calls = Calls()
    with cgo.CGOEngine(folder) as engine:
        engine.register_graph_listener(calls)
        engine.submit_models(*models)
        engine.wait_models(timeout_s=WAIT_S)
        reports = engine.reports
    return {m.model_id: m for m in models}, calls, folder, reports


def test_models_are_merged_into_one_trial(finished):
    _, _, folder, reports = finished
    assert len(cgo.open_experiment(folder).trials()) == 1
    (report,) = reports
    assert (report.models, report.loaders, report.aliases) == (7, 1, {"twin": "a"})
    assert set(report.opaque) == {"opaque", "raises"}


def test_workers_side_by_side_share_a_search(tmp_path):
    models = [model(f"m{n}", kwargs={"hidden": 4 + n % 2}, seed=n) for n in range(8)]
    models.append(model("misfit", kwargs={"features": 7}))
    with cgo.CGOEngine(tmp_path, platform=LocalPlatform(workers=2), merge_always=True) as engine:
        engine.submit_models(*models)
        engine.wait_models(timeout_s=WAIT_S)
        reports = engine.reports
    assert len(cgo.open_experiment(tmp_path).trials()) == 2
    assert sorted(report.models for report in reports) == [4, 4]
    assert sum(m.status is ModelStatus.TRAINED for m in models) == 8
    assert "misfit" in models[-1].error
    alone = model("m3", kwargs={"hidden": 5}, seed=3)
    with cgo.CGOEngine(tmp_path / "alone") as engine:
        engine.submit_models(alone)
        engine.wait_models(alone, timeout_s=WAIT_S)
    assert alone.metric == pytest.approx(models[3].metric)


def test_trained_models_have_their_metrics(finished):
    models, *_ = finished
    for id_, epochs in {"a": 2, "b": 3, "twin": 2, "opaque": 2, "instance": 2}.items():
        assert models[id_].status is ModelStatus.TRAINED
        assert len(models[id_].history) == epochs
        assert models[id_].metric == models[id_].intermediate_metrics[-1]
        assert models[id_].metric == models[id_].history[-1]["val_accuracy"]
    assert models["twin"].history == models["a"].history


def test_failed_models_have_their_errors_and_no_metric(finished):
    models, *_ = finished
    for id_, error in {
        "raises": "RuntimeError: gave up",
        "nan": "the training loss became nan",
        "misfit": "mat1 and mat2 shapes cannot be multiplied",
    }.items():
        assert models[id_].status is ModelStatus.FAILED
        assert error in models[id_].error
        assert models[id_].metric is None


def test_a_listener_hears_all_in_order_from_one_thread(finished):
    _, calls, *_ = finished
    assert calls.of("a") == ["epoch", "epoch", "final", True]
    assert calls.of("twin") == calls.of("a")
    assert calls.of("raises") == [False]
    assert calls.of("misfit") == [False]
    assert len(calls.threads) == 1
    assert threading.get_ident() not in calls.threads


def test_weights_load_into_a_fresh_module(finished):
    models, *_ = finished
    net = small.mlp(hidden=5)
    net.load_state_dict(models["b"].state_dict())
    net.eval()
    x, y = small.points()[1].tensors
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(models["b"].metric, abs=1e-6)


def test_the_experiment_says_the_same_afterwards(finished):
    models, _, folder, _ = finished
    for found in cgo.open_experiment(folder).models():
        expected = models[found.model_id]
        assert (found.status, found.metric, found.history, found.error) == (
            expected.status, expected.metric, expected.history, expected.error,
        )  # fmt: skip


def test_best_honours_the_mode_and_passes_over_failures(finished):
    models, *_ = finished
    assert cgo.best(models.values()).metric == max(
        m.metric for m in models.values() if m.metric is not None
    )


def test_trained_models_are_reported_at_once_when_submitted_again(finished):
    models, _, folder, _ = finished
    calls = Calls()
    again, other_id = model("a"), model("elsewhere", kwargs={"hidden": 5}, epochs=3)
    with cgo.CGOEngine(folder) as engine:
        engine.register_graph_listener(calls)
        engine.submit_models(again, other_id)
        engine.wait_models(timeout_s=WAIT_S)
        assert engine.reports == ()
    assert len(cgo.open_experiment(folder).trials()) == 1
    assert again.history == models["a"].history
    assert other_id.history == models["b"].history
    assert calls.of("a") == ["epoch", "epoch", "final", True]
    assert set(other_id.state_dict()) == set(models["b"].state_dict())


def test_an_earlier_id_may_not_stand_for_another_model(finished):
    _, _, folder, _ = finished
    with (
        cgo.CGOEngine(folder) as engine,
        pytest.raises(DuplicateModelError, match="stands for another model"),
    ):
        engine.submit_models(model("a", kwargs={"hidden": 3}))


def test_the_baseline_trains_each_model_in_its_own_trial(tmp_path, finished):
    merged, *_ = finished
    models = [model("a"), model("b", kwargs={"hidden": 5}, epochs=3)]
    with cgo.BaseExecutionEngine(tmp_path) as engine:
        engine.submit_models(*models)
        engine.wait_models(timeout_s=WAIT_S)
    assert len(cgo.open_experiment(tmp_path).trials()) == 2
    for each in models:
        same = ("train_loss", "val_loss", "val_accuracy", "lr")
        rows = zip(each.history, merged[each.model_id].history, strict=True)
        for row, other in rows:  # fused float32 sums in another order
            assert all(row[key] == pytest.approx(other[key], rel=1e-4) for key in same)


def test_misuse_is_refused_and_submits_nothing(tmp_path):
    a = model("a")
    with cgo.CGOEngine(tmp_path) as engine:
        with pytest.raises(DuplicateModelError, match="'a' was submitted before"):
            engine.submit_models(a, a)
        with pytest.raises(DuplicateModelError, match="for another model"):
            engine.submit_models(model("b"), model("b", kwargs={"hidden": 3}))
        with pytest.raises(SpecError, match="expected a Model, got str"):
            engine.submit_models("a")
        with pytest.raises(SpecError, match="not submitted to this engine: a"):
            engine.wait_models(a)
        with pytest.raises(SpecError, match="expected an AbstractGraphListener"):
            engine.register_graph_listener(print)
        assert engine.list_models() == []
        engine.submit_models(a)
        with pytest.raises(DuplicateModelError, match="'a' was submitted before"):
            engine.submit_models(a)
        with pytest.raises(DuplicateModelError):
            engine.submit_models(model("a", kwargs={"hidden": 3}))
    with pytest.raises(EngineClosedError):
        engine.submit_models(model("c"))
    engine.close()


def test_closing_cancels_what_is_left(tmp_path):
    slow = cgo.DataSpec("support.small:slow_points", {"delay_s": 0.01}, batch_size=8)
    a = model("a", data=slow, epochs=1000)
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(a)
        with pytest.raises(WaitTimeoutError, match=r"1 of 1 models .*\(a\); they train on"):
            engine.wait_models(a, timeout_s=0.2)
        (snapshot,) = engine.list_models()
    assert a.status is ModelStatus.CANCELLED
    assert snapshot.status is not ModelStatus.CANCELLED
    assert cgo.open_experiment(tmp_path).models()[0].status is ModelStatus.CANCELLED


def test_listed_models_are_copies(tmp_path):
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(model("a"))
        engine.wait_models(timeout_s=WAIT_S)
        (copied,) = engine.list_models(ModelStatus.TRAINED)
        copied.history.clear()
        copied.metric = -1.0
        assert engine.list_models()[0].history != []
        assert engine.list_models()[0].metric != -1.0
        assert engine.list_models(ModelStatus.FAILED) == []


def test_budgets(tmp_path):
    with cgo.CGOEngine(tmp_path / "count", max_models=2) as engine:
        assert not engine.budget_exhausted()
        with pytest.raises(BudgetExhaustedError, match="max_models is 2: 0 were submitted and 3"):
            engine.submit_models(model("a"), model("b"), model("c"))
        engine.submit_models(model("a"), model("b", seed=1))
        assert engine.budget_exhausted()
        with pytest.raises(BudgetExhaustedError):
            engine.submit_models(model("c"))
    with cgo.CGOEngine(tmp_path / "time", max_duration_s=0.0001) as engine:
        assert engine.budget_exhausted()
        with pytest.raises(BudgetExhaustedError, match="max_duration_s"):
            engine.submit_models(model("a"))


def test_resources_are_the_idle_workers(tmp_path):
    with cgo.CGOEngine(tmp_path) as engine:
        (worker,) = engine.query_available_resource()
        assert worker.device_name
        assert 0 < worker.free_memory_bytes <= worker.total_memory_bytes


def test_a_listener_may_submit_more_but_not_wait(tmp_path):
    class Chain(Calls):
        def on_training_end(self, model_, success):
            super().on_training_end(model_, success)
            if model_.model_id == "first":
                engine.submit_models(second)
                with pytest.raises(CgoError, match="called from a listener"):
                    engine.wait_models(second)
                self._note("refused", True)

    first, second = model("first", epochs=1), model("second", epochs=1, seed=4)
    with cgo.CGOEngine(tmp_path) as engine:
        chain = Chain()
        engine.register_graph_listener(chain)
        engine.submit_models(first)
        engine.wait_models(first, timeout_s=WAIT_S)
        engine.wait_models(second, timeout_s=WAIT_S)
    assert ("refused", True) in chain.seen
    assert second.status is ModelStatus.TRAINED


def test_a_planning_bug_fails_the_models_and_hangs_nobody(tmp_path, monkeypatch):
    from cgo import planner

    def broken(*args, **kwargs):
        raise ZeroDivisionError("planner bug")

    monkeypatch.setattr(planner, "merge", broken)
    a = model("a")
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(a)
        engine.wait_models(timeout_s=WAIT_S)
    assert a.status is ModelStatus.FAILED
    assert "ZeroDivisionError: planner bug" in a.error


def test_the_process_wide_engine_is_one_until_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = get_execution_engine()
    assert get_execution_engine() is first
    first.close()
    second = get_execution_engine()
    assert second is not first
    second.close()


def test_a_trial_may_execute_a_graph_by_the_engine_class(finished):
    models, _, folder, _ = finished
    (record,) = cgo.open_experiment(folder).trials()
    data = cgo.GraphData.read(folder / "trials" / record.trial_id / "graph.json")
    found = cgo.CGOEngine.trial_execute_graph(copy.copy(data))
    trained = {id_: m.metric for id_, m in models.items() if m.metric is not None}
    assert found == trained


def test_a_trial_reads_the_experiments_settings(tmp_path):
    a = model("a", "support.small:configured")
    with cgo.CGOEngine(tmp_path, max_models=7) as engine:
        engine.submit_models(a)
        engine.wait_models(timeout_s=WAIT_S)
    assert a.error is None
    with pytest.raises(cgo.errors.TrialError, match="only there inside a trial"):
        cgo.trial.experiment_config()


def test_a_trial_finds_an_augmentation_whose_source_counts_as_content(tmp_path, monkeypatch):
    home = tmp_path / "modules"
    home.mkdir()
    (home / "fresh_augment.py").write_text("from support.augments import Jitter as build\n")
    monkeypatch.syspath_prepend(str(home))
    data = cgo.DataSpec(
        "support.small:points", batch_size=16, augment="fresh_augment:build",
        augment_kwargs={"scale": 3.0}, resident=True,
    )  # fmt: skip
    plain, augmented = model("plain"), model("augmented", data=data)
    with cgo.CGOEngine(tmp_path / "experiment") as engine:
        engine.submit_models(plain, augmented)
        engine.wait_models(timeout_s=WAIT_S)
    assert augmented.status is ModelStatus.TRAINED, augmented.error
    assert augmented.history[0]["train_loss"] != plain.history[0]["train_loss"]
    before = Planner().content(augmented)
    (home / "fresh_augment.py").write_text("from support.augments import Widen as build\n")
    assert Planner().content(augmented) != before


def test_models_that_do_not_fit_together_are_trained_by_further_trials(tmp_path):
    class Small(LocalPlatform):
        """Says that it has little memory."""

        def idle_workers(self):
            return [replace(worker, free_memory_bytes=1) for worker in super().idle_workers()]

    models = [model(f"m{n}", seed=n, epochs=1) for n in range(3)]
    with cgo.CGOEngine(tmp_path, platform=Small()) as engine:
        engine.submit_models(*models)
        engine.wait_models()
        assert all(found.metric is not None for found in models)
        counts = [report.models for report in engine._scheduler.reports]
    assert counts == [1, 1, 1]  # one is tried in any case


def test_an_engine_inside_a_trial_or_a_loaders_worker_is_refused(tmp_path, monkeypatch):
    class Makes(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            try:
                cgo.CGOEngine(tmp_path / "worker")
            except cgo.errors.NestedEngineError as error:
                return str(error)
            return "made"

    (told,) = next(iter(torch.utils.data.DataLoader(Makes(), num_workers=1)))
    assert told.startswith("a CGOEngine was made inside a worker of a loader, by ")
    monkeypatch.setenv("CGO_IN_TRIAL", "1")
    for kind in (cgo.CGOEngine, cgo.BaseExecutionEngine, get_execution_engine):
        with pytest.raises(cgo.errors.NestedEngineError, match=r"made inside a trial, by .*, line"):
            kind(experiment_dir=tmp_path / "trial")
    assert list(tmp_path.iterdir()) == []


def test_models_submitted_after_everything_was_cancelled_are_trained(tmp_path):
    slow = cgo.DataSpec("support.small:slow_points", {"delay_s": 0.01}, batch_size=8)
    before, after = model("before", data=slow, epochs=1000), model("after", epochs=1)
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(before)
        engine._scheduler.cancel_all()
        engine.submit_models(after)
        engine.wait_models(timeout_s=WAIT_S)
    assert before.status is ModelStatus.CANCELLED
    assert after.status is ModelStatus.TRAINED


def test_a_thread_that_user_code_leaves_running_does_not_keep_the_worker(tmp_path):
    first, second = (
        model("first", "support.crashers:never_ends", epochs=1),
        model("second", epochs=1),
    )
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(first)
        engine.wait_models(first, timeout_s=WAIT_S)
        engine.submit_models(second)
        engine.wait_models(second, timeout_s=WAIT_S)
    assert first.status is second.status is ModelStatus.TRAINED
