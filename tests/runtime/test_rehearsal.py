"""What fake steps hold is what true steps hold."""

import pytest
import torch
from hypothesis import given, settings
from support.recipes import RECIPES, build
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cgo.graph import Graph, Node, Output, Ref, TensorType, prune, restrict
from cgo.model import TrainingSpec
from cgo.passes.batch_operators import BatchOperators
from cgo.passes.merge import merge
from cgo.runtime.lower import lower
from cgo.runtime.packing import Pack
from cgo.runtime.rehearsal import Held, LiveBytes, rehearse_program, rehearse_update
from cgo.runtime.triton_kernels import usable

CPU = torch.device("cpu")
F32 = TensorType("float32", (10, 10))  # 400 bytes


def learns(source):
    return source.nodes[0].op == "cgo.parameter" and source.nodes[0].keyword("trainable") is True


# --- counting -------------------------------------------------------------------------------------


def test_views_and_results_in_place_are_counted_once_and_what_went_not_at_all():
    live = LiveBytes("cpu")
    with live:
        x = torch.zeros(10)
        y = x.view(2, 5).t().add_(1)
        assert (live.now, live.highest) == (40, 40)
        z = y + 1
        assert live.now == 80
        del x, z
        assert (live.now, live.highest) == (40, 80)
        del y
    assert (live.now, live.highest) == (0, 80)


def test_what_was_there_before_is_counted_on_request():
    seen, left_out = torch.zeros(10), torch.zeros(10)
    live = LiveBytes("cpu")
    live.hold([seen], counted=True)
    live.hold([left_out], counted=False)
    with live:
        seen.add_(1)
        left_out.add_(1)
    assert live.now == 40
    del seen, left_out
    assert live.now == 0


def test_blocks_on_a_gpu_are_rounded_up():
    live = LiveBytes("cuda")
    with live:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    assert live.now == 512 + 512 + 1024
    del kept


# --- programs -------------------------------------------------------------------------------------


def call(name, op, *args, types=(F32,), **kwargs):
    return Node(name, op, args, tuple(sorted(kwargs.items())), types, frozenset({"m"}))


def chain(op, length):
    """A parameter through a chain of one operator, and the sum of the last as the loss."""
    nodes = [call("v0", "cgo.parameter", model="m", path="w", trainable=True)]
    nodes += [call(f"v{i}", op, Ref(f"v{i - 1}")) for i in range(1, length + 1)]
    scalar = TensorType("float32", ())
    nodes.append(call("loss", "aten.sum.default", Ref(f"v{length}"), types=(scalar,)))
    return Graph(tuple(nodes), (Output("m", "train/4", "loss", "", Ref("loss")),))


def rehearse(graph, device_type="cpu"):
    return rehearse_program(lower(graph, "train/4", CPU), learns, device_type)


def test_what_autograd_keeps_is_counted_and_what_it_does_not_keep_goes():
    # Six results of tanh are kept; at the end of the backward the gradient is there alone. On top:
    # the loss, the gradient of it, and the first two gradients of the backward.
    assert rehearse(chain("aten.tanh.default", 6)) == Held(6 * 400 + 4 + 4 + 400, 400)
    # neg keeps nothing: two results at most are there at one time, as are two gradients.
    assert rehearse(chain("aten.neg.default", 6)) == Held(4 + 4 + 2 * 400, 400)
    assert rehearse(chain("aten.neg.default", 6), "cuda") == Held(512 + 512 + 2 * 512, 512)


def with_loss(graph):
    """The same graph, the sum of each model's trained values as its loss; None without any."""
    nodes, outputs = list(graph.nodes), list(graph.outputs)
    for model in sorted({output.model for output in outputs}):
        last = [n for n in graph.nodes if n.owners == {model} and n.types[0].dtype == "float64"]
        if last:
            name, scalar = f"{model}.loss", TensorType("float64", ())
            nodes.append(
                Node(name, "aten.sum.default", (Ref(last[-1].name),), (), (scalar,), {model})
            )
            outputs.append(Output(model, "train/3", "loss", "", Ref(name)))
    return prune(Graph(tuple(nodes), tuple(outputs)))


def true_step(lowered):
    """The same step on tensors that have elements."""
    values = []
    for source in lowered.sources:
        shape = (len(source.nodes), 3) if source.packed else (3,)
        values.append(torch.ones(shape, dtype=torch.float64).requires_grad_(learns(source)))
    live = LiveBytes("cpu")
    live.hold(values, counted=False)
    with live:
        results = lowered(values)
        losses = [v for v, r in zip(results, lowered.results) if r.outputs[0].role == "loss"]
        del results
        losses = [loss for loss in losses if loss.requires_grad]
        if losses:
            torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
        del losses
    return Held(live.highest, live.now)


@settings(max_examples=40, deadline=None, print_blob=True)
@given(RECIPES)
def test_a_rehearsal_holds_what_the_step_holds(recipes):
    graphs = [build(f"m{index}", *recipe) for index, recipe in enumerate(recipes)]
    graph = BatchOperators()(with_loss(merge(graphs)))
    part = restrict(graph, program="train/3")
    lowered = lower(part, "train/3", CPU)
    assert rehearse_program(lowered, learns) == true_step(lowered)


# --- updates --------------------------------------------------------------------------------------

PLACES = [("a", "w"), ("b", "w")]
TYPES = dict.fromkeys(PLACES, F32)
PACK = Pack(("a.w", "b.w"), tuple(PLACES), trainable=True)


def update(optimizer, device_type="cpu", packs=(PACK,), rates=(0.1, 0.1), kernels=False, **given):
    trainings = {
        model: TrainingSpec(optimizer=optimizer, optimizer_kwargs={"lr": rate}, **given)
        for model, rate in zip("ab", rates)
    }
    return rehearse_update(TYPES, frozenset(PLACES), packs, trainings, device_type, kernels)


SMALL = 100  # bytes of counts, positions and scalars


@pytest.mark.parametrize("packs", [(), (PACK,)])
@pytest.mark.parametrize(
    ("optimizer", "moments"), [("SGD", 0), ("Adam", 2), ("RMSprop", 1), ("Adadelta", 2)]
)
def test_moments_stay(optimizer, moments, packs):
    found = update(optimizer, packs=packs)
    assert 0 <= found.after - moments * 800 <= SMALL


def test_arranging_holds_the_parameters_twice():
    assert 800 <= update("SGD").highest <= 800 + SMALL
    # Then two moments, the second of which is made of lanes that are still there.
    assert 4 * 800 - 400 <= update("Adam").highest <= 4 * 800 + SMALL


def test_a_flat_step_holds_a_copy_of_the_gradients_and_vectors_of_numbers():
    by_kernels, flat = update("SGD", "cuda"), update("RMSprop", "cuda")
    block = 1024  # of 800 bytes
    assert flat.highest - flat.after >= block
    # The square average, a vector for each number, and where elements belong: eight bytes each.
    assert flat.after - by_kernels.after >= 4 * block + 1600


@pytest.mark.skipif(not usable(torch.device("cuda")), reason="no Triton")
def test_kernels_of_our_own_need_no_vectors():
    given = {"device_type": "cuda", "kernels": True}
    plain, moved = update("SGD", **given), update("RMSprop", **given)
    assert moved.after - plain.after == 1024  # the square average


def test_clipping_holds_a_scaled_copy_of_the_gradients():
    plain, clipped = update("SGD", "cuda"), update("SGD", "cuda", grad_clip_norm=1.0)
    assert clipped.highest - plain.highest >= 1024


def test_nothing_fake_is_left_behind():
    update("Adam")
    rehearse(chain("aten.tanh.default", 2))
    made = torch.zeros(3) + 1
    assert isinstance(made, Tensor)
    assert not isinstance(made, FakeTensor)
