"""The engine under NNI's contract: events, budgets, windows, resuming, what stays unmerged."""

import threading
import time

import pytest
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.execution.event import ModelEventType
from nni.nas.space import ModelStatus, SimplifiedModelSpace
from support import nni_spaces

from cgo.errors import BudgetExhaustedError, EngineClosedError, SpecError
from cgo.interface import AbstractGraphListener
from cgo.nni import CGOExecutionEngine, merge_experiment


@pytest.fixture
def engine(tmp_path):
    made = []

    def make(name="e", **options):
        engine = CGOExecutionEngine(tmp_path / name, **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.shutdown()


def models(count, space=None):
    space = space or nni_spaces.space()
    acts, widths = ("relu", "tanh", "gelu", "elu"), (8, 12, 16, 24)
    return [
        space.freeze({"act": acts[n % 4], "width": widths[n // 4], "lr": 0.01})
        for n in range(count)
    ]


def trials(engine):
    return [line for line in engine.explain() if line.startswith("trial ")]


def test_events_come_in_nnis_order_on_the_submitted_instances(engine):
    running = engine()
    heard = []
    for kind in ModelEventType:
        running.register_model_event_callback(
            kind,
            lambda event: heard.append(
                (event.event_type.value, event.model, event.model.status, event.model.metric)
            ),
        )
    (model,) = models(1)
    running.submit_models(model)
    assert model.status is ModelStatus.Training
    running.wait_models(model)
    kinds = [kind for kind, *_ in heard]
    assert kinds == ["intermediate_metric", "intermediate_metric", "final_metric", "training_end"]
    assert all(seen is model for _, seen, *_ in heard)
    # Callbacks run before the default one changes the model.
    assert heard[-1][2] is ModelStatus.Training
    assert heard[-2][3] is None
    assert model.status is ModelStatus.Trained
    assert list(running.list_models(ModelStatus.Trained)) == [model]


@pytest.mark.parametrize(
    "mistake",
    [RuntimeError("a strategy's mistake"), pytest.param(SystemExit(3), marks=pytest.mark.long)],
)
def test_a_callback_may_submit_and_one_that_raises_stops_nothing(mistake, engine):
    running = engine()
    first, second = models(2)

    def submit(event):
        if event.model is first:
            running.submit_models(second)
            raise mistake

    running.register_model_event_callback(ModelEventType.TrainingEnd, submit)
    running.submit_models(first)
    running.wait_models(first)
    running.wait_models()
    assert first.status is second.status is ModelStatus.Trained


def test_a_retried_model_is_trained_again(engine):
    running = engine()
    faulty = nni_spaces.space(faulty=True)
    model = faulty.freeze({"act": "raises", "width": 8, "lr": 0.01})
    seen = []

    def retry(event):
        seen.append(event.status)
        if len(seen) == 1:
            event.stop_propagation()
            model.status = ModelStatus.Retrying
            running.submit_models(model)

    running.register_model_event_callback(ModelEventType.TrainingEnd, retry)
    running.submit_models(model)
    while len(seen) < 2:
        time.sleep(0.05)
    running.wait_models()
    assert seen == [ModelStatus.Failed] * 2
    assert model.status is ModelStatus.Failed


def test_a_full_batch_begins_at_once_and_has_no_place_for_more(engine):
    running = engine(merge_size=2, merge_window_s=1000)
    first, second = models(2)
    running.submit_models(first)
    assert running.idle_worker_available()
    running.submit_models(second)
    assert not running.idle_worker_available()
    running.wait_models()
    assert running.idle_worker_available()
    assert len(trials(running)) == 1


def test_a_partial_batch_begins_when_nothing_comes(engine):
    running = engine(merge_window_s=0.2)
    for model in models(3):
        running.submit_models(model)
    while any(not model.status.completed() for model in running.list_models()):
        time.sleep(0.05)
    assert len(trials(running)) == 1


def test_a_partial_batch_begins_when_somebody_waits(engine):
    running = engine(merge_window_s=1000)
    running.submit_models(*models(3))
    running.wait_models()
    assert len(trials(running)) == 1


def test_budgets_are_counted_in_models_and_say_which_was_met(engine):
    running = engine(max_models=2)
    running.submit_models(*models(2))
    assert not running.budget_available()
    assert running.limit_met() == "max_models: 2 of 2 models were submitted"
    with pytest.raises(BudgetExhaustedError, match="max_models"):
        running.submit_models(*models(1))
    late = engine("late", max_duration_s=0.0)
    assert "max_duration_s" in late.limit_met()


def test_what_cannot_be_submitted(engine):
    running = engine()
    with pytest.raises(SpecError, match="initialized"):
        running.submit_models(nni_spaces.space())
    (model,) = models(1)
    running.submit_models(model)
    with pytest.raises(SpecError, match="training"):
        running.submit_models(model)
    running.shutdown()
    running.shutdown()
    assert model.status.completed()
    with pytest.raises(EngineClosedError):
        running.submit_models(*models(1))
    with pytest.raises(SpecError, match="at least 1"):
        CGOExecutionEngine(merge_size=0)


def evaluate(model):
    import nni

    nni.report_intermediate_result(0.25)
    nni.report_final_result(0.5)


def evaluate_badly(model):
    raise ValueError("no such data")


def evaluate_and_leave(model):
    raise SystemExit(7)


def test_other_evaluators_run_by_themselves_and_it_is_explained(engine):
    running = engine()
    functions = (evaluate_and_leave, evaluate, evaluate_badly)
    given = [FunctionalEvaluator(function) for function in functions]
    alone = [
        SimplifiedModelSpace.from_model(nni_spaces.DigitsSpace(), evaluator).freeze(
            {"act": "relu", "width": 8}
        )
        for evaluator in given
    ]
    merged = models(2)
    running.submit_models(*alone, *merged)
    running.wait_models()
    leaving, good, bad = alone
    assert running.error_of(leaving) == "SystemExit: 7"
    assert (good.status, good.metric) == (ModelStatus.Trained, 0.5)
    assert list(good.metrics.intermediates) == [0.25]
    assert bad.status is ModelStatus.Failed
    assert "no such data" in running.error_of(bad)
    assert all(model.status is ModelStatus.Trained for model in merged)
    lines = [line for line in running.explain() if "runs by itself" in line]
    assert len(lines) == 3
    assert all("FunctionalEvaluator" in line for line in lines)


def test_learning_rates_of_one_trial_differ(engine):
    running = engine()
    space = nni_spaces.space()
    given = [space.freeze({"act": "relu", "width": 8, "lr": lr}) for lr in (0.003, 0.01, 0.03)]
    running.submit_models(*given)
    running.wait_models()
    assert len(trials(running)) == 1
    assert len({model.metric for model in given}) > 1


def test_a_search_goes_on_from_the_journal(engine):
    first = engine()
    given = models(4)
    first.submit_models(*given)
    first.wait_models()
    state = first.state_dict()
    first.shutdown()
    second = engine("unused", max_models=6)
    second.load_state_dict(state)
    again = models(6)
    second.submit_models(*again[:1])
    assert second.state_dict()["model_count"] == 5
    second.wait_models()
    assert again[0].metric == given[0].metric
    assert not trials(second)
    assert second.experiment_dir == first.experiment_dir
    second.submit_models(again[5])
    assert not second.budget_available()
    second.wait_models()
    assert len(trials(second)) == 1
    with pytest.raises(SpecError, match="load the state before"):
        second.load_state_dict(state | {"experiment_dir": "elsewhere"})


class Listener(AbstractGraphListener):
    """Hears our own events beside NNI's."""

    def __init__(self):
        self.ended = []

    def on_metric(self, model, metric):
        assert isinstance(metric, float)

    def on_intermediate_metric(self, model, metric):
        assert isinstance(metric, float)

    def on_training_end(self, model, success):
        self.ended.append((model.model_id, success, threading.current_thread().name))


def test_equal_candidates_are_trained_once(engine):
    running = engine()
    twins = models(1) + models(1)
    running.submit_models(*twins)
    running.wait_models()
    assert twins[0].metric == twins[1].metric
    assert running.name_of(twins[0]) != running.name_of(twins[1])
    assert "1 captured" in trials(running)[0] or "2 models" in trials(running)[0]


def test_an_experiment_of_nnis_runs_merged(tmp_path, monkeypatch):
    from nni.nas.experiment import NasExperiment
    from nni.nas.strategy import Random

    monkeypatch.setenv("HOME", str(tmp_path))
    import nni

    experiment = NasExperiment(
        nni_spaces.DigitsSpace(), nni_spaces.evaluator(nni.choice("lr", [0.01, 0.03])),
        Random(seed=0),
    )  # fmt: skip
    experiment.config.max_trial_number = 4
    experiment.config.experiment_working_directory = str(tmp_path / "nni")
    merge_experiment(experiment, experiment_dir=tmp_path / "e", merge_size=4)
    assert experiment.run(port=0)
    top = experiment.export_top_models(top_k=1, formatter="dict")
    assert set(top[0]) == {"act", "width", "lr"}
    assert len(list(experiment._engine.list_models(ModelStatus.Trained))) == 4
    experiment.stop()
