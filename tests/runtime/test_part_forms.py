"""Forms of parts: visited, copied, compared."""

import torch

from cgo.runtime.part_forms import (
    Plan,
    copied,
    difference,
    overwritten,
    plain,
    stands_alone,
    visited,
)
from cgo.runtime.regions import cut
from cgo.runtime.structure import Part, whole
from cgo.runtime.tape import record


def step(x, weight, total):
    total.view(-1).add_(1).mul_(2)
    return [((x @ weight).exp().log1p() @ weight).tanh().abs()]


def inputs():
    torch.manual_seed(0)
    return [torch.randn(3, 3), torch.randn(3, 3), torch.zeros(2, 2)]


def test_copies_lie_in_memory_as_their_tensors():
    for value in (torch.rand(3, 4).t(), torch.rand(3, 1).expand(3, 5), torch.rand(4, 6)[:, 1::2]):
        found = copied(value)
        assert torch.equal(found, value)
        assert found.stride() == value.stride()
        assert found.data_ptr() != value.data_ptr()


def test_a_visit_shows_each_part_what_it_reads_and_runs_the_step_once():
    tape = record(step, inputs())[1]
    given = inputs()
    expected = inputs()
    (result,) = step(*expected)
    found = []
    for _, part, read in visited(Plan(tape, cut(tape, given), "cpu"), given):
        own = [copied(v) if name in overwritten(part) else v for name, v in zip(part.reads, read)]
        found += plain(part)(*own)
    assert torch.equal(found[-1], result)
    assert torch.equal(given[2], expected[2])


def test_what_a_part_writes_through_a_view_is_what_it_reads():
    tape = record(step, inputs())[1]
    parts = [piece for piece in cut(tape, inputs()) if isinstance(piece, Part)]
    assert [overwritten(part) for part in parts if overwritten(part)] == [{tape.inputs[2]}]
    assert overwritten(whole(tape)) == {tape.inputs[2]}


def test_forms_that_give_or_write_something_else_are_told_apart():
    tape = record(step, inputs())[1]
    form = plain(whole(tape))
    assert difference(form, form, inputs()) == ""
    assert "other values" in difference(lambda *x: [v + 1 for v in form(*x)], form, inputs())

    def careless(*given):
        return form(*given[:2], given[2].clone())

    assert "other values" in difference(careless, form, inputs())

    def failing(*given):
        raise ValueError("no kernel")

    assert "no kernel" in difference(failing, form, inputs())


def test_memory_with_two_names_is_no_compilers_to_write():
    flat = torch.zeros(8)
    given = [torch.randn(2, 2), torch.randn(2, 2), flat[:4].view(2, 2)]
    tape = record(lambda *x: step(*x[:3]), given)[1]
    assert stands_alone(tape, given)
    two = record(lambda *x: [*step(*x[:3]), x[3] + 1], [*given, flat[2:]])[1]
    assert not stands_alone(two, [*given, flat[2:]])
