"""What a program draws: by model, operator, step and element, whoever else is in the program."""

import pytest
import torch
from support import keyed

from cgo.graph import Graph, Node, TensorType
from cgo.runtime.builder import Source
from cgo.runtime.keyed_streams import KeyedDraws, Streams, are_keyed
from cgo.runtime.triton_kernels import installed

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "wanted", "found"),
    [(CPU, None, False), (CUDA, None, True), (CPU, "keyed", True), (CUDA, "generator", False)],
)
def test_on_a_gpu_or_where_asked_for(device, wanted, found):
    assert are_keyed(device, wanted) is found


class State:
    def __init__(self, **steps):
        self.steps = {"train": 0, "validation": 0} | steps


class Member:
    """What streams read of a member."""

    def __init__(self, seed, **steps):
        self.state, self.entry = State(**steps), self
        self.seed = seed


def node(model, order, shape=(5, 3), split="train", stride=None, dtype="float32", **kwargs):
    given = {"distribution": "dropout", "p": 0.4, "model": model, "order": order} | kwargs
    if given["distribution"] != "dropout":
        del given["p"]
    type_ = TensorType(dtype, shape, stride)
    name = f"{model}/{split}/8/random_{order}"
    return Node(name, "cgo.random", (), tuple(sorted(given.items())), (type_,), frozenset({model}))


def streams(members, nodes, kernels=None):
    return Streams(members, Graph(tuple(nodes), ()), CPU, kernels)


def mask(seed, order, step, shape, split="train", p=0.4, dtype=torch.float32):
    key = keyed.key_of(seed, order, ("train", "validation").index(split))
    count = torch.Size(shape).numel()
    kept = torch.from_numpy(keyed.bernoulli(key, step, count, 1 - p)).reshape(shape)
    return kept.to(dtype) * keyed.as_dtype(1 / (1 - p), dtype)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.skipif(
    not installed(), reason="Triton is not installed"))])  # fmt: skip
def test_each_lane_gets_the_numbers_of_its_own_model(kernels):
    members = {"a": Member(3), "b": Member(4, train=7), "c": Member(5)}
    lanes = [node("a", 1), node("b", 1)]
    single = node("c", 0, (2, 9), dtype="float64")
    whole = streams(members, [*lanes, single], kernels)
    draws = KeyedDraws(
        [Source(tuple(lanes), packed=True), Source((single,))], whole, "abc", "train"
    )
    for step in range(2):
        found = draws()
        packed = found[lanes[0].name, lanes[1].name]
        assert torch.equal(packed[0], mask(3, 1, step, (5, 3)))
        assert torch.equal(packed[1], mask(4, 1, 7 + step, (5, 3)))
        alone = mask(5, 0, step, (2, 9), dtype=torch.float64)
        assert torch.equal(found[single.name,], alone)
    whole.store()
    assert [m.state.steps["train"] for m in members.values()] == [2, 9, 2]
    assert members["b"].state.steps["validation"] == 0


def test_evaluation_draws_from_streams_of_its_own_and_counts_for_itself():
    members = {"a": Member(3)}
    nodes = [node("a", 0), node("a", 0, split="validation")]
    whole = streams(members, nodes)
    training = KeyedDraws([Source((nodes[0],))], whole, "a", "train")
    evaluation = KeyedDraws([Source((nodes[1],))], whole, "a", "validation")
    training()
    assert torch.equal(evaluation()[nodes[1].name,], mask(3, 0, 0, (5, 3), "validation"))
    assert torch.equal(training()[nodes[0].name,], mask(3, 0, 1, (5, 3)))
    whole.store()
    assert members["a"].state.steps == {"train": 2, "validation": 1}


def test_elements_are_counted_in_logical_order_whatever_the_layout():
    last = node("a", 0, (2, 3, 4, 5), stride=(60, 1, 15, 3))
    draws = KeyedDraws([Source((last,))], streams({"a": Member(3)}, [last]), "a", "train")
    found = draws()[last.name,]
    assert found.stride() == (60, 1, 15, 3)
    assert torch.equal(found, mask(3, 0, 0, (2, 3, 4, 5)))


def test_a_program_that_draws_nothing_counts_the_steps_of_models_that_do_elsewhere():
    members = {"a": Member(3), "b": Member(4)}
    drawn = node("a", 0)
    whole = streams(members, [drawn])
    KeyedDraws([], whole, ["a"], "train")()
    KeyedDraws([], whole, ["b"], "train")()
    assert torch.equal(
        KeyedDraws([Source((drawn,))], whole, ["a"], "train")()[drawn.name,], mask(3, 0, 1, (5, 3))
    )
    whole.store()
    assert [m.state.steps["train"] for m in members.values()] == [2, 0]


def test_empty_tensors_are_drawn_as_well():
    empty = node("a", 0, (0, 3))
    draws = KeyedDraws([Source((empty,))], streams({"a": Member(3)}, [empty]), "a", "train")
    assert draws()[empty.name,].shape == (0, 3)
