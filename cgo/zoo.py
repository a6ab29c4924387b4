"""Small data sets and networks for the demo, the examples and first steps; all import from here.

The data come with scikit-learn (`pip install 'cgo-engine[demo]'`): nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.metadata import distribution

import numpy as np
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
    # As `sklearn.datasets.load_digits` reads them, whose import takes fifty times as long.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")
    images = torch.tensor(rows[:, :64] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    classes = torch.tensor(rows[:, 64], dtype=torch.int64)
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


#: What may stand on an edge of a NAS-Bench-201 cell.
OPERATIONS = ("none", "skip", "conv1", "conv3", "pool")


def random_cells(count: int, seed: int = 0) -> list[str]:
    """That many different cells, drawn uniformly; each as `nas_bench_201` takes it."""
    generator = random.Random(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[" ".join(generator.choice(OPERATIONS) for _ in range(6))] = None
    return list(drawn)


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0)


def _edge(name: str, width: int) -> nn.Module:
    match name:
        case "none":
            return _Zero()
        case "skip":
            return nn.Identity()
        case "conv1" | "conv3":
            return _relu_convolution(width, width, int(name[-1]))
        case "pool":
            return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    raise ValueError(f"no operation {name!r}; there are {', '.join(OPERATIONS)}")


def _relu_convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _Cell(nn.Module):
    """Four nodes; each is the sum of what the edges make of the nodes before it."""

    def __init__(self, edges: Sequence[str], width: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(_edge(name, width) for name in edges)

    def forward(self, x: Tensor) -> Tensor:
        nodes, edges = [x], iter(self.edges)
        for _ in range(3):
            nodes.append(sum(next(edges)(node) for node in nodes))
        return nodes[-1]


class _Halving(nn.Module):
    """A residual block of stride 2 that doubles the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _relu_convolution(width, 2 * width, 3, 2), _relu_convolution(2 * width, 2 * width, 3)
        )
        self.around = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, 2 * width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x) + self.body(x)  # type: ignore[no-any-return]


def nas_bench_201(
    edges: str = "conv3 skip conv1 pool none conv3",
    cells: int = 1,
    width: int = 16,
    inputs: int = 1,
) -> nn.Module:
    """A network of the search space NAS-Bench-201: three stages of equal cells.

    Args:
        edges: The operations on the six edges of a cell, from `OPERATIONS`.
        cells: Cells a stage.
        width: Channels of the first stage.
        inputs: Channels of the images, (N, inputs, H, W) with H and W divisible by 4.

    Source: Dong and Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture
    Search", ICLR 2020; sizes are free here.
    """
    names = edges.split()
    if len(names) != 6:
        raise ValueError(f"a cell has six edges; {edges!r} names {len(names)} operations")
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    ]
    for stage in range(3):
        if stage:
            layers.append(_Halving(width))
            width *= 2
        layers += [_Cell(names, width) for _ in range(cells)]
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(width, 10))
