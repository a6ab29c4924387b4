"""What `nni_search.py` searches: in a module of its own, as trials import it."""

from __future__ import annotations

import nni
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.hub.pytorch import NasBench201
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset


@nni.trace
class Digits(Dataset):  # type: ignore[type-arg]
    """Handwritten digits as images of three equal channels, (3, 8, 8) in [0, 1]."""

    def __init__(self, train: bool = True) -> None:
        x, y = load_digits(return_X_y=True)
        images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
        part = slice(0, 1024) if train else slice(1024, 1536)
        self._data = TensorDataset(images[part], torch.tensor(y)[part])

    def __len__(self) -> int:
        """Samples."""
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Image and class."""
        return self._data[index]


def digits_space() -> NasBench201:
    """A NAS-Bench-201 space of one narrow cell a stage."""
    return NasBench201(stem_out_channels=8, num_modules_per_stack=1, num_labels=10)


def digits_evaluator(epochs: int) -> Classification:
    """NNI's own evaluator; its learning rate is searched, too."""
    return Classification(
        learning_rate=nni.choice("lr", [0.001, 0.003, 0.01]),
        train_dataloaders=DataLoader(Digits(train=True), batch_size=64, shuffle=True),
        val_dataloaders=DataLoader(Digits(train=False), batch_size=64),
        max_epochs=epochs,
        num_classes=10,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
