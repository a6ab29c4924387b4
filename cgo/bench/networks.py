"""Networks of the GPU benchmarks, named by import path; small sizes of each train on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A basic residual block: two convolutions, and a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.around(x))


def resnet_features(width: int = 64, blocks: int = 2, inputs: int = 3) -> nn.Sequential:
    """ResNet-18 for small images, without its last layer: (N, inputs, H, W) to (N, 8 * width).

    Args:
        width: Channels of the first stage; 64 in the paper, 8 at an eighth of the width.
        blocks: Blocks a stage, of four stages; 2 in the paper.
        inputs: Channels of the images.

    Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; for
    images of 32x32 the first convolution is 3x3 and nothing is pooled behind it.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(4):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def resnet18(width: int = 64, blocks: int = 2, inputs: int = 3) -> nn.Module:
    """`resnet_features` with a layer of ten classes."""
    return nn.Sequential(*resnet_features(width, blocks, inputs), nn.Linear(8 * width, 10))


class Encoder(nn.Module):
    """Transformer encoder over (N, T, features): embedding, layers, mean, ten classes.

    Args:
        d: Width; the hidden layer has twice as many units.
        layers: Depth.
        features: Of each token.
        heads: Of attention; they divide `d`.
    """

    def __init__(self, d: int = 64, layers: int = 2, features: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(features, d)
        layer = nn.TransformerEncoderLayer(d, heads, 2 * d, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (N, 10)."""
        out: Tensor = self.head(self.body(self.embed(x)).mean(1))
        return out


class Headed(nn.Module):
    """A trainable head over a frozen ResNet-18 in evaluation mode, the same in every model.

    Args:
        hidden: Units of the head.
        width: Of the trunk, as `resnet_features` takes it.
        blocks: Of the trunk.
    """

    def __init__(self, hidden: int = 64, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # the content of a trunk decides whether it is shared
            self.trunk = resnet_features(width, blocks)
        self.trunk.requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(8 * width, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) images to (N, 10) logits."""
        out: Tensor = self.head(self.trunk(x))
        return out
