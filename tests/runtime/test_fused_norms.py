"""The operators of fused norms, as the machinery around a step sees them."""

import pytest
import torch

from cgo.private.fake_tensors import FakeTensorMode
from cgo.runtime.fused_norms import evaluated, normalised, trained, trained_copying
from cgo.runtime.streams import _written
from cgo.runtime.tape import compile_tape, interpreted, record
from cgo.runtime.triton_kernels import usable

CPU = torch.device("cpu")
LAST = torch.channels_last

interpreting = pytest.mark.skipif(
    not usable(CPU, True), reason="Triton interprets no kernels here: it is missing, or for a GPU"
)


def given(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, added = (drawn(3, 4, 2, 5).contiguous(memory_format=LAST) for _ in range(2))
    return [x, drawn(4), drawn(4), drawn(4), drawn(4).abs() + 0.5, added]


def step(x, weight, bias, mean, var, added):
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias, added)]
    result = trained(*leaves[:3], mean, var, 0.2, 1e-5, leaves[3], "relu")
    return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]


@interpreting
@pytest.mark.parametrize("replayed", [compile_tape, interpreted], ids=["TorchScript", "Python"])
def test_a_step_is_recorded_and_replayed_with_its_bits(replayed):
    wanted = given()
    results, tape = record(step, given())
    mutable = [call for call in tape.calls if call.op._schema.is_mutable]
    assert [len(list(_written(call))) for call in mutable] == [2]
    expected = step(*wanted)
    inputs = given()
    found = replayed(tape)(*inputs)
    for ours, theirs in zip((*found, *inputs), (*expected, *wanted), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results, expected):
        assert torch.equal(ours, theirs)


@interpreting
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_get_what_true_ones_get(dtype):
    true = step(*given(dtype))
    with FakeTensorMode():
        fake = step(*given(dtype))
    for ours, theirs in zip(fake, true, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )


@interpreting
def test_the_operators_pass_torchs_own_check():
    x, weight, bias, mean, var, added = given()
    values = (x, weight, bias, mean, var, True, 0.2, 1e-5, added, "relu")
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.cgo.batch_norm_activation.default
    torch.library.opcheck(forward, values, test_utils=checks)
    out, mean, rstd = forward(*values)
    torch.library.opcheck(
        torch.ops.cgo.batch_norm_activation_backward.default,
        (torch.ones_like(x), x, out, weight, bias, mean, rstd, True, "relu", True),
        test_utils=checks,
    )


@interpreting
def test_copying_leaves_the_statistics():
    x, weight, bias, mean, var, added = given()
    before = mean.clone(), var.clone()
    found = trained_copying(x, weight, bias, mean, var, 0.2, 1e-5, added, activation="relu")
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert torch.equal(found, trained(x, weight, bias, mean, var, 0.2, 1e-5, added, "relu"))
    assert not torch.equal(mean, before[0])


@interpreting
def test_evaluation_writes_no_statistics():
    x, weight, bias, mean, var, added = given()
    before = mean.clone(), var.clone()
    found = evaluated(x, weight, bias, mean, var, 0.2, 1e-5, added)
    wanted = torch.batch_norm(x, weight, bias, mean, var, False, 0.2, 1e-5, False) + added
    torch.testing.assert_close(found, wanted)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@interpreting
def test_only_wanted_gradients_are_given():
    x, weight, bias, _, _, added = given()
    weight.requires_grad_()
    normalised(x, weight, bias, None, None, True, 0.1, 1e-5, added, "relu").sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert added.grad is None
