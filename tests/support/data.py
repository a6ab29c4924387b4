"""Data sources for the equivalence tests, over scikit-learn's digits."""

import torch
from torch.utils.data import Dataset, TensorDataset


def arrays(samples=160, validation=50):
    """((inputs, targets), (inputs, targets)) as whole tensors, for the oracle."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(found.target, dtype=torch.int64)
    end = samples + validation
    return (x[:samples], y[:samples]), (x[samples:end], y[samples:end])


def digits(**kwargs):
    return tuple(TensorDataset(*split) for split in arrays(**kwargs))


def late_class_arrays(at, **kwargs):
    """Digits with a single nine, which is the sample number `at` of the first epoch, by seed 0."""
    (x, y), (more, classes) = arrays(**kwargs)
    y, classes = y.clamp(max=8), classes.clamp(max=8)
    y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[at]] = 9
    return (x, y), (more, classes)


def late_class(**kwargs):
    return tuple(TensorDataset(*split) for split in late_class_arrays(**kwargs))


def regression_arrays(**kwargs):
    """Digits with two float targets: mean and spread of the image."""

    def targets(x):
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)

    return tuple((x, targets(x)) for x, _ in arrays(**kwargs))


def regression(**kwargs):
    return tuple(TensorDataset(*split) for split in regression_arrays(**kwargs))


class Paired(Dataset):
    """Digits with a second input; as a tuple or as a dict."""

    def __init__(self, images, classes, named):
        self.images, self.classes, self.named = images, classes, named

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        image, mark = self.images[index], self.images[index].mean().reshape(1)
        inputs = {"image": image, "mark": mark} if self.named else (image, mark)
        return inputs, self.classes[index]


def paired_arrays(named=False, **kwargs):
    def inputs(x):
        mark = torch.stack([image.mean().reshape(1) for image in x])
        return {"image": x, "mark": mark} if named else (x, mark)

    return tuple((inputs(x), y) for x, y in arrays(**kwargs))


def paired(named=False, **kwargs):
    return tuple(Paired(x, y, named) for x, y in arrays(**kwargs))


def marked_arrays(target="odd", **kwargs):
    """Digits with targets of another kind.

    "odd": (N, 1), 1.0 where the digit is odd. "parts": (N, 4), the bits of the digit. "ignored":
    the digit, but -100 for a third and for the whole last 18, a batch of the validation set.
    """

    def targets(y):
        if target == "odd":
            return (y % 2).float().unsqueeze(1)
        if target == "parts":
            return torch.stack([(y >> bit) & 1 for bit in range(4)], 1).float()
        left_out = (torch.arange(len(y)) % 3 == 1) | (torch.arange(len(y)) >= len(y) - 18)
        return torch.where(left_out, -100, y)

    return tuple((x, targets(y)) for x, y in arrays(**kwargs))


def marked(**kwargs):
    return tuple(TensorDataset(*split) for split in marked_arrays(**kwargs))


def sentences_arrays(samples=64, validation=24, length=7, words=11):
    """Tokens (N, T) and the next one of each, -100 behind some sentences' ends."""
    generator = torch.Generator().manual_seed(3)

    def split(count):
        x = torch.randint(0, words, (count, length), generator=generator)
        ends = torch.randint(1, length + 1, (count, 1), generator=generator)
        return x, torch.where(torch.arange(length) < ends, (2 * x + 1) % words, -100)

    return split(samples), split(validation)


def sentences(**kwargs):
    return tuple(TensorDataset(*split) for split in sentences_arrays(**kwargs))
