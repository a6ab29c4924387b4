"""What is known of one recording is believed of those that differ from it in nothing but sizes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cgo
from cgo.capture.kinds import Kinds, skeleton
from cgo.capture.record import record


class Net(nn.Module):
    """One thing is other in each of its variants."""

    def __init__(self, width=8, act=torch.relu, factor=0.5, offset=1.0, p=0.1, frozen=False):
        super().__init__()
        self.body, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        self.act, self.factor, self.offset, self.p = act, factor, offset, p
        self.head.bias.requires_grad_(not frozen)

    def forward(self, x):
        h = self.act(self.norm(self.body(x)))
        h = F.dropout(h * self.factor, self.p, self.training) + torch.tensor([self.offset])
        return self.head(h.view(len(x), -1))


class Other(Net):
    """The same calls, of other code."""


def recording(net=None, size=16, split="train", **training):
    """What was recorded, of what, how it is trained, and for which split."""
    leaves = {"input": torch.randn(size, 6), "target": torch.zeros(size, dtype=torch.int64)}
    if training.get("loss") == "mse_loss":
        leaves["target"] = torch.randn(size, 3)
    net, spec = net or Net(), cgo.TrainingSpec(**training)
    net = net.double() if spec.precision == "float64" else net
    return record(net, spec, f"{split}/{size}", leaves), net, spec, split


def believed(learned, asked):
    kinds = Kinds()
    assert not kinds.knows(*learned)
    kinds.learn(*learned)
    assert kinds.knows(*learned)
    return kinds.knows(*asked)


@pytest.mark.parametrize("width", [8, 9, 64])
@pytest.mark.parametrize("size", [16, 5])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_widths_and_batch_sizes_are_one_kind(width, size, split):
    known, found = recording(split=split), recording(Net(width), size, split)
    assert believed(known, found)
    assert skeleton(known[0]) == skeleton(found[0])


def _hooked():
    net = Net()
    net.head.register_full_backward_hook(lambda *_: None)
    return net


def _ungraded(h):
    with torch.no_grad():
        return torch.relu(h)


#: Two recordings of other kinds each.
CALLS = {
    "an operator": (lambda: recording(), lambda: recording(Net(act=torch.tanh))),
    "a factor": (lambda: recording(), lambda: recording(Net(factor=0.25))),
    "a whole factor": (
        lambda: recording(Net(factor=1.0)),
        lambda: recording(Net(factor=1)),
    ),
    "a sign": (lambda: recording(Net(factor=0.0)), lambda: recording(Net(factor=-0.0))),
    "a constant": (lambda: recording(), lambda: recording(Net(offset=2.0))),
    "a rate": (lambda: recording(), lambda: recording(Net(p=0.2))),
    "what is trained": (lambda: recording(), lambda: recording(Net(frozen=True))),
    "no gradients": (lambda: recording(), lambda: recording(Net(act=_ungraded))),
    "modes": (lambda: recording(), lambda: recording(Net().eval())),
    "precision": (lambda: recording(), lambda: recording(precision="float64")),
    "the loss": (lambda: recording(), lambda: recording(loss="mse_loss")),
}
CODE = {
    "the class": (lambda: recording(), lambda: recording(Other())),
    "the split": (lambda: recording(), lambda: recording(split="validation")),
    "autocast": (lambda: recording(), lambda: recording(precision="bfloat16")),
    "the loss's code": (lambda: recording(), lambda: recording(loss="support.losses:smoothed")),
    "hooks": (lambda: recording(), lambda: recording(_hooked())),
}


@pytest.mark.parametrize("name", [*CALLS, *CODE])
def test_anything_else_is_another_kind(name):
    one, other = (make() for make in (CALLS | CODE)[name])
    assert not believed(one, other)
    assert not believed(other, one)


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_have_another_skeleton(name):
    one, other = (skeleton(make()[0]) for make in CALLS[name])
    assert one != other


def test_what_is_read_by_the_same_calls_makes_another_skeleton():
    """Kinds know calls one by one; a skeleton has what they are given as well."""

    class Swapped(Net):
        def forward(self, x):
            one, other = self.body(x), self.body(x)
            return self.head(one.relu() + (other if self.p else one))

    one, other = recording(Swapped(p=0.0)), recording(Swapped(p=0.1))
    assert believed(one, other)
    assert skeleton(one[0]) != skeleton(other[0])
