"""Recording a step: what it refuses, and that the process is afterwards what it was."""

import contextlib
import copy
import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cgo
from cgo.capture import Capturer, Examples
from cgo.errors import ModelError
from cgo.graph import restrict

DATA = cgo.DataSpec("support.small:points", batch_size=16)
KEPT = {}


class Net(nn.Module):
    """A layer, something of the test's own on what it gives, and a head."""

    def __init__(self, inner, **attributes):
        super().__init__()
        self.body, self.head, self.inner = nn.Linear(6, 8), nn.Linear(8, 3), inner
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.head(self.inner(self, x, self.body(x)))


@pytest.fixture(scope="module")
def examples():
    return Examples.of(DATA)


def recorded(net, examples, capturer=None):
    torch.manual_seed(0)
    model = cgo.Model(net, data=DATA, training=cgo.TrainingSpec(), model_id="m")
    return (capturer or Capturer(["recording"])).capture(model, examples)


def refused(net, examples, capturer=None):
    """Why an instance is not recorded."""
    with pytest.raises(ModelError, match="cannot be captured") as caught:
        recorded(net, examples, capturer)
    return str(caught.value)


# --- values that Python reads ---------------------------------------------------------------------


def swallowed(net, x, h):
    try:
        factor = float(x.mean())
    except Exception:
        factor = 1.0
    return h * factor


def caught(net, x, h):
    with contextlib.suppress(IndexError):
        h[torch.arange(2), torch.arange(3)]
    return h


def other_default(net, x, h):
    torch.set_default_dtype(torch.float64)
    try:
        return h + torch.zeros(8).float()
    finally:
        torch.set_default_dtype(torch.float32)


def hooked(net, x, h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.5)
    return h


def freezing(net, x, h):
    net.head.bias.requires_grad_(False)
    return h


REFUSED = {
    "item": (lambda net, x, h: h * x.mean().item(), "a value that depends on data (aten.item"),
    "swallowed": (swallowed, "a value that depends on data (aten.item"),
    "if": (lambda net, x, h: h if x.sum() > 0 else -h, "depends on data (aten.is_nonzero"),
    "shape": (lambda net, x, h: h + x[x > 0].mean(), "depends on data (aten.index.Tensor"),
    "list": (lambda net, x, h: h * x[0].tolist()[0], "reads a tensor's values (tolist)"),
    "numpy": (lambda net, x, h: h * x.numpy()[0, 0], "reads a tensor's values (numpy)"),
    "address": (lambda net, x, h: h * (1 + x.data_ptr() % 2), "values (data_ptr)"),
    "an operator that failed": (caught, "(aten.index.Tensor"),
    "python's draws": (lambda net, x, h: h * random.random(), "Python's or NumPy's"),
    "numpy's draws": (lambda net, x, h: h * np.random.rand(), "Python's or NumPy's"),
    "another default dtype": (other_default, "forward changes the default dtype"),
    "hook": (hooked, "forward hangs on hooks (register_hook)"),
    "freezing": (freezing, "forward sets which parameters are trained"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, examples):
    inner, why = REFUSED[name]
    assert why in refused(Net(inner), examples)


# --- values that nobody sees read: they show in comparison with the module ------------------------


def of_tensors(net, x, h):
    """Torch reads them without an operator."""
    mean = x.mean()
    return h * torch.tensor([mean, mean]).sum()


def kept_first(net, x, h):
    if net.mean is None:
        net.mean = x.mean(0)
    return h * (1 + net.mean.sum())


def kept_outside(net, x, h):
    return h + KEPT.setdefault("mean", x.mean())


def in_a_thread(net, x, h):
    found = []
    thread = threading.Thread(target=lambda: found.append(float(x.mean())))
    thread.start()
    thread.join()
    return h * found[0]


@pytest.mark.parametrize("inner", [of_tensors, kept_first, kept_outside, in_a_thread])
def test_a_mean_of_the_batch_is_not_baked_in(inner, examples):
    """No order of that batch would show it: a module is tried on other samples."""
    try:
        assert "the loss" in refused(Net(inner, mean=None), examples)  # differs in one of two ways
    finally:
        KEPT.clear()


def test_a_running_mean_in_an_attribute_is_refused(examples):
    def running(net, x, h):
        net.average = net.average * 0.99 + h.detach().mean(0) * 0.01
        return h + net.average

    why = refused(Net(running, average=torch.zeros(8)), examples)
    assert "reads the tensor in attribute `average` of the module and puts another one there" in why


def test_what_is_not_the_same_twice_is_refused(examples):
    ticks = iter(range(1, 1000))
    why = refused(Net(lambda net, x, h: h * next(ticks) / 100), examples)
    assert "is another one when the module is called again" in why


# --- what was known of one model is not believed of the next --------------------------------------


class Evaluated(Net):
    """Does something of its own in evaluation alone."""

    def __init__(self, number):
        super().__init__(lambda net, x, h: h)
        self.number = number

    def forward(self, x):
        if self.training:
            return super().forward(x)
        return super().forward(x) * torch.tensor([self.number()])


def numbers():
    """Functions of one name: of the same number, of Python's stream, of calls."""
    count = iter(range(1000))
    return [lambda: 0.5, lambda: random.random(), lambda: float(next(count))]


@pytest.mark.parametrize("which", [1, 2])
def test_a_kind_says_nothing_of_what_python_moves(which, examples):
    capturer = Capturer(["recording"])
    assert recorded(Evaluated(numbers()[0]), examples, capturer).graph is not None
    assert refused(Evaluated(numbers()[which]), examples, capturer)


def test_one_models_failure_is_not_the_nexts(examples):
    capturer = Capturer(["recording"])
    assert refused(Net(caught), examples, capturer)
    fits = Net(lambda net, x, h: h + h[torch.arange(3), torch.arange(3)].sum())
    assert recorded(fits, examples, capturer).graph is not None


# --- what is recorded -----------------------------------------------------------------------------


def test_constants_are_named_and_each_branch_has_its_own_calls(examples):
    def inner(net, x, h):
        return h * net.scale if len(x) == 16 else h + torch.tensor([1.0])

    graph = recorded(Net(inner, scale=torch.linspace(0, 1, 8)), examples).graph
    for program, name in (("train/16", "c_scale"), ("train/8", "c_lifted_tensor_0")):
        (constant,) = (n for n in restrict(graph, program=program).nodes if n.op == "cgo.constant")
        assert constant.name == f"m/{program}/{name}"


# --- the process ----------------------------------------------------------------------------------


def world():
    return (
        {name: id(value) for name, value in vars(Tensor).items()},
        bytes(torch.get_rng_state().numpy()),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def leaving_it_off(net, x, h):
    torch.randn(3), random.random(), np.random.rand()
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("inner", [lambda net, x, h: h, swallowed, leaving_it_off])
def test_nothing_of_the_process_or_the_users_module_changes(inner, examples):
    net, capturer = Net(inner), Capturer(["recording"])
    recorded(Net(lambda net, x, h: h), examples)  # what torch sets up when it is first used
    before, its = world(), copy.deepcopy(net.state_dict())
    with contextlib.suppress(ModelError):
        recorded_alone = cgo.Model(net, data=DATA, training=cgo.TrainingSpec(), model_id="m")
        capturer.capture(recorded_alone, examples)
    assert world() == before
    assert all(torch.equal(value, its[path]) for path, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_captures_in_two_threads_leave_torch_as_it_was(examples):
    """Each puts methods of its own into torch for a while: one after the other."""
    before = {name: id(value) for name, value in vars(Tensor).items()}
    inside = threading.Barrier(2, timeout=0.5)

    def meeting(net, x, h):
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait()
        return h

    captured = []

    def capture():
        captured.append(recorded(Net(meeting), examples))

    threads = [threading.Thread(target=capture, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captured) == 2
    assert inside.broken  # they never met
    assert {name: id(value) for name, value in vars(Tensor).items()} == before
