"""Models that differ in everything a search may vary, in one trial."""

import pytest
from support.merged import (
    Case,
    Merged,
    assert_equal_float64,
    assert_first_step_float32,
    relative,
)

F64 = {"precision": "float64", "epochs": 3}


def sgd(lr=0.1, **training):
    return {"optimizer": "SGD", "optimizer_kwargs": {"lr": lr}, **F64, **training}


def test_different_data_batches_epochs_and_seeds(tmp_path):
    given = [
        Case("a", "mlp", training=sgd()),
        Case("b", "cnn", data_seed=5, training=sgd(epochs=5)),
        Case("c", "cnn", {"width": 3}, batch_size=48, training=sgd(epochs=1)),
        Case("d", "residual", drop_last=True, batch_size=48, training=sgd(epochs=2)),
        Case("e", "mlp", {"dropout": 0.3}, source_kwargs={"samples": 100}, training=sgd()),
        Case("f", "mlp", {"width": 9}, seed=8, training=sgd(epochs=4)),
    ]
    merged = Merged(given, tmp_path)
    assert merged.plan.report.loaders == 5
    for case in given:
        assert_equal_float64(merged, case)


def test_regression_with_a_float_target(tmp_path):
    common = {"source": "regression", "loss": "mse_loss", "metric": "mean_squared_error"}
    given = [
        Case("a", "regressor", training=sgd(), **common),
        Case("b", "regressor", {"width": 5}, seed=1, training=sgd(0.02), **common),
    ]
    merged = Merged(given, tmp_path)
    for case in given:
        assert_equal_float64(merged, case)


@pytest.mark.parametrize("named", [False, True])
def test_tuple_and_dict_inputs(tmp_path, named):
    given = [
        Case(f"m{seed}", "two", source="paired", source_kwargs={"named": named}, seed=seed,
             training=sgd())
        for seed in range(2)
    ]  # fmt: skip
    merged = Merged(given, tmp_path)
    assert merged.plan.report.opaque == {}
    for case in given:
        assert_equal_float64(merged, case)


def test_three_precisions_in_one_trial(tmp_path):
    given = [
        Case(precision, "cnn", training=sgd(precision=precision))
        for precision in ("float32", "float64", "bfloat16")
    ]
    merged = Merged(given, tmp_path)
    assert merged.plan.report.opaque == {}
    assert_equal_float64(merged, given[1])
    assert_first_step_float32(merged, given[0])
    alone = given[2].alone()
    for found, expected in zip(merged.losses["bfloat16"], alone.losses, strict=True):
        assert relative(found, expected) <= 2e-2


@pytest.mark.parametrize("optimizer", ["Adagrad", "NAdam", "Adamax", "Rprop", "ASGD", "Adadelta"])
def test_other_optimizers_of_torch(tmp_path, optimizer):
    training = {"optimizer": optimizer, **F64}
    given = [
        Case("a", "mlp", training=training),
        Case("b", "lstm", training=training),  # a bias before batch norm would walk on rounding
        Case("c", "mlp", seed=1, training=training),
    ]
    merged = Merged(given, tmp_path)
    for case in given:
        assert_equal_float64(merged, case)


def test_parameters_without_a_gradient_stay_without_next_to_lanes_that_learn(tmp_path):
    """Alone their gradient is None; of a fused operator it would be zero, and weight decay acts."""
    training = {"optimizer": "AdamW", "optimizer_kwargs": {"weight_decay": 0.3}, **F64}
    given = [Case(f"m{seed}", "half_idle", {"idle": seed == 1}, seed=seed, training=training)
             for seed in range(3)]  # fmt: skip
    merged = Merged(given, tmp_path)
    assert merged.gradients["m1"]["enter.weight"] is None
    assert merged.gradients["m0"]["enter.weight"] is not None
    for case in given:
        assert_equal_float64(merged, case)
