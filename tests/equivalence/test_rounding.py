"""Single precision: what is rounding, shown by what plain PyTorch does to itself.

A bias before a batch norm has a true gradient of zero. What is left of it is rounding, which AdamW
blows up to steps of the learning rate; the norm takes the bias out again in training, but its
running mean lags behind, and validation sees that. So any change of the order in which numbers are
added moves the validation loss, that of samples within a batch as well.
"""

import pytest
import torch
from support import nets
from support.merged import KNOWN, Case, Merged, relative
from torch import nn

#: Of one experiment's largest difference to another's: both are a few draws of the same noise.
_FACTOR = 10


class Reordered(nn.Module):
    """The same network over the samples of a batch in another order; its results in theirs."""

    def __init__(self, net, seed):
        super().__init__()
        self.net, self.seed = net, seed

    def forward(self, x):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        return self.net(x[order])[order.argsort()]


def differences(histories, plain, key):
    return [relative(row[key], other[key]) for h in histories for row, other in zip(h, plain)]


def plain_reordered(case, monkeypatch, seed):
    built = nets.cnn
    with monkeypatch.context() as patch:
        patch.setattr(nets, "cnn", lambda **given: Reordered(built(**given), seed))
        return case.alone().history


@pytest.mark.parametrize(
    ("optimizer", "allowed"),
    [("AdamW", 1e-2), ("SGD", 2e-6)],  # the second, where nothing blows rounding up
)
def test_merged_training_differs_as_plain_training_in_another_order(
    optimizer, allowed, tmp_path, monkeypatch
):
    training = {"epochs": 3, "optimizer": optimizer, "optimizer_kwargs": {"lr": 0.01}}
    cases = [Case(f"m{n}", "cnn", seed=n, training=training) for n in range(3)]
    merged = Merged(cases, tmp_path, tuning=KNOWN)
    ours, theirs = [], []
    for case in cases:
        plain = case.alone().history
        ours += differences([merged.history(case.id)], plain, "val_loss")
        others = [plain_reordered(case, monkeypatch, seed) for seed in range(3)]
        theirs += differences(others, plain, "val_loss")
        assert max(differences([merged.history(case.id)], plain, "train_loss")) < 1e-5
    assert max(ours) <= _FACTOR * max(*theirs, 1e-7)
    assert max(ours) <= allowed


def test_dropout_adds_nothing_to_it(tmp_path):
    """Masks are the plain loop's; what differs is rounding, in a network of either kind."""
    training = {"epochs": 3, "optimizer_kwargs": {"lr": 0.05}}
    cases = [Case(f, f, {"dropout": 0.3}, seed=1, training=training) for f in ("cnn", "mlp")]
    merged = Merged(cases, tmp_path, tuning=KNOWN)
    for case in cases:
        plain = case.alone().history
        for key in ("train_loss", "val_loss"):
            assert max(differences([merged.history(case.id)], plain, key)) < 2e-6
