"""The networks of the GPU benchmarks (cgo/bench/networks.py)."""

import pytest
import torch

from cgo.bench.networks import Encoder, Headed, resnet18


def test_the_full_width_has_the_parameters_of_the_small_image_resnet18():
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: resnet18(2, 1), (3, 3, 8, 8)),
        (lambda: Encoder(8, 1), (3, 5, 32)),
        (lambda: Headed(4, 2, 1), (3, 3, 8, 8)),
    ],
)
def test_logits_of_ten_classes(net, shape):
    assert net()(torch.randn(shape)).shape == (3, 10)


def test_the_trunk_is_one_for_all_models_frozen_and_takes_no_random_numbers():
    torch.manual_seed(0)
    first = Headed(4, 2, 1)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.nn.Linear(16, 4), torch.nn.Linear(4, 10)  # what a head draws
    assert after == torch.rand(1)
    torch.manual_seed(5)
    second = Headed(8, 2, 1)
    for a, b in zip(first.trunk.parameters(), second.trunk.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert not any(part.training for part in first.trunk.modules())
    assert first.head.training
