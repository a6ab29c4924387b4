"""What work takes at least, from shapes."""

import pytest
import torch

from cgo.graph import Node, Ref, TensorType
from cgo.runtime.device_profile import prior
from cgo.runtime.estimates import is_product, is_view, view_seconds, work_of
from cgo.runtime.precision import tf32

H100 = prior("NVIDIA H100 80GB HBM3", (9, 0), 132)


def made(op, inputs, output, *rest, autocast=None, dtype="float32"):
    names = [Ref(f"i{n}") for n in range(len(inputs))]
    types = {ref: TensorType(dtype, shape) for ref, shape in zip(names, inputs)}
    node = Node("n", op, (*names, *rest), (), (TensorType(dtype, output),),
                frozenset({"m"}), autocast=autocast)  # fmt: skip
    return node, types | {Ref("n"): node.types[0]}


CONVOLUTION = ("aten.conv2d.default", [(8, 3, 16, 16), (32, 3, 3, 3), (32,)], (8, 32, 16, 16))
LINEAR = ("aten.linear.default", [(8, 20), (5, 20)], (8, 5))


@pytest.mark.parametrize(
    ("given", "flops"),
    [
        (CONVOLUTION, 2 * 8 * 32 * 16 * 16 * 3 * 9),
        (LINEAR, 2 * 8 * 5 * 20),
        (("aten.bmm.default", [(4, 8, 20), (4, 20, 5)], (4, 8, 5)), 2 * 4 * 8 * 5 * 20),
        (("aten.addmm.default", [(5,), (8, 20), (20, 5)], (8, 5)), 2 * 8 * 5 * 20),
        (("aten.relu.default", [(8, 20)], (8, 20)), 0),
    ],
)
def test_products_count_their_flops_three_times(given, flops):
    """The backward has two products of the forward's size."""
    assert work_of(*made(*given)).flops == 3 * flops


def test_bytes_are_read_and_written_forward_and_backward():
    work = work_of(*made("aten.relu.default", [(8, 20)], (8, 20)))
    assert work.moved_bytes == 3 * 2 * 8 * 20 * 4
    assert work.launches == 2


def test_fused_members_share_their_launches():
    work = work_of(*made("aten.relu.default", [(8, 20)], (8, 20)))
    fused, apart = (work.seconds(64, H100, fused=fused) for fused in (True, False))
    assert apart > 50 * fused
    large = work_of(*made("aten.relu.default", [(2**24,)], (2**24,)))
    fused, apart = (large.seconds(64, H100, fused=fused) for fused in (True, False))
    assert fused == pytest.approx(apart, rel=0.02)  # all of it is moving


def test_views_cost_nothing_but_in_channels():
    node, types = made("aten.transpose.int", [(8, 20)], (20, 8), 0, 1)
    assert is_view(node)
    assert work_of(node, types).seconds(16, H100, fused=False) == 0
    assert view_seconds([node] * 4, "stacked", types, H100) == 0
    assert view_seconds([node] * 4, "channels", types, H100) > 0
    assert not is_view(made("aten.contiguous.default", [(8, 20)], (8, 20))[0])
    assert not is_view(made(*LINEAR)[0])


def test_products_are_computed_in_what_torch_is_set_to():
    with tf32(False):
        assert work_of(*made(*CONVOLUTION)).precision == "float32"
    with tf32(True):
        assert work_of(*made(*CONVOLUTION)).precision == "tf32"
        assert work_of(*made(*LINEAR)).precision == "tf32"
        assert work_of(*made(*LINEAR, autocast="bfloat16")).precision == "bfloat16"
        assert work_of(*made(*LINEAR, dtype="float64")).precision == "float64"


def test_what_kernels_are_chosen_for_is_told_apart():
    assert is_product(made(*CONVOLUTION)[0])
    assert not is_product(made("aten.relu.default", [(8, 20)], (8, 20))[0])


def test_every_precision_has_a_rate():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        work = work_of(*made(*LINEAR, dtype=str(dtype).removeprefix("torch.")))
        assert work.precision in H100.rates
