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
