"""Parts of tapes without their names."""

import pytest
import torch

from cgo.runtime.structure import (
    Structure,
    StructureError,
    examples_of,
    module_of,
    structure_of,
    whole,
)
from cgo.runtime.tape import record


def structure(step, *inputs):
    return structure_of(whole(record(step, list(inputs))[1]), inputs)


def scaled(factor):
    return lambda x: [x.mul(factor).exp()]


def test_names_do_not_matter_and_everything_else_does():
    x = torch.ones(2, 3)
    known = structure(scaled(2), x)
    assert structure(lambda y: [(y + 0, y.mul(2).exp())[1]], x * 5).digest == known.digest
    others = [
        structure(scaled(2.0), x),
        structure(scaled(3), x),
        structure(scaled(2), x.double()),
        structure(scaled(2), torch.ones(3, 2)),
        structure(scaled(2), torch.ones(3, 2).t()),
        structure(lambda x: [x.mul(2).exp(), x.mul(2)], x),
    ]
    assert len({known.digest, *(other.digest for other in others)}) == 7


def test_a_structure_is_built_again_from_its_document():
    def step(x, total):
        total.add_(x.sum(0))
        rows, rest = x.split([1, 2])
        found = torch.full((3,), float("-inf"), dtype=torch.float64, device="cpu")
        return [torch.cat([rest, rows]).to(torch.float64), torch.maximum(found, x[0]), *x.unbind(1)]

    given = [torch.randn(3, 3), torch.zeros(3)]
    made = Structure(structure(step, *given).document)
    own, expected = [value.clone() for value in given], [value.clone() for value in given]
    found = module_of(made)(*own)
    for a, b in zip([*found, *own], [*step(*expected), *expected], strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_examples_lie_in_memory_as_the_inputs_do():
    given = [torch.ones(4, 6)[:, ::2], torch.ones(3, 1).expand(3, 5), torch.ones(0, 2).long()]
    made = structure(lambda *x: [v + 1 for v in x], *given)
    for a, b in zip(examples_of(made), given, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert not a.any()


def test_generators_are_no_plain_values():
    generator = torch.Generator()
    with pytest.raises(StructureError, match="Generator"):
        structure(lambda x: [torch.empty_like(x).normal_(generator=generator)], torch.ones(2))
