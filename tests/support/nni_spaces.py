"""A small NNI model space on digits, with choices that fail on purpose."""

import nni
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableLinear
from nni.nas.space import SimplifiedModelSpace
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


class Raises(nn.Module):
    """Cannot be run at all."""

    def forward(self, x):
        raise RuntimeError("this candidate cannot be run")


class Diverges(nn.Module):
    """Gives NaN for any input."""

    def forward(self, x):
        return x * float("nan")


class DigitsSpace(ModelSpace):
    """A perceptron: width and activation are searched."""

    def __init__(self, widths=(8, 12, 16, 24), faulty=False):
        super().__init__()
        self.first = MutableLinear(64, nni.choice("width", list(widths)))
        choices = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "gelu": nn.GELU(), "elu": nn.ELU()}
        if faulty:
            choices |= {"raises": Raises(), "nan": Diverges()}
        self.act = LayerChoice(choices, label="act")
        self.last = MutableLinear(nni.choice("width", list(widths)), 10)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def digits(samples=256):
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    return TensorDataset(x[:samples], y[:samples]), TensorDataset(x[-64:], y[-64:])


def evaluator(learning_rate=0.01, epochs=2, **given):
    train, validation = digits()
    return Classification(
        learning_rate=learning_rate,
        train_dataloaders=DataLoader(train, batch_size=32, shuffle=True),
        val_dataloaders=DataLoader(validation, batch_size=32),
        max_epochs=epochs,
        num_classes=10,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **given,
    )


def space(kind=SimplifiedModelSpace, **given):
    """An executable space of the digits."""
    rate = nni.choice("lr", [0.003, 0.01, 0.03])
    return kind.from_model(DigitsSpace(**given), evaluator(rate))


def graph_space():
    """A space in NNI's graph format, which takes its own traced layers only."""
    from nni.nas.nn.pytorch import layers
    from nni.nas.space.pytorch import PytorchGraphModelSpace

    class Net(ModelSpace):
        def __init__(self):
            super().__init__()
            self.first = layers.Linear(64, 8)
            self.act = LayerChoice([layers.ReLU(), layers.Tanh(), layers.GELU()], label="act")
            self.last = layers.Linear(8, 10)

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    return PytorchGraphModelSpace.from_model(Net(), evaluator(), torch.zeros(2, 64))
