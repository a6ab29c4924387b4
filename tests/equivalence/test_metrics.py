"""Named metrics in merged trials, against scikit-learn's over the plain loop's outputs."""

import torch
from sklearn import metrics as sk
from support.merged import Case, Merged, assert_equal_float64

TRAINING = {
    "precision": "float64", "epochs": 2, "optimizer": "SGD", "optimizer_kwargs": {"lr": 0.2},
}  # fmt: skip
LOGITS = "binary_cross_entropy_with_logits"


def case(id_, factory, kwargs=None, *, source="digits", target=None, **given):
    source_kwargs = {} if target is None else {"target": target}
    return Case(id_, factory, kwargs or {}, source, source_kwargs, training=TRAINING, **given)


def macro_f1(output, target):
    return sk.f1_score(target, output.argmax(1), average="macro", zero_division=0)


def of_counted(score):
    """What scikit-learn says of the targets that are not left out."""

    def measure(output, target):
        flat, said = target.flatten(), output.reshape(-1, output.shape[-1])
        return score(said[flat != -100], flat[flat != -100])

    return measure


def agree(output, target):
    return (output.argmax(1) == target).float().mean()


def test_metrics_of_a_merged_trial_are_scikit_learns(tmp_path):
    given = [
        case("plain", "mlp", metric="f1_score", measure=macro_f1),
        case("accuracy", "cnn"),
        case(
            "areas", "mlp", metric="auroc",
            measure=lambda o, t: sk.roc_auc_score(t, o.softmax(1), multi_class="ovr"),
        ),
        case(
            "ignored", "mlp", source="marked", target="ignored",
            metric="accuracy", measure=of_counted(agree),
        ),
        case(
            "odd", "outputs", {"count": 1}, source="marked", target="odd", loss=LOGITS,
            metric="f1_score", measure=lambda o, t: sk.f1_score(t[:, 0], o[:, 0] > 0),
        ),
        case(
            "parts", "outputs", {"count": 4}, source="marked", target="parts", loss=LOGITS,
            metric="f1_score", measure=lambda o, t: sk.f1_score(t, o > 0, average="macro"),
        ),
        case(
            "tokens", "language", source="sentences", loss="support.losses:by_token",
            metric="accuracy", measure=of_counted(agree),
        ),
        case(
            "words", "language", source="sentences", loss="support.losses:by_token",
            metric="f1_score", measure=of_counted(macro_f1),
        ),
        case(
            "numbers", "regressor", source="regression", loss="mse_loss",
            metric="r2_score", measure=lambda o, t: sk.r2_score(t, o),
        ),
    ]  # fmt: skip
    merged = Merged(given, tmp_path)
    assert merged.plan.report.opaque == {}
    for each in given:
        if each.id != "ignored":  # whose last batch has no loss: see below
            assert_equal_float64(merged, each)
    rows = merged.history("ignored")
    for row, expected in zip(rows, given[3].alone().history, strict=True):
        assert abs(row["val_accuracy"] - expected["val_accuracy"]) < 1e-7
        assert 0 < row["val_accuracy"] < 1
        # The mean of no loss is NaN, alone as well.
        assert torch.tensor([row["val_loss"], expected["val_loss"]]).isnan().all()


def test_a_metric_that_does_not_fit_ends_its_model_alone(tmp_path):
    bad = case("bad", "regressor", source="regression", loss="support.losses:squares")
    good = case("good", "regressor", source="regression", loss="mse_loss", metric="r2_score")
    good.measure = lambda output, target: sk.r2_score(target, output)
    merged = Merged([bad, good], tmp_path)
    assert_equal_float64(merged, good)
    error = merged.ended("bad")["error"]
    assert "'accuracy' cannot be computed: targets of labels are 0 or 1" in error
