"""Tapes that are cut where a compiler would only call kernels."""

import random

import pytest
import torch
from torch.nn import functional as F

from cgo.runtime.regions import cut, joined, moved_bytes
from cgo.runtime.structure import Part, structure_of
from cgo.runtime.tape import Tape, interpreted, record


def rejoined(tape, inputs):
    """The cut tape with its parts as functions, and the parts."""
    pieces = cut(tape, inputs)
    parts = {n: p for n, p in enumerate(pieces) if isinstance(p, Part)}
    functions = {n: interpreted(Tape(p.reads, {}, p.calls, p.gives, {})) for n, p in parts.items()}
    return interpreted(joined(tape, pieces, functions)), list(parts.values())


def names(part):
    return [call.op._schema.name.removeprefix("aten::") for call in part.calls]


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(step, inputs):
    """What a step gives and writes, by its tape and cut; returns the parts."""
    tape = record(step, copies(inputs))[1]
    left, right = copies(inputs), copies(inputs)
    run, parts = rejoined(tape, left)
    for a, b in zip(interpreted(tape)(*left), run(*right), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
    return parts


def block(x, weight, scale):
    out = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, scale, None, training=True)
    return F.relu(out + x)


def images():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 4, 4), torch.randn(3, 3, 3, 3), torch.rand(3), torch.rand(3)]


def test_chains_between_convolutions_are_parts_and_equal_ones_are_one_structure():
    def step(x, weight, one, two):
        return [block(block(x, weight, one), weight, two)]

    parts = assert_same(step, images())
    assert [names(part) for part in parts] == [["native_batch_norm", "add", "relu"]] * 2
    x, _, one, two = images()
    digests = [
        structure_of(part, [v.detach() for v in (x, scale, x)][: len(part.reads)]).digest
        for part, scale in zip(parts, (one, two))
    ]
    assert digests[0] == digests[1]
    apart, together = moved_bytes(parts[0], {v: 96 for p in parts for c in p.calls
                                             for v in (*c.reads(), *c.outputs)})  # fmt: skip
    assert together < apart / 2


def test_branches_meet_in_one_part():
    """The shortcut's convolution is called first, so that its norm is fused with the sum."""

    def step(x, weight, one, two):
        def norm(value, scale):
            return F.batch_norm(value, None, None, scale, None, training=True)

        main = norm(F.conv2d(x, weight, padding=1), one)
        return [F.relu(main + norm(F.conv2d(x, weight, padding=1), two))]

    (part,) = assert_same(step, images())
    assert names(part) == ["native_batch_norm", "native_batch_norm", "add", "relu"]


def test_buffers_are_written_through_the_views_that_a_part_makes_itself():
    def step(x, mean, var):
        flat = mean.view(3), var.view(3)
        out = F.relu(F.batch_norm(x, *flat, training=True))
        return [out, mean * 2]

    parts = assert_same(step, [torch.randn(4, 3), torch.zeros(1, 3), torch.ones(1, 3)])
    assert "native_batch_norm" in names(parts[0])
    assert "view" in names(parts[0])


def test_what_is_written_under_two_names_stays_outside():
    whole = torch.zeros(6)

    def step(first, second):
        first.add_(1).mul_(2)
        return [second.exp().log1p()]

    tape = record(step, [whole[:4], whole[2:]])[1]
    parts = [p for p in cut(tape, [whole[:4], whole[2:]]) if isinstance(p, Part)]
    assert [names(part) for part in parts] == [["exp", "log1p"]]


@pytest.mark.parametrize("seed", range(25))
def test_the_order_of_reads_and_writes_is_kept(seed):
    """Random steps of products, elementwise operators, views, and writes in place."""
    chance = random.Random(seed)

    def step(*given):
        values = list(given)
        numbers = random.Random(seed)
        for _ in range(25):
            x, y = numbers.choice(values), numbers.choice(values)
            match numbers.randrange(8):
                case 0 | 1:
                    x.mul_(0.5).add_(y.sum() / 16)
                case 2:
                    values.append((x @ y) / 4)
                case 3:
                    values.append(x.t())
                case 4:
                    values.append(x.view(-1)[numbers.randrange(2) :][:4].view(2, 2).repeat(2, 2)
                                  if x.is_contiguous() else x.tanh())  # fmt: skip
                case 5:
                    values.append(x.t().tanh())
                case 6:
                    x.copy_(y.sin())
                case _:
                    values.append((x + y).sigmoid())
        return [value + 0 for value in values[-4:]]

    torch.manual_seed(seed)
    assert_same(step, [torch.randn(4, 4) for _ in range(chance.randrange(2, 4))])
