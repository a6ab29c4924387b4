"""Companies of good models and bad ones: what a bad model costs the others, which is nothing."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import bad
from support.merged import relative

import cgo
from cgo import trial
from cgo.planner import Planner

KNOWN = cgo.Tuning(measure=False, tape=True).as_json()

GOOD = ("mlp", "cnn", "residual", "encoder")


def good(number, family):
    data = cgo.DataSpec("support.data:digits", {"samples": 96}, batch_size=32)
    training = cgo.TrainingSpec(epochs=3, precision="float64", metrics=("accuracy",))
    kwargs = {} if family == "encoder" else {"dropout": 0.2}
    return cgo.Model(
        f"support.nets:{family}", kwargs, data=data, training=training, seed=number,
        model_id=f"good{number}",
    )  # fmt: skip


def told(models, folder: Path, fuse=None):
    """What each model's listener would hear, without times; and which weights it ended with."""
    plan = Planner(batch_operators=fuse).plan(models, folder, {"tuning": KNOWN})
    heard: dict[str, list[object]] = {id_: [text] for id_, text in plan.failures.items()}

    def report(event):
        if event.kind == "epoch":
            row = {key: value for key, value in event.value.items() if key != "seconds"}
            heard.setdefault(event.model, []).append(row)
        elif event.kind == "ended":
            value = event.value
            heard.setdefault(event.model, []).append(value["error"] or value["sha256"])

    if plan.graph_data is not None:
        trial.execute(plan.graph_data, folder=folder, report=report)
        heard |= {alias: heard[twin] for alias, twin in plan.graph_data.aliases.items()}
    return heard


def assert_own_error(heard, kind, id_):
    error = heard[id_][-1]
    assert bad.KINDS[kind].error in error, (kind, error)
    assert "good" not in error


COMPANIES = st.tuples(
    st.lists(st.sampled_from(GOOD), min_size=1, max_size=3),
    st.lists(st.sampled_from(sorted(k for k, v in bad.KINDS.items() if not v.ends)),
             min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)  # fmt: skip


def check(company, tmp_path_factory, fuse):
    families, kinds, shuffle = company
    others = [good(number, family) for number, family in enumerate(families)]
    rotten = [bad.model(kind, f"bad{number}") for number, kind in enumerate(kinds)]
    everyone = [*others, *rotten]
    shuffle.shuffle(everyone)
    whole = told(others, tmp_path_factory.mktemp("whole"), fuse)
    mixed = told(everyone, tmp_path_factory.mktemp("mixed"), fuse)
    for number, kind in enumerate(kinds):
        assert_own_error(mixed, kind, f"bad{number}")
    return [(whole[model.model_id], mixed[model.model_id]) for model in others]


#: An example trains two companies, so that one which fails is not made smaller.
FEW = settings(
    max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)  # fmt: skip
MANY = settings(FEW, max_examples=60)


def bits(company, tmp_path_factory):
    for alone, mixed in check(company, tmp_path_factory, None):
        assert mixed == alone


def within_rounding(company, tmp_path_factory):
    for alone, mixed in check(company, tmp_path_factory, cgo.BatchOperators()):
        for row, expected in zip(mixed[:-1], alone[:-1], strict=True):
            for key, value in expected.items():
                assert relative(row[key], value) <= 1e-9 or math.isclose(row[key], value)


@FEW
@given(COMPANIES)
def test_good_models_have_the_bits_that_they_have_without_the_bad(tmp_path_factory, company):
    bits(company, tmp_path_factory)


@FEW
@given(COMPANIES)
def test_fused_with_bad_models_good_ones_differ_by_rounding(tmp_path_factory, company):
    within_rounding(company, tmp_path_factory)


@pytest.mark.long
@pytest.mark.timeout(3600)
@MANY
@given(COMPANIES)
def test_many_companies(tmp_path_factory, company):
    bits(company, tmp_path_factory)
    within_rounding(company, tmp_path_factory)


@pytest.mark.parametrize("kind", sorted(k for k, v in bad.KINDS.items() if not v.ends))
def test_every_kind_of_bad_model_fails_with_an_error_of_its_own(kind, tmp_path):
    heard = told([good(0, "mlp"), bad.model(kind, "bad0")], tmp_path)
    assert_own_error(heard, kind, "bad0")
    assert len(heard["good0"]) == 4


#: Each takes half a minute.
ENDS = [
    pytest.param(kind, marks=[] if kind == "reads nothing" else pytest.mark.long)
    for kind in sorted(k for k, v in bad.KINDS.items() if v.ends)
]


@pytest.mark.parametrize("kind", ENDS)
def test_a_model_that_ends_its_process_ends_alone(kind, tmp_path):
    others = [good(number, family) for number, family in enumerate(GOOD[:3])]
    rotten = bad.model(kind, "bad0")
    options = {"batch_operators": None, "tuning": cgo.Tuning(measure=False, tape=True)}
    with cgo.CGOEngine(tmp_path / "mixed", **options) as engine:
        engine.submit_models(*others, rotten)
        engine.wait_models(timeout_s=300)
    assert rotten.status is cgo.ModelStatus.FAILED
    assert bad.KINDS[kind].error in rotten.error
    whole = told([good(number, family) for number, family in enumerate(GOOD[:3])], tmp_path / "w")
    for model in others:
        assert model.error is None
        for row, expected in zip(model.history, whole[model.model_id][:-1], strict=True):
            assert {key: row[key] for key in expected} == expected
