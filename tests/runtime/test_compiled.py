"""Tapes compiled by Inductor: decided by what is planned, measured, kept where faster."""

import pytest
import torch
from torch.nn import functional as F

import cgo
from cgo.runtime.compiled import CompileError, Compiler, compile_step, repays
from cgo.runtime.tape import compile_tape, record


def step(x, weight, mean):
    mean.mul_(0.9).add_(x.mean(0))
    rows = (x - mean) @ weight
    first, second = rows.split(2, 1)
    return [first.exp().sum(), second.relu().log1p()]


def inputs():
    torch.manual_seed(0)
    return [torch.randn(8, 3), torch.randn(3, 4), torch.zeros(3)]


@pytest.fixture(scope="module")
def tape():
    return record(step, inputs())[1]


def test_what_inductor_makes_computes_and_writes_the_same(tape):
    given, expected = inputs(), inputs()
    found = compile_step(tape, inputs())(*given)
    for a, b in zip(found, step(*expected), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(given[2], expected[2])


def compiler(wanted, steps=0, known=None):
    heard = {}
    return Compiler(wanted, steps, (known or {}).get, heard.__setitem__), heard


def test_a_decision_once_made_is_followed(tape):
    replay = compile_tape(tape)
    make, heard = compiler(None, known={"train/8": True})
    assert make("train/8", tape, replay, inputs()) is not None
    assert heard == {"train/8": True}
    make, heard = compiler(True, known={"train/8": False})
    assert make("train/8", tape, replay, inputs()) is None
    assert heard == {"train/8": False}


@pytest.mark.parametrize("wanted", [None, False])
def test_what_does_not_repay_or_is_not_wanted_is_not_compiled(wanted, tape):
    make, heard = compiler(wanted, steps=10)
    assert make("train/8", tape, compile_tape(tape), inputs()) is None
    assert heard == {"train/8": False}


def test_the_plan_must_repay_it_and_convolutions_never_do(tape):
    assert repays(tape, 1e-3, 10**7)
    assert not repays(tape, 1e-3, 10)
    images = record(lambda x, w: [F.conv2d(x, w)], [torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)])
    assert not repays(images[1], 1e-3, 10**7)


def test_what_inductor_cannot_compile_is_replayed(tape, monkeypatch, caplog):
    def broken(*given, **options):
        raise OSError("no compiler")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    with pytest.raises(CompileError, match="OSError: no compiler"):
        compile_step(tape, inputs())
    make, heard = compiler(True)
    assert make("train/8", tape, compile_tape(tape), inputs()) is None
    assert heard == {"train/8": False}
    assert "not compiled" in caplog.text


def test_other_values_are_not_accepted(tape):
    make, heard = compiler(True)
    replay = compile_tape(tape)
    assert make("train/8", tape, lambda *x: [v + 1 for v in replay(*x)], inputs()) is None
    assert heard == {"train/8": False}


def test_a_compiled_trial_trains_as_alone_and_its_record_repeats_it(tmp_path):
    from support.merged import Case, Merged, assert_equal_float64

    training = {"epochs": 2, "precision": "float64", "optimizer": "Adam"}
    cases = [Case(f"m{n}", "mlp", {"width": 8}, seed=n, training=training) for n in range(3)]
    tuning = cgo.Tuning(measure=False, tape=True, compile=True)
    merged = Merged(cases, tmp_path / "first", tuning=tuning)
    told = [e.value for e in merged.events if e.kind == "trial" and e.value["what"] == "compiled"]
    assert told
    assert told[0]["calls"] > 10
    for case in cases:
        assert_equal_float64(merged, case)
    record = str(tmp_path / "first" / "lowering.json")
    again = Merged(cases, tmp_path / "second", tuning=cgo.Tuning(tape=True, record=record))
    for case in cases:
        assert merged.losses[case.id] == again.losses[case.id]
