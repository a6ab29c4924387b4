"""What a capture is allowed to differ by, and what not."""

import pytest
import torch
from torch import nn

import cgo
from cgo.capture import Capturer, Examples
from cgo.capture.compare import beyond, gaps
from cgo.capture.disturb import disturb, tensors_of
from cgo.capture.validate import validate
from cgo.errors import CaptureError
from cgo.zoo import random_cells

DATA = cgo.DataSpec(
    "cgo.bench.families:random_data",
    {"shape": [3, 16, 16], "batch_size": 16, "batches": 2},
    batch_size=16,
)


class NormedBias(nn.Module):
    """A bias whose true gradient is zero: only rounding is left of it."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=True)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)
        self.scale = scale

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3))) * self.scale


def model(module, precision="float32", **kwargs):
    training = cgo.TrainingSpec(precision=precision)
    return cgo.Model(module, kwargs, data=DATA, training=training, model_id="m")


@pytest.fixture(scope="module")
def examples():
    return Examples.of(DATA)


def programs(examples, module, precision="float32"):
    capturer = Capturer()
    given = cgo.Model(module, data=DATA, training=cgo.TrainingSpec(precision=precision))
    template, _ = capturer._template(given, module, None, examples)
    return template.programs


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_gradients_that_are_nothing_but_rounding_are_no_difference(examples, precision):
    torch.manual_seed(0)
    net = NormedBias()
    net = net.double() if precision == "float64" else net
    assert programs(examples, net, precision)


@pytest.mark.long
def test_deep_cell_networks_are_captured_in_single_precision(examples):
    for seed, edges in enumerate(random_cells(4)):
        given = model("cgo.zoo:nas_bench_201", edges=edges, cells=5, width=8, inputs=3)
        given.seed = seed
        assert Capturer().capture(given, examples).graph is not None


@pytest.mark.parametrize("scale", [1.0005, 0.999])
def test_another_result_is_refused_however_small_the_difference(examples, scale):
    torch.manual_seed(0)
    net = NormedBias()
    found = programs(examples, net)
    other = NormedBias(scale)
    other.load_state_dict(net.state_dict())
    for name, program in found.items():
        with pytest.raises(CaptureError, match=f"differ in {name}: .* by .* relative"):
            validate(program, name, other, cgo.TrainingSpec(), examples.batches[name])


def test_a_module_that_runs_at_no_other_weights_proves_nothing(examples):
    class Exact(NormedBias):
        def forward(self, x):
            if not torch.equal(self.head.bias.detach(), torch.zeros(10)):
                raise ValueError("zeros, please")
            return super().forward(x)

    net = NormedBias()
    nn.init.zeros_(net.head.bias)
    found = programs(examples, net)["train/16"]
    exact = Exact()
    exact.load_state_dict(net.state_dict())
    leaves = examples.batches["train/16"]
    validate(found, "train/16", exact, cgo.TrainingSpec(), leaves)  # at its own state
    with pytest.raises(CaptureError, match="does not run at other values of weights: ValueError"):
        validate(found, "train/16", exact, cgo.TrainingSpec(), leaves, proven=True)


def test_disturbed_states_keep_signs_of_variances_and_indices():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    net.register_buffer("places", torch.arange(3))
    net.register_buffer("mask", torch.tensor([0.0, float("-inf"), 1.0]))
    before = {path: tensor.clone() for path, tensor in tensors_of(net).items()}
    disturb(net, 0.3, seed=1)
    after = tensors_of(net)
    assert (after["0.running_var"] > 0).all()
    assert after["0.num_batches_tracked"] == 7
    assert torch.equal(after["places"], before["places"])
    assert torch.equal(after["mask"].isinf(), before["mask"].isinf())
    for path in ("0.weight", "0.bias", "1.weight", "0.running_mean", "0.running_var"):
        assert not torch.isclose(after[path], before[path]).any(), path
    again = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    again.load_state_dict({k: v for k, v in before.items() if k not in ("places", "mask")})
    disturb(again, 0.3, seed=1)
    assert torch.equal(again[1].weight, net[1].weight)


def test_gaps_are_relative_and_nan_is_one():
    right = {"a": torch.tensor([1.0, 100.0]), "the gradient of w": torch.tensor([1e-9])}
    left = {"a": torch.tensor([1.5, 100.0]), "the gradient of w": torch.tensor([2e-9])}
    apart = gaps(right, left, "train/1")
    assert apart["a"] == pytest.approx(0.005)
    assert apart["the gradient of w"] == pytest.approx(1.0)  # no other gradient is larger
    big = {"the gradient of v": torch.tensor([1.0])}
    assert gaps(right | big, left | big, "train/1")["the gradient of w"] < 1e-5
    nan = gaps({"a": torch.tensor([1.0])}, {"a": torch.tensor([float("nan")])}, "train/1")
    assert beyond(nan, {"a": 1e9}) == "a"


def test_other_samples_of_one_shape():
    """They come from the batches that are alike, or are the first half of the batch itself."""
    a, b = torch.arange(4.0)[:, None], 10 + torch.arange(2.0)[:, None]
    odd = torch.zeros(3, 5)
    found = Examples(DATA, {n: {"input": t} for n, t in {"a": a, "b": b, "odd": odd}.items()})
    assert found.others["a"]["input"].flatten().tolist() == [10, 10, 11, 0]
    assert found.others["b"]["input"].flatten().tolist() == [0, 1]
    alone = Examples(DATA, {"a": {"input": a}})
    assert alone.others["a"]["input"].flatten().tolist() == [0, 0, 1, 1]
