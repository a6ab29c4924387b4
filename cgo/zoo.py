"""Small data sets and networks for the demo, the examples and first steps; all import from here.

The data come with scikit-learn (`pip install 'cgo-engine[demo]'`): nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def digits(validation: int = 360) -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 1,797 handwritten digits.

    Args:
        validation: How many samples, drawn under a fixed seed, are kept for validation.

    Returns:
        (train, validation); inputs float32 (1, 8, 8) from 0 to 1, targets int64 classes 0 to 9.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images / 16.0, dtype=torch.float32).unsqueeze(1)
    classes = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    train, held = order[validation:], order[:validation]
    return TensorDataset(images[train], classes[train]), TensorDataset(images[held], classes[held])


def mlp(widths: Sequence[int] = (64,), dropout: float = 0.0) -> nn.Module:
    """Fully connected network over 8x8 images."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = 64
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 10))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def cnn(width: int = 8, depth: int = 2) -> nn.Module:
    """Plain convolutional network: `depth` layers, the second at stride 2."""
    layers: list[nn.Module] = [_convolution(1, width)]
    for index in range(1, depth):
        layers.append(_convolution(width, width, stride=2 if index == 1 else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


class ResidualBlock(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to the same shape."""
        return torch.relu(x + self.body(x))


def resnet(width: int = 8, blocks: int = 1) -> nn.Module:
    """Residual network over 8x8 images."""
    return nn.Sequential(
        _convolution(1, width),
        *(ResidualBlock(width) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class Stemmed(nn.Module):
    """A head over a frozen stem of fixed cosine filters, the same for every model."""

    def __init__(self, stem: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = stem.requires_grad_(False).eval(), head

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) images to (N, 10) logits."""
        return self.head(self.stem(x))  # type: ignore[no-any-return]


def stemmed(width: int = 32) -> nn.Module:
    """A head of one hidden layer over the frozen 4x4 cosine transform of the image.

    Source: discrete cosine transform (type II), Ahmed, Natarajan and Rao, 1974.
    """
    transform = nn.Conv2d(1, 16, 4, stride=2, padding=1, bias=False)
    with torch.no_grad():
        transform.weight.copy_(_cosines(4).unsqueeze(1))
    features = 16 * 4 * 4
    head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 10))
    return Stemmed(nn.Sequential(transform, nn.Tanh(), nn.Flatten()), head)


def _cosines(size: int) -> Tensor:
    """The size*size products of cosines over a square, (size*size, size, size)."""
    points = torch.arange(size, dtype=torch.float32) + 0.5
    waves = torch.stack([torch.cos(torch.pi / size * k * points) for k in range(size)])
    return torch.einsum("ax,by->abxy", waves, waves).reshape(size * size, size, size)
