"""NNI's own strategies on the engine, unchanged: on this machine, and on NNI's local service."""

import warnings

import pytest
from nni.nas.space import GraphModelSpace, ModelStatus, RawFormatModelSpace, SimplifiedModelSpace
from nni.nas.strategy import TPE, GridSearch, PolicyBasedRL, Random, RegularizedEvolution
from support import nni_spaces

from cgo.nni import CGOExecutionEngine, NniPlatform
from cgo.platforms.local import LocalPlatform

BUDGET = 12

STRATEGIES = {
    "Random": lambda: Random(seed=0),
    "GridSearch": lambda: GridSearch(seed=0),
    "RegularizedEvolution": lambda: RegularizedEvolution(
        population_size=4, sample_size=2, seed=0, dedup=False
    ),
    "TPE": lambda: TPE(seed=0),
    "PolicyBasedRL": lambda: PolicyBasedRL(samples_per_update=4),
}

PLATFORMS = {
    "local": lambda folder: LocalPlatform(),
    "nni": lambda folder: NniPlatform(working_directory=folder / "nni"),
}


def search(strategy, space, folder, platform="local", **options):
    """All models of a finished search, and its engine."""
    engine = CGOExecutionEngine(
        folder / "experiment",
        platform=PLATFORMS[platform](folder),
        **{"merge_size": 4, "max_models": BUDGET} | options,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            STRATEGIES[strategy]()(space, engine)
        engine.wait_models()
        return list(engine.list_models()), engine
    finally:
        engine.shutdown()


def check_trained(models):
    assert len(models) == BUDGET
    for model in models:
        assert model.status is ModelStatus.Trained
        assert 0 <= model.metric <= 1
        assert len(model.metrics.intermediates) == 2
        assert model.metrics.intermediates[-1] == model.metric


#: Each searches; the others are as quick, and take other paths through NNI.
LONG = {"TPE", "PolicyBasedRL", "GridSearch"}


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=[pytest.mark.long] if s in LONG else []) for s in STRATEGIES],
)
def test_a_search_on_this_machine(strategy, tmp_path):
    models, engine = search(strategy, nni_spaces.space(), tmp_path)
    check_trained(models)
    assert "12 of 12" in engine.limit_met()
    merged = [line for line in engine.explain() if "captured" in line]
    assert len(merged) < BUDGET


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_on_nnis_local_service(strategy, tmp_path):
    models, _ = search(strategy, nni_spaces.space(), tmp_path, "nni")
    check_trained(models)


def sample(act, width=8, lr=0.01):
    return {"act": act, "width": width, "lr": lr}


@pytest.mark.parametrize("platform", ["local", pytest.param("nni", marks=pytest.mark.long)])
def test_candidates_that_raise_or_diverge_fail_alone(platform, tmp_path):
    space = nni_spaces.space(faulty=True)
    names = ("relu", "raises", "tanh", "nan", "gelu", "elu")
    engine = CGOExecutionEngine(tmp_path / "e", platform=PLATFORMS[platform](tmp_path))
    models = [space.freeze(sample(name)) for name in names]
    engine.submit_models(*models)
    engine.wait_models(*models)
    engine.shutdown()
    failed = {m.sample["act"] for m in models if m.status is ModelStatus.Failed}
    assert failed == {"raises", "nan"}
    assert all(m.metric is not None for m in models if m.status is ModelStatus.Trained)
    errors = {m.sample["act"]: engine.error_of(m) for m in models}
    assert "this candidate cannot be run" in errors["raises"]
    assert "nan" in errors["nan"]


@pytest.mark.parametrize("strategy", ["Random", "RegularizedEvolution"])
def test_a_search_goes_on_beside_candidates_that_fail(strategy, tmp_path):
    models, engine = search(strategy, nni_spaces.space(faulty=True, widths=(8, 12)), tmp_path)
    assert len(models) == BUDGET
    for model in models:
        faulty = model.sample["act"] in ("raises", "nan")
        assert model.status is (ModelStatus.Failed if faulty else ModelStatus.Trained)
        assert (engine.error_of(model) is not None) == faulty


@pytest.mark.parametrize(
    "kind", [RawFormatModelSpace, pytest.param(SimplifiedModelSpace, marks=pytest.mark.long)]
)
def test_formats_of_spaces(kind, tmp_path):
    models, _ = search("Random", nni_spaces.space(kind), tmp_path)
    check_trained(models)


def test_the_graph_format(tmp_path):
    graph = nni_spaces.graph_space()
    assert isinstance(graph, GraphModelSpace)
    models, engine = search("Random", graph, tmp_path, max_models=3)
    assert [model.status for model in models] == [ModelStatus.Trained] * len(models)
    assert not engine.errors
