"""Every fused form: equal to each member alone, and no lane reaches another."""

import math

import pytest
import torch
from support import forms_table
from support.calls import CALLS
from support.fused import Members

from cgo.runtime.forms import all_forms

PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "gathered"])
EACH = pytest.mark.parametrize("call", CALLS, ids=str)


def compare(found, expected, check):
    for ours, theirs in zip(found, expected, strict=True):  # outputs, gradients
        for member, (row, other) in enumerate(zip(ours, theirs, strict=True)):
            for index, (value, wanted) in enumerate(zip(row, other, strict=True)):
                assert (value is None) == (wanted is None), (member, index)
                if value is not None:
                    check(value, wanted)


def close(value, wanted):
    torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)


@PACKED
@EACH
def test_a_form_gives_what_each_member_alone_gives(call, packed):
    members = Members(call)
    found, decisions = members.fused(packed)
    assert decisions[-1].form == call.form, decisions[-1]
    compare(found, members.alone(), close)


@EACH
def test_two_members_are_as_good_as_three(call):
    members = Members(call, members=2, seed=5)
    compare(members.fused()[0], members.alone(), close)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@EACH
def test_a_lane_that_is_not_finite_changes_no_bit_of_its_neighbours(call, poison):
    """Inputs and weights of member 1 go bad, one at a time; members 0 and 2 must not notice."""
    members = Members(call)
    clean, _ = members.fused()
    for index, tensor in enumerate(call.tensors):
        if index in call.share or tensor.kind in ("classes", "bool"):
            continue
        kept = members.inputs[1][index]
        members.inputs[1][index] = torch.full_like(kept, poison)
        try:
            dirty, _ = members.fused()
        except RuntimeError as error:  # then the members are run apart, and the bad one fails
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                members.alone()
            continue
        finally:
            members.inputs[1][index] = kept
        for before, after in zip(clean, dirty):
            for lane in (0, 2):
                for number, (left, right) in enumerate(zip(before[lane], after[lane])):
                    # The gradient of a shared tensor is a sum over all members.
                    if left is not None and not (before is clean[1] and number in call.share):
                        assert torch.equal(left, right), (index, lane, number)


def test_every_operator_of_every_form_has_a_call():
    called = {call.op.rpartition(".")[0] if call.op.count(".") > 1 else call.op for call in CALLS}
    for form in all_forms():
        assert form.operators <= called, form.operators - called
    assert {form.name for form in all_forms()} <= {call.form for call in CALLS}


def test_gradients_of_gradients_are_not_needed_but_gradients_are_exact():
    """The numerical check of the forms' gradients, beside the comparison with plain torch."""
    for call in CALLS:
        tensors = call.tensors
        if call.op.startswith("cgo.") or any(t.kind in ("classes", "bool") for t in tensors):
            continue
        if math.prod(tensors[0].shape) > 100:
            continue
        members = Members(call, members=2)
        _check_numerically(members)


def _check_numerically(members):
    """Move one element of one leaf a little; outputs must move as the gradient says."""
    (outputs, gradients), _ = members.fused()
    generator = torch.Generator().manual_seed(members.seed + 1)
    weights = [
        [torch.randn(v.shape, generator=generator, dtype=v.dtype) if v.is_floating_point() else None
         for v in row]
        for row in outputs
    ]  # fmt: skip
    for lane in range(members.size):
        for index, gradient in enumerate(gradients[lane]):
            if gradient is None or index in members.call.share:
                continue
            values = members.inputs[lane]
            kept = values[index]
            direction = torch.randn(kept.shape, generator=generator, dtype=kept.dtype)
            sums = []
            for sign in (1, -1):
                values[index] = kept + sign * 1e-6 * direction
                (moved, _), _ = members.fused()
                sums.append(_weighted(moved, weights))
            values[index] = kept
            slope = (sums[0] - sums[1]) / 2e-6
            assert float(slope) == pytest.approx(
                float((gradient * direction).sum()), rel=1e-4, abs=1e-6
            ), (str(members.call), lane, index)


def _weighted(outputs, weights):
    return sum(
        (value * weight).sum()
        for row, others in zip(outputs, weights)
        for value, weight in zip(row, others)
        if weight is not None
    )


def test_the_table_in_the_docs_is_in_force():
    assert forms_table.PATH.read_text() == forms_table.document(), (
        "write it again: PYTHONPATH=tests python -m support.forms_table"
    )
