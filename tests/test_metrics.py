"""Names of metrics: which are taken, for which losses, and what is said of the others."""

import pytest
import torchmetrics
from support import metrics_table

import cgo
from cgo.errors import SpecError
from cgo.metrics import LOSSES, REFUSED, ROWS, check_metric, higher_is_better, loss_of, names

OWN = "support.own_metrics:hits"


@pytest.mark.parametrize("name", ["f1_score", "F1Score", "f1score"])
def test_names_are_those_of_torchmetrics_functions_or_classes(name):
    check_metric(name)
    assert higher_is_better(name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_taken_for_a_loss_of_its_kind_and_refused_for_the_others(row):
    for loss, read in LOSSES.items():
        training = {"loss": loss, "metrics": (row.name,)}
        if set(row.kinds) & set(read.kinds) and read.outputs != "scores":
            assert cgo.TrainingSpec(**training).mode == row.better
        elif not set(row.kinds) & set(read.kinds):
            with pytest.raises(
                SpecError, match=f"'{row.name}' is a metric of .* {loss!r} compares"
            ):
                cgo.TrainingSpec(**training)
    check_metric(row.name, "support.losses:smoothed")


def test_what_torchmetrics_says_of_its_direction_is_what_the_table_says():
    of_class = {n.lower(): getattr(torchmetrics, n) for n in dir(torchmetrics) if n[0].isupper()}
    assert set(of_class) > {row.name.replace("_", "") for row in ROWS}
    for row in ROWS:
        kinds = of_class[row.name.replace("_", "")].__mro__
        better = next((k.higher_is_better for k in kinds if hasattr(k, "higher_is_better")), None)
        assert better in (None, row.better == "max"), row.name


@pytest.mark.parametrize("name", REFUSED)
def test_names_without_one_meaning_are_refused_with_the_way_out(name):
    with pytest.raises(SpecError, match=rf"'{name}' is not taken by name.*a function of your own"):
        cgo.TrainingSpec(metrics=(name,))


@pytest.mark.parametrize("name", ["bleu_score", "mean_metric", "BootStrapper"])
def test_other_metrics_of_torchmetrics_are_refused(name):
    with pytest.raises(SpecError, match=r"has no meaning for outputs and targets.*package\.module"):
        cgo.TrainingSpec(metrics=(name,))


def test_an_unknown_name_is_answered_with_those_that_are_known():
    with pytest.raises(SpecError, match=r"no metric 'acuracy'; use one of accuracy, .*f1_score"):
        cgo.TrainingSpec(metrics=("acuracy",))


@pytest.mark.parametrize(
    ("loss", "name", "message"),
    [
        ("mse_loss", "accuracy", "metric of classes and labels.*use mean_squared_error"),
        ("cross_entropy", "mean_squared_error", "metric of numbers.*use accuracy"),
        ("binary_cross_entropy", "perplexity", "metric of classes.*use accuracy"),
        ("kl_div", "accuracy", "no meaning for outputs of loss 'kl_div'.*a function of your own"),
        ("poisson_nll_loss", "mean_squared_error", "no meaning for outputs of loss"),
        ("multi_margin_loss", "auroc", "needs probabilities, and outputs of loss"),
    ],
)
def test_a_metric_of_other_targets_than_the_loss_is_refused(loss, name, message):
    with pytest.raises(SpecError, match=message):
        cgo.TrainingSpec(loss=loss, metrics=(name,))


def test_a_loss_that_is_refused_is_named_and_not_its_metrics():
    with pytest.raises(SpecError, match="loss: 'mse' is neither") as raised:
        cgo.TrainingSpec(loss="mse", metrics=("accuracy",))
    assert "metrics" not in str(raised.value)


def test_an_import_path_of_a_loss_of_torch_is_that_loss():
    assert loss_of("torch.nn.functional:mse_loss") is LOSSES["mse_loss"]
    with pytest.raises(SpecError, match="is a metric of classes"):
        check_metric("accuracy", "torch.nn.functional:mse_loss")


@pytest.mark.parametrize("loss", [*LOSSES, "kl_div", "support.losses:smoothed"])
def test_metrics_by_import_path_go_with_any_loss(loss):
    assert cgo.TrainingSpec(loss=loss, metrics=(OWN,)).mode == "max"


def test_an_import_path_that_needs_arguments_says_how_to_give_them():
    with pytest.raises(SpecError, match=r"needs arguments.*wrap it in a function"):
        check_metric("torchmetrics:MinkowskiDistance")


def test_an_import_path_of_a_class_with_tasks_is_refused():
    with pytest.raises(SpecError, match=r"needs a task; use a name, such as 'f1_score'"):
        check_metric("torchmetrics:F1Score")


def test_the_direction_of_an_import_path_is_its_own():
    assert not higher_is_better("torchmetrics:MeanSquaredError")
    with pytest.raises(SpecError, match="does not say which way is better; set metric_mode"):
        higher_is_better("torchmetrics:MeanMetric")


def test_names_by_kind_keep_the_order_of_the_table():
    assert names()[0] == "accuracy"
    assert names(("numbers",))[0] == "mean_squared_error"


def test_the_table_in_the_docs_is_in_force():
    assert metrics_table.PATH.read_text() == metrics_table.document(), (
        "write it again: PYTHONPATH=tests python -m support.metrics_table"
    )
