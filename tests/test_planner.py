"""How many models a trial can hold, and captures that one planner hands to another."""

import pytest
from support import awkward, small
from support.hostile import chebyshev
from support.merged import Case

import cgo
from cgo.bench.families import FAMILIES
from cgo.errors import EngineClosedError, ModelError
from cgo.graph import dump
from cgo.graph_data import GraphData
from cgo.planner import Planner
from cgo.runtime.optimizers import moments_of
from cgo.trial import execute

WIDE = {"width": 512}  # 64 * 512 + 512 + 512 * 10 + 10 parameters, or about 150 KB


@pytest.fixture
def models():
    return [Case(f"m{n}", "mlp", WIDE, seed=n, training={"epochs": 1}).model() for n in range(5)]


def test_models_fit_while_their_state_and_the_largest_activations_do(models):
    planner = Planner()
    assert planner.fitting(models, 1e12) == models
    parameters = 64 * 512 + 512 + 512 * 10 + 10
    state = 2 * 4 * parameters  # and as much of gradients; plain SGD keeps no moments
    few = planner.fitting(models, 4 * state)
    assert 2 <= len(few) <= 4
    assert len(planner.fitting(models, 5 * state)) == len(few) + 1


def test_a_model_that_seems_too_large_is_tried_all_the_same(models):
    assert Planner().fitting(models, 1.0) == models[:1]


def test_what_was_captured_to_find_out_is_not_captured_again(models, tmp_path):
    planner = Planner()
    planner.fitting(models, 1e12)
    plan = planner.plan(models, tmp_path)
    assert plan.report.captured == 5
    assert plan.failures == {}


def test_adopted_captures_give_the_plan_that_capturing_gives(tmp_path):
    models = FAMILIES["mlp"](2)
    first, second = Planner(), Planner()
    first.capture(models)
    second.adopt(first.captured())
    adopted = second.plan(models, tmp_path / "adopted")
    own = Planner().plan(models, tmp_path / "own")
    assert dump(adopted.graph_data.graph) == dump(own.graph_data.graph)
    assert adopted.graph_data.models == own.graph_data.models
    assert second.captured() == {}


# --- a model that cannot be planned is its own failure, and no other's ---------------------------


def points(**fields):
    return cgo.DataSpec("support.small:points", batch_size=20, **fields)


def model(id_, module="support.small:mlp", kwargs=None, data=None, **training):
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=1, **training)
    return cgo.Model(module, kwargs, data=data or points(), training=spec, model_id=id_)


def planned(plan):
    return [] if plan.graph_data is None else [entry.id for entry in plan.graph_data.models]


def test_whatever_is_wrong_with_a_module_is_told_of_it_alone(tmp_path):
    given = [model("good")]
    for how in awkward.WAYS:
        given.append(model(f"factory-{how}", "support.awkward:awkward", {"how": how}))
        given.append(model(f"instance-{how}", awkward.awkward(how)))
    plan = Planner().plan([*given, model("better", kwargs={"hidden": 5})], tmp_path)
    assert {"good", "better", "factory-repr", "instance-repr"} <= set(planned(plan))
    for id_, error in plan.failures.items():
        assert error.startswith(f"model {id_!r}: ")
    assert "raised SystemExit: 5, at awkward.py:" in plan.failures["factory-exits"]
    assert "awkward.py" in plan.failures["factory-exits"]
    assert "RuntimeError: no named_parameters" in plan.failures["instance-named_parameters"]
    assert len(planned(plan)) + len(plan.failures) == len(given) + 1


def test_contents_of_what_cannot_be_captured_are_told_once_and_are_like_no_other():
    planner = Planner()
    bad = [model(f"bad{n}", awkward.awkward("modules")) for n in range(2)]
    first, second = map(planner.content, bad)
    assert first != second
    assert planner.captured() == {}


def test_bad_data_are_opened_once_for_all_their_models(tmp_path):
    data = cgo.DataSpec("support.awkward:bad_points", batch_size=20)
    given = [model(f"m{n}", data=data, kwargs={"hidden": 3 + n}) for n in range(4)]
    awkward.OPENED.clear()
    planner = Planner()
    plan = planner.plan([*given, model("good")], tmp_path)
    assert len(awkward.OPENED) == 1
    assert planned(plan) == ["good"]
    for each in given:
        error = plan.failures[each.model_id]
        assert error.startswith(
            f"model {each.model_id!r}: source support.awkward:bad_points raised"
        )
    planner.plan([model("again", data=data)], tmp_path / "again")
    assert len(awkward.OPENED) == 2  # it may have been mended meanwhile


def test_what_cannot_be_estimated_is_told_of_it_alone(tmp_path, monkeypatch):
    from cgo import planner as module

    def need(captured):
        if captured.entry.id == "m1":
            raise ZeroDivisionError("no bytes")
        return true(captured)

    true = module._need
    monkeypatch.setattr(module, "_need", need)
    given = [model(f"m{n}", kwargs={"hidden": 3 + n}) for n in range(3)]
    planner = Planner()
    assert planner.fitting(given, 1e12) == given
    plan = planner.plan(given, tmp_path)
    assert planned(plan) == ["m0", "m2"]
    assert "'m1': estimating its memory raised ZeroDivisionError: no bytes (" in plan.failures["m1"]


def test_an_optimizer_that_refuses_to_be_tried_is_estimated_all_the_same(tmp_path):
    odd = model("odd", optimizer="support.awkward:Optimizer", optimizer_kwargs={"lr": 0.1})
    planner = Planner()
    assert planner.fitting([odd], 1e12) == [odd]
    assert planned(planner.plan([odd], tmp_path)) == ["odd"]


def test_a_start_that_cannot_be_written_fails_its_model_and_not_an_equal_one(tmp_path):
    (tmp_path / "start" / "bad.safetensors").mkdir(parents=True)  # no file can be put there
    nets = [small.mlp(), small.mlp(hidden=5)]
    given = [model("bad", nets[0]), model("other", nets[1]), model("equal", nets[0])]
    plan = Planner().plan(given, tmp_path)
    assert planned(plan) == ["other", "equal"]
    assert plan.failures["bad"].startswith(
        "model 'bad': writing its start raised IsADirectoryError"
    )
    assert plan.graph_data.aliases == {}
    plan.graph_data.check_files()


def test_a_plan_that_fails_keeps_what_was_captured(tmp_path, monkeypatch):
    from cgo import planner as module

    def broken(*args):
        raise ZeroDivisionError("no pass")

    planner = Planner()
    given = [model("good"), model("bad", "support.awkward:awkward", {"how": "modules"})]
    with monkeypatch.context() as patch:
        patch.setattr(module, "merge", broken)
        with pytest.raises(ZeroDivisionError):
            planner.plan(given, tmp_path)
    assert set(planner.captured()) == {"good"}
    monkeypatch.setattr(planner, "_capture", broken)  # nothing is captured again
    plan = planner.plan(given, tmp_path)
    assert planned(plan) == ["good"]
    assert "no modules" in plan.failures["bad"]


def test_a_stopped_planner_captures_nothing_more():
    planner = Planner()
    planner.stop()
    with pytest.raises(EngineClosedError):
        planner.capture([model("late")])


def test_memory_of_an_optimizer_that_cannot_step_is_guessed():
    """Its model fails as it trains; its company is planned all the same."""
    odd = cgo.Model(
        "support.hostile:mlp",
        data=cgo.DataSpec("support.hostile:points", batch_size=4),
        training=cgo.TrainingSpec(optimizer="SparseAdam"),
    )
    assert moments_of(odd.training) == 2.0
    assert Planner().fitting([odd], 1e9) == [odd]


def test_what_a_trial_would_refuse_to_read_is_an_opaque_lane(tmp_path):
    """One such graph would cost its company the whole document."""
    data = cgo.DataSpec("support.hostile:points", batch_size=4)
    given = {"data": data, "training": cgo.TrainingSpec()}
    odd = cgo.Model("support.hostile:chebyshev", model_id="odd", **given)
    plan = Planner().plan([odd, cgo.Model("support.hostile:mlp", model_id="m", **given)], tmp_path)
    assert not plan.failures
    assert "operator 'aten.special_chebyshev_polynomial_t" in plan.report.opaque["odd"]
    assert {model.id for model in GraphData.read(tmp_path / "graph.json").models} == {"odd", "m"}
    assert set(execute(plan.graph_data, folder=tmp_path)) == {"odd", "m"}
    with pytest.raises(ModelError, match="'odd': its graph cannot be sent to a trial"):
        Planner()._capture(cgo.Model(chebyshev(), model_id="odd", **given))


# --- whether merging can win ----------------------------------------------------------------------


def few(epochs, count=4, **training):
    training = {"epochs": epochs} | training
    return [Case(f"m{n}", "mlp", WIDE, seed=n, training=training).model() for n in range(count)]


def test_models_of_few_steps_are_left_as_they_are_and_say_why(tmp_path):
    planner, models = Planner(), few(1)
    found = planner.consider(models, "cpu")
    assert not found.merge
    plan = planner.plan(models, tmp_path)
    assert plan.failures == {}
    assert plan.report.captured == 0
    assert plan.report.estimate == found
    for reason in plan.report.opaque.values():
        assert reason == f"merging would not repay itself ({found})"
    assert len(execute(GraphData.read(tmp_path / "graph.json"))) == 4


def test_models_of_many_steps_are_merged(tmp_path):
    planner, models = Planner(), few(10_000)
    found = planner.consider(models, "cpu")
    assert found.merge
    assert planner.captured() == {}
    plan = planner.plan(models[:1], tmp_path)
    assert plan.report.captured == 1
    assert plan.report.estimate == found.share(1)


def test_what_only_a_graph_can_send_is_captured(tmp_path):
    given = cgo.Model(
        small.mlp(),
        data=cgo.DataSpec("support.small:points", batch_size=16),
        training=cgo.TrainingSpec(),
    )
    assert Planner().consider([given], "cpu") is None
    assert Planner(merge=False).consider(few(1), "cpu") is None


def test_models_that_cannot_be_tried_are_no_samples(tmp_path):
    planner = Planner()
    bad = Case("bad", "mlp", {"width": "wide"}, training={"epochs": 1}).model()
    assert planner.consider([bad], "cpu") is None
    found = planner.consider([bad, *few(1)], "cpu")
    assert found.models == 5
    plan = planner.plan([bad, *few(1)], tmp_path)
    assert set(plan.failures) == {"bad"}


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_left_as_they_are_they_train_as_merged(precision, tmp_path):
    found = []
    for name, leave in (("plain", True), ("merged", False)):
        models, planner, told = few(2, precision=precision), Planner(), []
        if leave:
            assert not planner.consider(models, "cpu").merge
        plan = planner.plan(models, tmp_path / name)
        execute(plan.graph_data, folder=tmp_path / name, report=told.append)
        rows = [(e.model, e.epoch, e.value) for e in told if e.kind == "epoch"]
        found.append({(m, e): {k: v for k, v in r.items() if k != "seconds"} for m, e, r in rows})
    plain, merged = found
    assert plain.keys() == merged.keys()
    tolerance = 1e-9 if precision == "float64" else 2e-2
    for key, row in plain.items():
        assert row == pytest.approx(merged[key], rel=tolerance)
