"""Loss functions named by import path."""

from torch.nn import functional as F


def per_sample(output, target):
    """No scalar: refused."""
    return F.cross_entropy(output, target, reduction="none")


def smoothed(output, target):
    return F.cross_entropy(output, target, label_smoothing=0.1)
