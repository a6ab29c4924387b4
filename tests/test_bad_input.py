"""Bad input, through the engine: an error that says what and where, and nothing lost."""

import pytest

import cgo
from cgo import ModelStatus
from cgo.errors import DuplicateModelError, EngineClosedError, ImportPathError, SpecError

WAIT_S = 120
POINTS = cgo.DataSpec("support.small:points", batch_size=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "SDG"}, "optimizer: 'SDG' is neither a class of torch.optim"),
        ({"optimizer": "LBFGS"}, "optimizer: LBFGS cannot be used: it needs a closure"),
        ({"optimizer_kwargs": {"learning": 1}}, "optimizer_kwargs: SGD: .*'learning'"),
        ({"optimizer_kwargs": {"lr": object()}}, "optimizer_kwargs: values must be JSON"),
        ({"loss": "cross_entropi"}, "loss: 'cross_entropi' is neither"),
        ({"loss": "support.losses:missing"}, "loss: module 'support.losses' has no 'missing'"),
        ({"metrics": ("acuracy",)}, "metrics: torchmetrics has no metric 'acuracy'"),
        ({"metrics": ("accuracy", "accuracy")}, "metrics: a metric is named twice"),
        ({"scheduler": "StepLR"}, "scheduler_kwargs: StepLR: missing a required argument"),
        ({"scheduler": "ReduceLROnPlateau"}, "scheduler: ReduceLROnPlateau cannot be used"),
        ({"scheduler_kwargs": {"gamma": 1}}, "scheduler_kwargs: given without a scheduler"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm: Input should be greater than 0"),
        ({"precision": "float8"}, "precision: Input should be 'float32'"),
        ({"loss_scale": 8.0}, "loss_scale: only for precision 'float16'"),
        ({"precision": "float16", "loss_scale": 0.0}, "loss_scale: Input should be greater"),
        ({"loss_scale_growth_interval": 3}, "loss_scale_growth_interval: only for precision"),
        ({"unknown": 1}, "unknown: Unexpected keyword argument"),
    ],
)
def test_training_specs_are_refused_by_field(fields, message):
    with pytest.raises(SpecError, match=rf"^TrainingSpec: {message}"):
        cgo.TrainingSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "digits"}, "source: 'digits' is not of the form 'package.module:name'"),
        ({"source": "nowhere.at_all:data"}, "source: cannot import 'nowhere.at_all'"),
        ({"source": "support.small:missing"}, "source: module 'support.small' has no 'missing'"),
        ({"source": "__main__:data"}, "source: .*lives in the script being run.*move it"),
        ({"source": "support.small:points", "batch_size": 0}, "batch_size: Input should be"),
        ({"source": "support.small:points", "seed": -1}, "seed: Input should be"),
        (
            {"source": "support.small:points", "augment": "support.augments:missing"},
            "augment: module 'support.augments' has no 'missing'",
        ),
        (
            {"source": "support.small:points", "augment": "os:sep"},
            "augment: 'os:sep' is not callable",
        ),
        (
            {"source": "support.small:points", "augment_kwargs": {"scale": 1}},
            "augment_kwargs: given without an augment",
        ),
    ],
)
def test_data_specs_are_refused_by_field(fields, message):
    with pytest.raises(SpecError, match=rf"^DataSpec: {message}"):
        cgo.DataSpec(**fields)


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (("support.small:missing",), {}, "module: module 'support.small' has no 'missing'"),
        (("support.small:mlp", {"width": {1}}), {}, "kwargs must be JSON values"),
        ((42,), {}, "module: expected 'package.module:callable' or an nn.Module, got int"),
        (("support.small:mlp",), {"seed": -1}, "seed: expected an integer"),
        (("support.small:mlp",), {"model_id": "a/b"}, "model_id: 'a/b' must be"),
        (("support.small:mlp",), {"data": "digits"}, "data: expected a DataSpec, got str"),
    ],
)
def test_models_are_refused_by_field(arguments, fields, message):
    with pytest.raises(SpecError, match=rf"^Model: {message}"):
        cgo.Model(*arguments, **{"data": POINTS, "training": cgo.TrainingSpec(), **fields})


def test_an_import_path_error_is_a_spec_error():
    assert issubclass(ImportPathError, SpecError)


def model(id_, module="support.small:mlp", kwargs=None, data=POINTS, **training):
    training = {"metrics": ("accuracy",)} | training
    spec = cgo.TrainingSpec(**training)
    return cgo.Model(module, kwargs, data=data, training=spec, model_id=id_)


def spec(source, **kwargs):
    return cgo.DataSpec(f"support.small:{source}", kwargs, batch_size=16)


def test_models_that_cannot_be_trained_fail_with_their_error_and_the_rest_is_trained(tmp_path):
    faulty = {
        "factory": (
            model("factory", kwargs={"no_such": 1}),
            "model 'factory': factory support.small:mlp raised TypeError",
        ),
        "misfit": (
            model("misfit", kwargs={"features": 9}),
            r"model 'misfit': a batch \(input \[16, 6\], target \[16\]\)",
        ),
        "sample": (
            model("sample", data=spec("broken_points", samples=1200, bad=1000)),
            "sample 1000 of the train data raised OSError: disk on fire",
        ),
        "source": (model("source", data=spec("points", samples="x")), "source .* raised TypeError"),
        "batch": (
            model("batch", data=cgo.DataSpec("support.small:points", batch_size=41)),
            r"batch_size 41 is larger than the training data \(40 samples\); use at most 40",
        ),
        "loss": (
            model("loss", loss="mse_loss", metrics=()),
            "through the module and its loss mse_loss raised",
        ),
        "muon": (model("muon", optimizer="Muon"), "optimizer Muon .* raised ValueError"),
    }
    good = [model("good"), model("better", kwargs={"hidden": 12})]
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(good[0], *(each for each, _ in faulty.values()), good[1])
        engine.wait_models(timeout_s=WAIT_S)
    for each, message in faulty.values():
        assert each.status is ModelStatus.FAILED
        with pytest.raises(cgo.CgoError, match=message):
            raise cgo.CgoError(each.error)
    assert all(each.status is ModelStatus.TRAINED for each in good)


def test_duplicate_and_late_submissions(tmp_path):
    a = model("a")
    with cgo.CGOEngine(tmp_path) as engine:
        engine.submit_models(a)
        with pytest.raises(DuplicateModelError, match="'a' was submitted before; to train it"):
            engine.submit_models(a)
        with pytest.raises(DuplicateModelError, match="'a' was submitted before, for another"):
            engine.submit_models(model("a"))
        engine.wait_models(a, timeout_s=WAIT_S)
        assert a.status is ModelStatus.TRAINED
    with pytest.raises(EngineClosedError, match="the engine is closed"):
        engine.submit_models(model("b"))


def test_best_refuses_metrics_that_point_in_different_directions():
    up, down = model("up"), model("down", metrics=())
    up.metric = down.metric = 0.5
    with pytest.raises(SpecError, match="some models' metrics are to be maximised"):
        cgo.best([up, down])
    assert cgo.best([model("none")]) is None
