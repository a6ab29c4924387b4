"""Loss functions and a scheduler named by import path."""

import torch
from torch.nn import functional as F


def per_sample(output, target):
    """No scalar: refused."""
    return F.cross_entropy(output, target, reduction="none")


def smoothed(output, target):
    return F.cross_entropy(output, target, label_smoothing=0.1)


def weighted(output, target):
    """Classes of different weight, as for unbalanced data."""
    weight = torch.linspace(0.5, 1.5, 10, dtype=output.dtype)
    return F.cross_entropy(output, target, weight=weight)


def wrong_share(output, target):
    """No gradient goes through it."""
    return (output.argmax(1) != target).float().mean()


def squares(output, target):
    return F.mse_loss(output, target)


def by_token(output, target):
    """Of a language model: classes along the last axis, (N, T, V)."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


class Halting(torch.optim.lr_scheduler.LRScheduler):
    """Takes momentum away after three steps, which is another kind of step."""

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        super().step()
        if self.last_epoch == 3:
            for group in self.optimizer.param_groups:
                group["momentum"] = 0.0


class Decaying(torch.optim.lr_scheduler.LRScheduler):
    """Changes weight decay at each step, and no rate."""

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        super().step()
        for group in self.optimizer.param_groups:
            group["weight_decay"] *= 0.9
