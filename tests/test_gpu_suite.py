"""The GPU suite (benchmarks/gpu_*.py), on a CPU and at its smallest."""

import json
import math
import sys
import time
from dataclasses import replace
from textwrap import dedent

import gpu_equivalence
import gpu_methods
import gpu_suite
import pytest
import torch
from gpu_children import Child, run_here
from gpu_counting import Ceilings, Work, forward_work, measure_ceilings, step_work, work_of
from gpu_plans import Place, plan
from gpu_report import markdown, page, summary
from gpu_sections import Job, Section, sections
from gpu_workloads import SIZES, WORKLOADS
from torch import nn

from cgo.bench.methods import NotApplicable

CPU = torch.device("cpu")


# --- counting -------------------------------------------------------------------------------------


def test_flops_and_bytes_of_a_linear_layer():
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    product = 2 * 16 * 8 * 4
    assert forward_work(layer, x) == Work(product, 4 * (16 * 8 + 8 * 4 + 16 * 4))
    assert work_of(lambda: layer(x).sum().backward()).flops == 2 * product  # none for the input


def test_flops_and_bytes_of_a_convolution():
    layer, x = nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.randn(2, 3, 8, 8)
    product = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    moved = 4 * (2 * 3 * 8 * 8 + 5 * 3 * 3 * 3 + 2 * 5 * 8 * 8)
    assert forward_work(layer, x) == Work(product, moved)
    assert work_of(lambda: layer(x).sum().backward()).flops == 2 * product


def test_views_move_nothing_and_expanded_tensors_what_they_lie_on():
    x = torch.randn(1, 8)
    assert work_of(lambda: x.t().reshape(2, 4)) == Work(0, 0)
    assert work_of(lambda: x.expand(100, 8).sum(0)).moved == 4 * (8 + 8)


def test_a_step_of_all_models_is_the_sum_but_for_a_shared_trunk():
    heads = WORKLOADS["heads"]
    models = heads.build("small")
    total = gpu_methods.counted(heads, models, models[:1]).total
    apart = gpu_methods.counted(replace(heads, trunk=None), models, models[:1]).total
    (solo,) = gpu_methods.solos_of(models[:1], CPU)
    trunk = forward_work(solo.net.trunk, next(solo.batches)[0])
    assert apart.flops - total.flops == 2 * trunk.flops > 0
    alone = [step_work(solo) for solo in gpu_methods.solos_of(models, CPU)]
    expected = alone[0] + alone[1] + alone[2]
    assert apart.flops == expected.flops
    # Batch norm in eval mode gives empty statistics on a CPU, and full ones on a GPU.
    assert expected.moved <= apart.moved < 1.01 * expected.moved


def test_a_sample_is_scaled_by_its_share_of_the_calls():
    cells = WORKLOADS["cells"]
    models = cells.build("small")
    calls = [step_work(solo).calls for solo in gpu_methods.solos_of(models, CPU)]
    assert calls[0] != calls[1]  # two different networks
    scale = gpu_methods.counted(cells, models, models[:1]).scale
    assert scale == sum(calls) / calls[0]
    cnns = WORKLOADS["cnn"].build("small")
    assert gpu_methods.counted(WORKLOADS["cnn"], cnns, cnns[:1]).scale == len(cnns)


@pytest.mark.parametrize("name", ["encoders", "wide"])
def test_work_is_counted_without_a_device_as_on_one(name):
    models = WORKLOADS[name].build("small")[:1]
    (solo,) = gpu_methods.solos_of(models, CPU)
    assert gpu_methods.counted(WORKLOADS[name], models, models).total == step_work(solo)


def test_the_least_time_is_that_of_the_scarcer_resource():
    ceilings = Ceilings(flops=100.0, tf32_flops=400.0, bandwidth=10.0)
    assert ceilings.least_s(Work(800, 10), tf32=False) == 8.0
    assert ceilings.least_s(Work(800, 10), tf32=True) == 2.0
    assert ceilings.least_s(Work(800, 100), tf32=True) == 10.0
    assert Ceilings(100.0, None, 10.0).least_s(Work(800, 10), tf32=True) == 8.0


def test_ceilings_are_measured_and_leave_the_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    found = measure_ceilings(CPU, reduced=True)
    assert found.flops > 0 < found.bandwidth
    assert found.tf32_flops is None
    assert torch.get_float32_matmul_precision() == before


# --- methods and workloads ------------------------------------------------------------------------


def test_workloads_hold_the_models_that_targets_are_for():
    counts = {name: len(workload.build("full")) for name, workload in WORKLOADS.items()}
    assert counts == {
        "cells": 32, "cnn": 32, "narrow": 256, "encoders": 16, "wide": 4, "mix": 12, "heads": 32,
    }  # fmt: skip
    cells = WORKLOADS["cells"].build("full")
    assert len({model.kwargs["edges"] for model in cells}) == 32


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_model_has_a_rate_of_its_own_at_every_size(name):
    for size in SIZES:
        models = WORKLOADS[name].build(size)
        assert len({model.training.optimizer_kwargs["lr"] for model in models}) == len(models)
        assert len({model.data.digest for model in models}) == 1  # one loader


def test_samples_are_evenly_spaced():
    assert gpu_methods.sampled(list(range(10)), 3) == [0, 4, 9]
    assert gpu_methods.sampled([1, 2], 3) == [1, 2]


def test_rounds_take_methods_in_turn():
    taken = []
    methods = {name: lambda count, name=name: taken.append(name) for name in ("a", "b")}
    heard = []
    note = lambda rows: heard.append({name: len(row) for name, row in rows.items()})  # noqa: E731
    found = gpu_methods.times(methods, CPU, 3, note)
    assert taken[-6:] == ["a", "b"] * 3
    assert {name: len(row) for name, row in found.items()} == {"a": 3, "b": 3}
    assert heard == [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 3, "b": 3}]


def test_capturing_needs_a_device_that_captures():
    with pytest.raises(NotApplicable, match="CUDA"):
        gpu_methods.captured(WORKLOADS["cnn"].build("small"), CPU)


@pytest.mark.gpu
def test_captured_steps_train_as_eager_ones_do(cuda):
    models = WORKLOADS["cnn"].build("small")[:1]
    plain, other = (gpu_methods.solos_of(models, cuda)[0] for _ in range(2))
    # Capturing takes the first batch three times to warm up, and records a step without taking it.
    first = next(plain.batches)
    for _ in range(3):
        plain.learn(*first)
    replay = gpu_methods._capture(other)
    for _ in range(10):
        plain.step()
        replay()
    for a, b in zip(plain.net.parameters(), other.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- equivalence ----------------------------------------------------------------------------------


def planned(name, tmp_path):
    models = gpu_equivalence.checked_models()[name]
    return plan(models, Place(tmp_path / name), lambda part: None, gpu_equivalence.TUNING)


def test_a_family_equals_the_plain_loop_and_another_rate_does_not(tmp_path):
    found = gpu_equivalence.check_family("cnn", planned("cnn", tmp_path), CPU)
    assert found["passed"]
    assert found["steps"] == 100
    model = WORKLOADS["cnn"].build("small")[0]
    right = gpu_equivalence.plain_losses(model, CPU)
    model.training = replace(model.training, optimizer_kwargs={"lr": 0.010001, "momentum": 0.9})
    wrong = gpu_equivalence.plain_losses(model, CPU)
    assert gpu_equivalence._distance(wrong, right) > gpu_equivalence.ALLOWED


def test_what_is_missing_or_no_number_is_infinitely_far():
    assert gpu_equivalence._distance([1.0], [1.0, 2.0]) == math.inf
    assert gpu_equivalence._distance([math.nan], [1.0]) == math.inf
    assert gpu_equivalence._distance([1.0, 2.0], [1.0, 2.0]) == 0.0


@pytest.mark.long
def test_runs_repeat_bit_by_bit_and_a_ruined_model_touches_no_other(tmp_path):
    whole, ruined = planned("whole", tmp_path), planned("ruined", tmp_path)
    found = gpu_equivalence.check_bits(whole, ruined, CPU)
    assert found["passed"]
    assert found["repeat"] == {"passed": True, "differ": []}
    assert found["nan"]["diverged"]
    assert found["nan"]["passed"]


# --- sections and their processes -----------------------------------------------------------------


def test_a_workload_is_measured_baselines_first(tmp_path):
    parts, order = {}, []

    def emit(part):
        order.append(sorted(part.get("rows", part)))
        parts.update(json.loads(json.dumps(part)))

    section = next(s for s in sections("cpu") if s.name == "cnn")
    run_here(section, Job("cpu", "small", Place(tmp_path), rounds=2), emit)
    assert parts["status"] == "ok", parts
    assert {name: len(row) for name, row in parts["rows"].items()} == {"merged": 2, "eager": 2}
    assert parts["flops"] > 0 < parts["bytes"]
    assert parts["scale"] == 1.0
    assert parts["peak_bytes"] is None
    assert parts["first_step_s"] > parts["build_s"] > 0 < parts["plan_s"]
    assert "CUDA" in parts["captured_error"]
    assert parts["estimated_peak_bytes"] > 0
    # Each is said when it is known: the plan, the baseline's time, then the merged step's.
    assert order.index(["eager"]) < order.index(["build_s"]) < order.index(["first_step_s"])
    assert order.index(["first_step_s"]) < order.index(["eager", "merged"])


def test_what_is_not_equal_fails_its_section_and_is_named(tmp_path, monkeypatch):
    bad = {"bits": {"passed": False}, "cnn": {"passed": False}}
    monkeypatch.setattr(gpu_equivalence, "check_bits", lambda *args: bad["bits"])
    monkeypatch.setattr(
        gpu_equivalence, "check_family", lambda name, *args: bad.get(name, {"passed": True})
    )
    section = next(s for s in sections("cpu") if s.name == "equivalence")
    names = gpu_equivalence.checked_models()
    documents = {**dict.fromkeys(names, None), "heads": ValueError("no plan")}
    section = replace(section, prepare=lambda job, emit: documents)
    parts = {}
    run_here(section, Job("cpu", "small", Place(tmp_path)), parts.update)
    assert (parts["status"], parts["error"]) == (
        "failed", "CgoError: not equal to training alone: bits, cnn, heads",
    )  # fmt: skip
    assert parts["heads"]["error"] == "ValueError: no plan"
    assert parts["wide"]["passed"]


@pytest.mark.long
def test_stored_activations_are_measured_epoch_by_epoch(tmp_path):
    parts = {}
    section = next(s for s in sections("cpu") if s.name == "stored")
    run_here(section, Job("cpu", "small", Place(tmp_path)), parts.update)
    assert parts["status"] == "ok", parts
    assert len(parts["epoch_s"]) == parts["epochs"] == 5
    assert parts["trial_s"] > sum(parts["epoch_s"])
    assert parts["serial_s"] > 0 < parts["flops"]


def test_sections_come_in_the_order_of_their_worth():
    names = [section.name for section in sections("cuda")]
    assert names == [
        "equivalence", "ceilings", "cnn", "heads", "encoders", "wide", "mix", "narrow", "cells",
        "stored", *(f"compiled:{name}" for name in WORKLOADS),
    ]  # fmt: skip
    on_cpu = [section.name for section in sections("cpu")]
    assert on_cpu == [name for name in names if name != "compiled:cells"]


def test_an_error_is_a_part_of_what_a_section_found(tmp_path):
    def fails(job, prepared, emit):
        emit({"half": 1})
        raise ValueError("broken on purpose")

    parts = {}
    run_here(
        Section("x", 1.0, lambda job, emit: None, fails), Job("cpu", "small", Place(tmp_path)),
        parts.update,
    )  # fmt: skip
    assert parts["half"] == 1
    assert (parts["status"], parts["error"]) == ("failed", "ValueError: broken on purpose")


#: What stands for a section's process: says JSON lines as those do.
SCRIPTS = {
    "good": 'say(status="ready"); input(); say(figure=1); say(status="ok")',
    "crash": "say(figure=2); os._exit(11)",
    "hang": 'say(status="ready"); input(); say(figure=3); time.sleep(60)',
    "last": 'say(status="ready"); input(); say(figure=4); say(status="ok")',
}


def script(section):
    head = "import json, os, time\ndef say(**part): print(json.dumps(part), flush=True)\n"
    return Child([sys.executable, "-c", head + SCRIPTS[section.name]], {})


def suite(names, out, budget_s=100.0):
    chosen = [Section(name, 2.0, None, None) for name in names]
    return gpu_suite.Suite(chosen, "cpu", "small", out, budget_s, script, lambda line: None)


def test_a_section_that_crashes_or_hangs_takes_no_other_with_it(tmp_path):
    out = tmp_path / "new" / "results.json"
    suite(SCRIPTS, out).run()
    found = json.loads(out.read_text())["sections"]
    assert {name: part["status"] for name, part in found.items()} == {
        "good": "ok", "crash": "failed", "hang": "out of time", "last": "ok",
    }  # fmt: skip
    assert {name: part["figure"] for name, part in found.items()} == {
        "good": 1, "crash": 2, "hang": 3, "last": 4,
    }  # fmt: skip
    assert "ended with 11" in found["crash"]["error"]
    assert "while it was being run" in found["hang"]["error"]


def test_each_figure_is_written_when_it_is_found(tmp_path):
    out = tmp_path / "results.json"
    running = suite(["hang"], out)
    child = script(Section("hang", 2.0, None, None))
    child.heard = lambda: running._note("hang", child)
    try:
        assert child.wait_ready(math.inf)
        child.go()
        child.wait_end(time.monotonic() + 1)
    finally:
        child.end()
    assert json.loads(out.read_text())["sections"] == {"hang": {"status": "ready", "figure": 3}}


def test_an_interrupt_ends_the_suite_with_all_that_was_found(tmp_path):
    out = tmp_path / "results.json"
    running = suite(["good", "hang", "last"], out)

    def interrupt(line):
        if "hang ..." in line:
            raise KeyboardInterrupt

    running._tell = interrupt
    found = running.run()
    assert {name: part["status"] for name, part in found["sections"].items()} == {
        "good": "ok", "hang": "interrupted", "last": "skipped",
    }  # fmt: skip
    assert json.loads(out.read_text())["sections"] == found["sections"]


def test_what_needs_the_device_and_is_not_ready_in_time_is_begun_again_last(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_PREPARE_S", 0.5)
    monkeypatch.setitem(SCRIPTS, "slow", "time.sleep(1); " + SCRIPTS["good"])
    started = []

    def start(section):
        started.append(section.name)
        return script(section)

    running = suite(["slow", "last"], tmp_path / "results.json")
    running._start, running._together = start, True
    running._chosen = [replace(s, plans=s.name != "slow", budget_s=20.0) for s in running._chosen]
    monkeypatch.setattr(gpu_suite, "_MEASURE_S", 0.0)
    found = running.run()["sections"]
    assert started == ["slow", "last", "slow"]
    assert list(found) == ["last", "slow"]
    assert {part["status"] for part in found.values()} == {"ok"}


def test_sections_prepared_side_by_side_run_one_after_another(tmp_path):
    running = suite(SCRIPTS, tmp_path / "results.json")
    running._together = True
    found = running.run()["sections"]
    assert [part["status"] for part in found.values()] == ["ok", "failed", "out of time", "ok"]


def test_what_comes_after_the_deadline_is_skipped_and_said(tmp_path):
    out = tmp_path / "results.json"
    suite(["good", "last"], out, budget_s=0.0).run()
    found = json.loads(out.read_text())["sections"]
    assert {part["status"] for part in found.values()} == {"skipped"}
    assert "0 s were spent" in found["last"]["error"]


def test_the_command_writes_hardware_versions_and_figures(tmp_path, capfd):
    out = tmp_path / "results.json"
    given = ["--only", "ceilings", "--rounds", "1", "--out", str(out)]
    assert gpu_suite.main(["--device", "cpu", "--size", "small", *given]) == 0
    found = json.loads(out.read_text())
    assert found["reduced"] is True
    assert found["cuda"] is None
    assert "CUDA figures are missing" in found["note"]
    versions = {"date", "device", "cores", "threads", "python", "torch", "numpy", "cgo-engine"}
    assert versions <= set(found["environment"])
    assert found["sections"]["ceilings"]["flops"] > 0
    assert found["spent_s"] < found["budget_s"]
    told = capfd.readouterr().out
    assert "pytest -m gpu" in told
    assert "GB/s" in told.splitlines()[-4]  # the summary is last


def test_unknown_sections_are_refused_by_name():
    with pytest.raises(SystemExit, match="magic is none of equivalence, ceilings"):
        gpu_suite.main(["--device", "cpu", "--only", "magic"])


# --- the report -----------------------------------------------------------------------------------

RESULTS = {
    "reduced": False,
    "cuda": {"name": "Card", "driver": "1.2"},
    "environment": {"torch": "2.11", "date": "2026-01-01", "device": "Card"},
    "sections": {
        "ceilings": {"status": "ok", "flops": 1e9, "tf32_flops": 4e9, "bandwidth": 1e9},
        "cnn": {
            "status": "ok", "models": 32, "scale": 4.0, "rows": {"merged": [0.001, 0.002, 0.009],
            "eager": [0.01], "captured": [0.005]}, "flops": 4e6, "bytes": 1e6, "tf32": True,
            "peak_bytes": 2**31, "first_step_s": 1.25,
        },
        "compiled:cnn": {"status": "ok", "over_eager": 2.5},
        "compiled:heads": {"status": "ok", "over_eager": 2.0},
        "stored": {"status": "ok", "models": 32, "epochs": 5, "serial_s": 14.0, "captured_s": 8.0,
                   "epoch_s": [0.2, 0.2, 0.2, 0.2, 0.2], "flops": 4e8, "bytes": 5e7,
                   "tf32": True, "store_stems": True},
        "cells": {"status": "out of time", "error": "stopped after 60 s"},
        "equivalence": {
            "status": "ok", "cnn": {"passed": True}, "cells": {"passed": False},
            "bits": {"repeat": {"passed": True, "differ": []},
                     "nan": {"passed": False, "differ": ["cnn-000"]}},
        },
    },
}  # fmt: skip


def test_targets_are_judged_against_the_fastest_solo_baseline():
    rows = summary(RESULTS)
    row = rows["cnn"]
    assert row["eager_ratio"] == pytest.approx(20)
    assert (row["best_solo"], row["solo_ratio"]) == ("compiled", pytest.approx(8))
    assert row["roofline_share"] == pytest.approx(0.5)
    assert row["met"] is True
    assert row["solo_roofline_share"] == pytest.approx(1 / 16)
    stored = rows["stored"]
    assert stored["met"] is False  # 14 of 15
    assert (stored["best_solo"], stored["solo_ratio"]) == ("compiled", pytest.approx(7))
    assert stored["roofline_share"] == pytest.approx(0.1)
    assert summary({**RESULTS, "reduced": True})["cnn"]["met"] is None
    assert summary({**RESULTS, "cuda": None})["cnn"]["met"] is None


def test_the_table():
    assert markdown({**RESULTS, "summary": summary(RESULTS)}) == dedent("""\
        Measured on Card, driver 1.2, torch 2.11, 2026-01-01. Milliseconds of a step of all models; ratios are of the solo method's time to the merged time.

        | workload | merged | eager | CUDA graphs | compiled | over eager (target) | over best solo (target) | roofline | peak memory |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | 32 CNNs of two convolutions, of different learning rates | 2.00 | 40.00 | 20.00 | 16.00 | 20.0 (15) | 8.0 (5) | 50% | 2.0 GiB |

        Heads for five epochs, activations stored: 14.0 of the serial loop (target 15).

        Not measured:

        - cells: out of time; stopped after 60 s

        Float64 losses of 100 steps equal the plain loop's in 1 of 2 families; equal bits of two runs: passed, a NaN beside: FAILED (cnn-000).
        """)  # noqa: E501


def test_results_as_they_were_at_first_are_still_read():
    figures = {"models": 2, "step_s": {"merged": 1.0, "eager": 3.0}}
    found = {**RESULTS, "sections": {"cnn": figures}}
    assert summary(found)["cnn"]["eager_ratio"] == 3.0


def test_stored_activations_are_judged_by_the_epochs_that_are_there():
    stored = {**RESULTS["sections"]["stored"], "epoch_s": [0.2, 0.2]}
    row = summary({**RESULTS, "sections": {"stored": stored}})["stored"]
    assert row["eager_ratio"] == pytest.approx(14.0)
    assert row["last_epoch_ratio"] == pytest.approx(14.0)


def test_the_page():
    found = {**RESULTS, "summary": summary(RESULTS), "spent_s": 371.2, "budget_s": 400.0}
    assert page(found) == dedent("""\
        == Card; torch 2.11; 371 of 400 s ==
        Float64 losses of 100 steps equal the plain loop's in 1 of 2 families; equal bits of two runs: passed, a NaN beside: FAILED (cnn-000).
        Ceilings: 0.00 TFLOP/s in float32, 0 with TF32, 1 GB/s.
        Milliseconds of a step of all models (stored: seconds of all epochs); merged over eager and over the best
        solo method, with what is to be reached; the share of the roofline; seconds to the first step.
                   models   merged    eager   graphs compiled        x eager         x solo roofline  first
        cnn            32     2.00    40.00    20.00    16.00      20.0 (15)        8.0 (5)      50%    1.2
        stored         32     1.00    14.00     8.00     7.00      14.0 (15)            7.0      10%      -
        cells: out of time; stopped after 60 s
        """)  # noqa: E501


def test_a_run_without_a_gpu_says_so_first():
    found = {**RESULTS, "cuda": None, "reduced": True}
    text = markdown({**found, "summary": summary(found)})
    assert text.startswith("CUDA figures are missing")
    assert "| cnn, 32 models | 2.00 | 40.00 | 20.00 | 16.00 | 20.0 | 8.0 |" in text  # no targets


def test_a_run_with_a_failed_section_ends_with_an_error(tmp_path, monkeypatch):
    given = ["--device", "cpu", "--size", "small", "--only", "ceilings", "--rounds", "1",
             "--out", str(tmp_path / "results.json")]  # fmt: skip
    assert gpu_suite.main([*given, "--budget-s", "0"]) == 1
