"""How outputs are read, and which shapes are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cgo.errors import SpecError
from cgo.metrics import LOSSES, UNKNOWN_LOSS, row_of
from cgo.runtime.judging import check_one_hot, judge, numbers

ACCURACY, F1, R2 = row_of("accuracy"), row_of("f1_score"), row_of("r2_score")
CROSS, LOGITS = LOSSES["cross_entropy"], LOSSES["binary_cross_entropy_with_logits"]
WAY_OUT = "give 'package.module:name'"


def classes(*shape, of=4):
    return torch.randint(0, of, shape)


@pytest.mark.parametrize(
    ("loss", "output", "target", "is_single", "columns", "positions"),
    [
        (CROSS, (8, 4), (8,), False, 4, (8,)),
        (CROSS, (8, 4, 5), (8, 5), False, 4, (40,)),
        (CROSS, (8, 4, 5, 6), (8, 5, 6), False, 4, (240,)),
        (CROSS, (8, 4, 4), (8, 4), False, 4, (32,)),  # torch's losses have classes on axis 1
        (UNKNOWN_LOSS, (8, 4), (8,), False, 4, (8,)),
        (UNKNOWN_LOSS, (8, 5, 4), (8, 5), False, 4, (40,)),  # a language model
        (UNKNOWN_LOSS, (8, 4, 5), (8, 5), False, 4, (40,)),
        (UNKNOWN_LOSS, (40, 4), (8, 5), False, 4, (40,)),  # one that flattens
        (LOGITS, (8,), (8,), True, 2, (8,)),
        (LOGITS, (8, 1), (8, 1), True, 2, (8,)),
        (LOGITS, (8, 1, 5, 6), (8, 1, 5, 6), True, 2, (240,)),
        (LOGITS, (8, 3), (8, 3), False, 3, (8, 3)),
        (LOGITS, (8, 3, 5, 6), (8, 3, 5, 6), False, 3, (240, 3)),
        (UNKNOWN_LOSS, (8, 1), (8,), True, 2, (8,)),
        (UNKNOWN_LOSS, (8,), (8, 1), True, 2, (8,)),
        (UNKNOWN_LOSS, (8, 1, 5), (8, 5), True, 2, (40,)),
        (UNKNOWN_LOSS, (8, 3), (8, 3), False, 3, (8, 3)),
    ],
)
def test_shapes_and_the_loss_say_what_targets_are(
    loss, output, target, is_single, columns, positions
):
    has_labels = loss is LOGITS or is_single or output == target
    judged = judge(F1, loss, torch.randn(output), classes(*target, of=2 if has_labels else 4))
    assert (judged.is_single, judged.columns) == (is_single, columns)
    assert judged.targets.shape == judged.predicted().shape == positions
    assert judged.samples == 8


@pytest.mark.parametrize("axis", [1, 2])
def test_positions_keep_their_order(axis):
    target = classes(8, 5)
    output = torch.nn.functional.one_hot(target, 4).double().movedim(-1, axis)
    judged = judge(ACCURACY, UNKNOWN_LOSS, output, target)
    assert torch.equal(judged.predicted(), target.reshape(-1))
    assert torch.equal(judged.targets, target.reshape(-1))


@pytest.mark.parametrize(
    ("row", "loss", "output", "target", "message"),
    [
        (F1, CROSS, torch.rand(8, 1), classes(8, of=1), "one column with 'binary_cross_entropy_w"),
        (F1, CROSS, torch.rand(8, 4), torch.rand(8, 4), "targets of classes are integers"),
        (F1, CROSS, torch.rand(8, 5, 4), classes(8, 5), "classes are along axis 1"),
        (F1, CROSS, torch.rand(8, 3), classes(8) + 3, "outside the 3 classes"),
        (F1, CROSS, torch.rand(8, 3), torch.full((8,), -1), "outside the 3 classes"),
        (F1, UNKNOWN_LOSS, torch.rand(8, 5, 5), classes(8, 5), "axis 1 or along the last"),
        (F1, UNKNOWN_LOSS, torch.rand(8, 5, 4), classes(8, 6), "neither as classes nor as labels"),
        (F1, UNKNOWN_LOSS, torch.tensor(1.0), classes(8), "neither as classes nor as labels"),
        (F1, UNKNOWN_LOSS, torch.rand(8, 2), torch.rand(8, 2), "targets of labels are 0 or 1"),
        (F1, UNKNOWN_LOSS, torch.rand(8), torch.rand(8, 1), "targets of labels are 0 or 1"),
        (F1, LOGITS, torch.rand(8, 2), torch.rand(8, 2), "targets of labels are 0 or 1"),
        (F1, LOGITS, torch.rand(8, 1), torch.full((8, 1), -100.0), "targets of labels are 0 or 1"),
        (F1, LOGITS, torch.rand(8, 3, 5), classes(8, 3, 5, of=2), "could be labels or positions"),
        (F1, LOGITS, torch.rand(8, 2), classes(8, of=2), "labels have one output each"),
        (
            row_of("cohen_kappa"), LOGITS, torch.rand(8, 2), classes(8, 2, of=2),
            "no usual meaning for several labels",
        ),
        (
            row_of("perplexity"), UNKNOWN_LOSS, torch.rand(8, 2), classes(8, 2, of=2),
            "targets are labels",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_shapes_and_the_way_out(
    row, loss, output, target, message
):
    with pytest.raises(SpecError, match=message) as raised:
        judge(row, loss, output, target).check()
    assert f"outputs {tuple(output.shape)}" in str(raised.value)
    assert WAY_OUT in str(raised.value)


def test_pooled_metrics_of_labels_do_not_ask_for_their_axis():
    judged = judge(ACCURACY, LOGITS, torch.rand(8, 3, 5), classes(8, 3, 5, of=2))
    assert judged.targets.shape == (40, 3)


@given(st.floats(0, 1, width=32), st.sampled_from(["logits", "probabilities"]))
def test_outputs_between_0_and_1_are_read_as_the_loss_reads_them(value, read_as):
    loss = LOGITS if read_as == "logits" else LOSSES["binary_cross_entropy"]
    output = torch.tensor([value, 0.25])
    judged = judge(ACCURACY, loss, output, torch.tensor([0.0, 1.0]))
    exact = output.double().sigmoid() if read_as == "logits" else output.double()
    assert torch.equal(judged.probabilities()[:, 1], exact)
    assert bool(judged.predicted()[0]) == (value > (0 if read_as == "logits" else 0.5))


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_probabilities_of_classes_are_what_the_loss_makes_of_them(name):
    output = torch.rand(8, 4) if name == "cross_entropy" else torch.rand(8, 4).log_softmax(1)
    judged = judge(ACCURACY, LOSSES[name], output, classes(8))
    torch.testing.assert_close(
        judged.probabilities(), output.double().softmax(1), rtol=0, atol=1e-7
    )
    loss = getattr(torch.nn.functional, name)
    picked = judged.log_probabilities().gather(1, judged.targets.unsqueeze(1))
    assert float(-picked.mean()) == pytest.approx(float(loss(output, judged.targets)), rel=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.int64, torch.bool, torch.float32]
)
def test_labels_of_any_dtype(dtype):
    target = torch.tensor([[0, 1], [1, 1], [1, 0]])
    judged = judge(F1, LOGITS, torch.rand(3, 2), target.to(dtype))
    assert torch.equal(judged.targets, target)
    assert bool(judged.counted.all())


def test_targets_of_minus_100_are_left_out_where_the_loss_may_leave_them_out():
    target = torch.tensor([0, -100, 2])
    assert judge(F1, CROSS, torch.rand(3, 3), target).counted.tolist() == [True, False, True]
    labels = torch.tensor([0.0, -100.0, 1.0])
    assert judge(F1, UNKNOWN_LOSS, torch.rand(3), labels).counted.tolist() == [True, False, True]


def test_what_may_be_one_hot_classes_is_refused_unless_the_loss_says_that_it_is_labels():
    output, target = torch.rand(8, 4), torch.nn.functional.one_hot(classes(8), 4)
    with pytest.raises(SpecError, match="they could be classes, one-hot"):
        check_one_hot(F1, UNKNOWN_LOSS, judge(F1, UNKNOWN_LOSS, output, target))
    check_one_hot(F1, LOGITS, judge(F1, LOGITS, output, target))
    target[0] = 1
    check_one_hot(F1, UNKNOWN_LOSS, judge(F1, UNKNOWN_LOSS, output, target))


@pytest.mark.parametrize(
    ("row", "output", "target", "message"),
    [
        (R2, (8, 1), (8,), "give both one shape"),  # mse_loss would compare 64 pairs
        (R2, (8, 3), (8, 2), "give both one shape"),
        (R2, (8, 3, 4), (8, 3, 4), "it goes by columns"),
        (row_of("cosine_similarity"), (8, 1), (8, 1), "two columns at least"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(row, output, target, message):
    with pytest.raises(SpecError, match=message):
        numbers(row, LOSSES["mse_loss"], torch.rand(output), torch.rand(target))


def test_numbers_become_columns_in_float64():
    mse = row_of("mean_squared_error")
    for loss, output, target in (
        (LOSSES["mse_loss"], (8, 3, 4), (8, 3, 4)),
        (UNKNOWN_LOSS, (8, 12), (8, 1, 12)),
    ):
        found = numbers(mse, loss, torch.rand(output), torch.randint(0, 9, target))
        assert [value.shape for value in found] == [(8, 12), (8, 12)]
        assert {value.dtype for value in found} == {torch.float64}
