"""TF32 for as long as a trial runs, by both of torch's ways to say so."""

import pytest
import torch
from support.merged import Case, Merged

import cgo
from cgo.runtime.precision import tf32, tf32_key


def settings():
    """What all of torch's switches read; the older ones raise where they were left mixed."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    return cuda.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision(), *newer


@pytest.fixture(autouse=True)
def as_torch_starts():
    before = settings()
    assert before == (False, True, "highest", "none", "tf32", "tf32")
    yield
    assert settings() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_both_ways_say_the_same_until_the_trial_ends(allowed):
    name = "tf32" if allowed else "ieee"
    with tf32(allowed):
        found = settings()
    assert found == (allowed, allowed, "high" if allowed else "highest", name, name, name)


def test_a_trial_that_raises_leaves_it_as_it_was():
    with pytest.raises(KeyError), tf32(True):
        raise KeyError


def test_none_leaves_what_is_set():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = settings()
        with tf32(None):
            assert settings() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_what_was_set_the_newer_way_comes_back():
    """torch refuses to read this the older way: nothing here may."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    try:
        with tf32(False):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"


def test_measured_costs_are_kept_apart():
    keys = [tf32_key()]
    for allowed in (True, False):
        with tf32(allowed):
            keys.append(tf32_key())
    assert keys[0] == ""
    assert len(set(keys)) == 3


def test_a_trial_says_what_it_was_allowed(tmp_path):
    class Seen(Merged):
        def on_loss(self, model, step, loss):
            self.found = settings()

    case = Case("a", "mlp", training={"epochs": 1})
    for allowed in (None, True):
        run = Seen([case], tmp_path / str(allowed), tuning=cgo.Tuning(measure=False, tf32=allowed))
        (event,) = (
            e.value for e in run.events if e.kind == "trial" and e.value["what"] == "lowered"
        )
        assert event["tf32"] is allowed
        assert run.found[0] is bool(allowed)


@pytest.mark.gpu
def test_a_gpu_rounds_as_it_was_told(cuda):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).to(cuda) for _ in range(2))
    exact = a.double() @ b.double()
    errors = []
    for allowed in (False, True):
        with tf32(allowed):
            errors.append(float((a @ b - exact).abs().max()))
    assert errors[0] < 1e-3
    if torch.cuda.get_device_capability(cuda) >= (8, 0):  # older ones have no TF32
        assert errors[1] > 2 * errors[0]
