"""What is kept out of channels-last memory, in every form, and what is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.fused import CPU, Call, Members, T
from torch.utils._python_dispatch import TorchDispatchMode

from cgo.graph import Graph, Node, Output, Ref, TensorType
from cgo.runtime.layouts import contiguous
from cgo.runtime.lower import lower
from cgo.runtime.unsafe import needs_contiguous

ROOT = Path(__file__).parents[2]
WEIGHT = {
    "aten.conv2d": (8, 4, 1, 1),
    "aten.conv1d": (8, 4, 1),
    "aten.conv_transpose2d": (8, 4, 1, 1),
}


def asked(
    operator="aten.conv2d", weight=(8, 4, 1, 1), stride=2, dilation=1, groups=1, dtype="float32"
):
    dims = len(weight) - 2
    arguments = {
        "weight": SimpleNamespace(shape=weight),
        "stride": (stride,) * dims,
        "dilation": (dilation,) * dims,
    }
    return needs_contiguous(operator, arguments, groups, dtype)


@pytest.mark.parametrize("operator", ["aten.conv1d", "aten.conv2d", "aten.conv_transpose2d"])
@pytest.mark.parametrize("channels", [1, 7, 15])
def test_pixels_of_few_channels_with_a_stride_are_kept_off(operator, channels):
    weight = (8, channels, *WEIGHT[operator][2:])
    assert asked(operator, weight)
    assert asked(operator, weight, dtype="bfloat16")
    assert not asked(operator, (8, 16, *weight[2:]))
    assert not asked(operator, weight, stride=1)
    assert not asked(operator, weight, groups=3)
    assert not asked(operator, (*weight[:2], *(3 for _ in weight[2:])))


def test_one_stride_suffices():
    arguments = {
        "weight": SimpleNamespace(shape=(8, 4, 1, 1)),
        "stride": (1, 2),
        "dilation": (1, 1),
    }
    assert needs_contiguous("aten.conv2d", arguments, 1, "float32")


@pytest.mark.parametrize(
    ("channels", "groups", "kept_off"),
    [(8, 1, False), (16, 1, False), (17, 1, True), (32, 1, False), (33, 1, True),
     (8, 2, True), (1, 8, True), (16, 2, False)],
)  # fmt: skip
def test_holes_in_half_precision_are_kept_off_unless_channels_fill_blocks(
    channels, groups, kept_off
):
    given = {"weight": (8, channels, 3, 3), "stride": 1, "dilation": 2, "groups": groups}
    assert asked(**given, dtype="bfloat16") is kept_off
    assert not asked(**given, dtype="float32")
    assert not asked(**given | {"dilation": 1}, dtype="bfloat16")
    assert not asked(**given | {"weight": (8, channels, 1, 1)}, dtype="bfloat16")


def test_the_rule_covers_all_that_the_search_has_found():
    """But for what is wrong in both formats, where no format helps."""
    found = json.loads((ROOT / "benchmarks" / "results" / "onednn_layouts.json").read_text())
    assert len(found["instruction_sets"]) >= 3
    assert sum(figures["wrong"] for figures in found["instruction_sets"].values()) > 100
    for isa, figures in found["instruction_sets"].items():
        assert figures["cases"] > 4000
        formats: dict[str, set[str]] = {}
        for case in figures["left"]:
            key = json.dumps({k: v for k, v in case.items() if k != "format"})
            formats.setdefault(key, set()).add(case["format"])
        assert all(len(where) == 2 for where in formats.values()), isa


class Formats(TorchDispatchMode):
    """Strides of what convolutions read, forward and backward."""

    def __init__(self):
        super().__init__()
        self.last = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("convolution", "convolution_backward"):
            x = args[0] if name == "convolution" else args[1]
            self.last.setdefault(name, []).append(last_by_strides(x))
        return function(*args, **(kwargs or {}))


def last_by_strides(value):
    """As torch decides, also where one channel would make both formats one."""
    return value.stride(1) == 1 and value.stride(-1) == value.shape[1]


def formats_of(call, members):
    """Whether the gradient reads channels last; values are those of plain torch."""
    with Formats() as seen:
        found, decisions = Members(call, members).fused()
    assert members == 1 or decisions[-1].form == call.form
    for ours, theirs in zip(found, Members(call, members).alone()):
        for row, other in zip(ours, theirs):
            for value, wanted in zip(row, other):
                torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)
    (last,) = seen.last["convolution_backward"]  # forward, `Members` calls the plain operator, too
    return last


X = T((2, 4, 6, 6))


def pixels(weight=(3, 4, 1, 1), x=X, stride=(2, 2), op="conv2d.default", form="grouped", **given):
    return Call(f"aten.{op}", (x, T(weight), None, stride), f"{form} convolution", **given)


@pytest.mark.parametrize(
    ("call", "members"),
    [
        (pixels(), 1),
        (pixels(x=T((2, 1, 6, 6)), weight=(3, 1, 1, 1)), 1),
        (pixels(form="wide", share=(0,)), 3),
        (pixels(form="folded", share=(1,)), 3),
        (pixels(op="conv_transpose2d.input", weight=(4, 3, 1, 1)), 1),
        (pixels(stride=(1, 2)), 1),
    ],
    ids=["single", "one channel", "wide", "folded", "transposed", "one axis"],
)
def test_what_is_unsafe_is_contiguous_in_every_form(call, members):
    assert not formats_of(call, members)


@pytest.mark.parametrize(
    ("call", "members"),
    [
        (pixels(weight=(3, 4, 3, 3)), 1),
        (pixels(), 3),
        (pixels(x=T((2, 16, 6, 6)), weight=(3, 16, 1, 1)), 1),
        (pixels(x=T((2, 16, 6, 6)), weight=(3, 16, 1, 1), form="wide", share=(0,)), 3),
        (pixels(weight=(3, 4, 3, 3), form="folded", share=(1,)), 3),
    ],
    ids=["single 3x3", "several members side by side", "single", "wide", "folded"],
)
def test_others_have_channels_last(call, members):
    assert formats_of(call, members)


def test_what_follows_an_unsafe_convolution_has_channels_last_again():
    """3x3, 1x1 with a stride, 3x3: gradients too."""
    types = [TensorType("float32", s) for s in ((2, 4, 8, 8), (4, 4, 3, 3), (4, 4, 1, 1))]
    owner = frozenset({"m"})
    nodes = [
        Node(f"m/{name}", "cgo.buffer", (), (("model", "m"), ("path", name)), (type_,), owner)
        for name, type_ in zip(("x", "w3", "w1"), types)
    ]
    before = "m/x"
    for number, (weight, stride, padding, size) in enumerate(
        (("m/w3", 1, 1, 8), ("m/w1", 2, 0, 4), ("m/w3", 1, 1, 4))
    ):
        args = (Ref(before), Ref(weight), None, (stride,) * 2, (padding,) * 2)
        type_ = TensorType("float32", (2, 4, size, size))
        before = f"m/train/2/c{number}"
        nodes.append(Node(before, "aten.conv2d.default", args, (), (type_,), owner))
    graph = Graph(tuple(nodes), (Output("m", "train/2", "update", "y", Ref(before)),))
    lowered = lower(graph, "train/2", CPU)
    values = {
        f"m/{name}": torch.randn(type_.shape, requires_grad=True)
        for name, type_ in zip(("x", "w3", "w1"), types)
    }
    with Formats() as seen:
        (result,) = lowered([values[source.nodes[0].name] for source in lowered.sources])
        result.backward(torch.ones_like(result))
    assert seen.last["convolution"] == [True, False, True]
    assert seen.last["convolution_backward"] == [True, False, True]
    assert last_by_strides(result)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize(("channels", "last"), [(24, False), (16, True)])
def test_holes_are_contiguous_under_autocast(autocast, channels, last):
    owner = frozenset({"m"})
    shapes = (2, channels, 8, 8), (4, channels, 3, 3)
    nodes = [
        Node(f"m/{name}", "cgo.buffer", (), (("model", "m"), ("path", name)),
             (TensorType("float32", shape),), owner)
        for name, shape in zip("xw", shapes)
    ]  # fmt: skip
    args = (Ref("m/x"), Ref("m/w"), None, (1, 1), (2, 2), (2, 2))
    type_ = TensorType(autocast or "float32", (2, 4, 8, 8))
    name = "m/train/2/c"
    nodes.append(Node(name, "aten.conv2d.default", args, (), (type_,), owner, autocast=autocast))
    graph = Graph(tuple(nodes), (Output("m", "train/2", "update", "y", Ref(name)),))
    lowered = lower(graph, "train/2", CPU)
    values = {f"m/{n}": torch.randn(s) for n, s in zip("xw", shapes)}
    with Formats() as seen:
        lowered([values[source.nodes[0].name] for source in lowered.sources])
    assert seen.last["convolution"] == [last or autocast is None]


@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 4), (2, 3, 1, 1), (2, 3, 4, 4), (2, 1, 5), (0, 3, 4, 4)]
)
def test_contiguous_means_torchs_own_strides(shape):
    value = torch.rand(shape)
    moved = value.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    found = contiguous(moved.requires_grad_())
    assert found.stride() == torch.empty(shape).stride()
    assert torch.equal(found, value)
    found.sum().backward()
    assert torch.equal(moved.grad, torch.ones(shape))


# --- a whole trial ------------------------------------------------------------------------------


def narrow_trial(folder, **env):
    """Lines of `support/narrow_trial.py`, with oneDNN as on a processor without AVX-512."""
    script = ROOT / "tests" / "support" / "narrow_trial.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", **env},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.long
def test_narrow_residual_networks_train_as_alone(tmp_path):
    """Where these ran with channels last, the process died of a corrupted heap."""
    guard = {}
    if shutil.which("cc") and sys.platform == "linux":
        library = tmp_path / "guarded.so"
        source = ROOT / "benchmarks" / "guarded_malloc.c"
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-lpthread"]
        subprocess.run(command, check=True)
        guard = {"LD_PRELOAD": str(library)}
    *models, damage = narrow_trial(tmp_path / "trial", **guard)
    assert damage == ["damage", "0" if guard else "unknown"]
    assert len(models) == 8
    for name, losses, weights in models:
        # float32, behind batch norms; the convolutions alone differ by 1e-7.
        assert float(losses) < 1e-3, name
        assert float(weights) < 1e-2, name
