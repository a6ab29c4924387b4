"""SGD by rows: equal to `torch.optim.SGD`, whatever the neighbours and the blocks are."""

import itertools
import math

import pytest
import torch

from cgo.runtime import rows
from cgo.runtime.products import Product
from cgo.runtime.rows import RowSteps

SHAPES = [(4, 3), (7,), (40,), (3, 90)]  # beside a block of 64 elements: small, and two large


def settings(count, decays, moves, nesterov):
    return [
        {
            "lr": 0.05 * (1 + lane),
            "weight_decay": 0.01 * (1 + lane) * decays,
            "momentum": (0.9 - 0.1 * lane) * moves,
            "nesterov": nesterov,
        }
        for lane in range(count)
    ]


class Lanes:
    """Models with packed leaves, and the step over them."""

    def __init__(self, given, dtype, seeds):
        self.given = given
        drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.own = [[torch.randn(s, generator=g, dtype=dtype) for s in SHAPES] for g in drawn]
        shapes = [(len(given), math.prod(shape)) for shape in SHAPES]
        self.values = torch.cat([t.flatten() for leaf in zip(*self.own) for t in leaf])
        moves = bool(given[0]["momentum"])
        self.moment = torch.zeros_like(self.values) if moves else None
        self.models = list(range(len(given))) * len(SHAPES)
        flags = bool(given[0]["weight_decay"]), moves, given[0]["nesterov"]
        self.step = RowSteps(self.values, self.moment, shapes, self.models, flags)

    def take(self, gradients, without=frozenset()):
        leaves = [torch.stack(leaf).flatten(1) for leaf in zip(*gradients)]
        self.step(leaves, self.given, without)

    def lane(self, number):
        """A model's parameters, flat."""
        parts = self.values.split([math.prod(s) for s in SHAPES for _ in self.given])
        own = parts[number :: len(self.given)]
        return torch.cat(list(own))


def gradients_of(seed, steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + seed)
    return [[torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES]
            for _ in range(steps)]  # fmt: skip


@pytest.fixture(params=[(2**18, 1024), (64, 1024), (2**18, 32), (64, 32), (64, 200)])
def block(request, monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK", request.param[0])
    monkeypatch.setattr(rows, "_LONG", request.param[1])


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize(("moves", "nesterov"), [(False, False), (True, False), (True, True)])
def test_steps_are_those_of_torch_optim(decays, moves, nesterov):
    given = settings(3, decays, moves, nesterov)
    lanes = Lanes(given, torch.float64, range(3))
    alone = [[torch.nn.Parameter(p.clone()) for p in own] for own in lanes.own]
    optimizers = [torch.optim.SGD(own, **kwargs) for own, kwargs in zip(alone, given)]
    for found in zip(*(gradients_of(lane, 4) for lane in range(3))):
        lanes.take(found)
        given[1]["lr"] *= 0.5  # as a scheduler does
        for parameters, optimizer, own in zip(alone, optimizers, found):
            for parameter, gradient in zip(parameters, own):
                parameter.grad = gradient.clone()
            optimizer.step()
        optimizers[1].param_groups[0]["lr"] *= 0.5
    for number, parameters in enumerate(alone):
        expected = torch.cat([parameter.detach().flatten() for parameter in parameters])
        torch.testing.assert_close(lanes.lane(number), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("long", [32, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], [True], [False, True])))
def test_neither_neighbours_nor_blocks_change_a_bit(dtype, flags, long, monkeypatch):
    monkeypatch.setattr(rows, "_LONG", long)
    found = []
    for size, seeds in [(2**18, [0]), (2**18, [5, 0, 6]), (64, [7, 8, 9, 10, 0])]:
        monkeypatch.setattr(rows, "_BLOCK", size)
        given = settings(len(seeds), *flags)
        given[seeds.index(0)] = settings(1, *flags)[0]
        lanes = Lanes(given, dtype, seeds)
        for gradients in zip(*(gradients_of(seed, 3, dtype) for seed in seeds)):
            lanes.take(gradients)
        found.append(lanes.lane(seeds.index(0)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("block")
def test_a_lane_left_out_stays_as_it_is_and_changes_no_bit_of_others():
    given = settings(3, True, True, False)
    lanes, whole = (Lanes(given, torch.float32, range(3)) for _ in range(2))
    before = lanes.lane(1).clone()
    steps = [gradients_of(lane, 2, torch.float32) for lane in range(3)]
    whole.take([own[0] for own in steps])
    bad = [torch.full_like(part, math.nan) for part in steps[1][0]]
    lanes.take([steps[0][0], bad, steps[2][0]], without=frozenset({1}))
    assert torch.equal(lanes.lane(1), before)
    for number in (0, 2):
        assert torch.equal(lanes.lane(number), whole.lane(number))
    lanes.take([own[1] for own in steps])  # its momentum was left alone, too
    assert lanes.lane(1).isfinite().all()


def test_blocks_cover_everything_once(monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK", 64)
    stretches = rows._stretches([(3, 12), (3, 7), (3, 40), (3, 270), (1, 5)])
    edges = [(start, end) for _, start, end in stretches]
    assert [start for start, _ in edges[1:]] == [end for _, end in edges[:-1]]
    assert edges[0][0] == 0
    assert edges[-1][1] == 3 * (12 + 7 + 40 + 270) + 5
    assert max(end - start for start, end in edges) <= 64


def stepped(products, given, seeds, steps=3, dtype=torch.float64):
    """Lanes after some steps in which the last leaf's gradient is a product, held or computed."""
    drawn = [torch.Generator().manual_seed(300 + seed) for seed in seeds]
    lanes = Lanes(given, dtype, seeds)
    for found in zip(*(gradients_of(seed, steps, dtype) for seed in seeds)):
        left = torch.stack([torch.randn(3, 2, generator=g, dtype=dtype) for g in drawn])
        right = torch.stack([torch.randn(2, 90, generator=g, dtype=dtype) for g in drawn])
        leaves = [torch.stack(leaf).flatten(1) for leaf in zip(*found)]
        product = Product(left, right)
        leaves[-1] = product if products else product.dense().flatten(1)
        lanes.step(leaves, given)
    return lanes


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize(("moves", "nesterov"), [(False, False), (True, False), (True, True)])
def test_a_product_is_the_gradient_that_it_is(decays, moves, nesterov):
    given = settings(3, decays, moves, nesterov)
    held, computed = (stepped(products, given, range(3)) for products in (True, False))
    torch.testing.assert_close(held.values, computed.values, rtol=1e-12, atol=1e-12)
    if moves:
        torch.testing.assert_close(held.moment, computed.moment, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_of_other_momentum_change_no_bit_where_gradients_are_products(
    dtype, monkeypatch
):
    monkeypatch.setattr(rows, "_LONG", 32)
    alike, others = settings(3, False, True, False), settings(3, False, True, False)
    for lane in range(3):
        alike[lane]["momentum"] = others[0]["momentum"]
    found = [stepped(True, given, range(3), dtype=dtype).lane(0) for given in (alike, others)]
    assert torch.equal(*found)


def test_a_product_is_added_to_momentum_where_that_lies(monkeypatch):
    """Long lanes, momentum alone: the gradient is never written."""
    monkeypatch.setattr(rows, "_LONG", 32)
    monkeypatch.setattr(Product, "dense", None)
    stepped(True, settings(3, False, True, False), range(3))
    with pytest.raises(TypeError):  # decay has to be added to it
        stepped(True, settings(3, True, True, False), range(3))


def test_a_lane_left_out_is_put_back_where_its_gradient_is_a_product(monkeypatch):
    monkeypatch.setattr(rows, "_LONG", 32)
    given = settings(2, False, True, False)
    lanes = Lanes(given, torch.float64, range(2))
    before = lanes.lane(1).clone(), lanes.moment.clone()
    leaves = [torch.zeros(2, math.prod(shape), dtype=torch.float64) for shape in SHAPES[:-1]]
    left = torch.ones(2, 3, 1, dtype=torch.float64)
    left[1] = math.nan
    product = Product(left, torch.ones(2, 1, 90, dtype=torch.float64))
    lanes.step([*leaves, product], given, frozenset({1}))
    assert torch.equal(lanes.lane(1), before[0])
    assert lanes.moment.isfinite().all()
    assert not torch.equal(lanes.moment, before[1])
