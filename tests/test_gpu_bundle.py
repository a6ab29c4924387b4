"""The bundle for a machine with a GPU (benchmarks/gpu_bundle.py, gpu_plans.py, gpu_stages)."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import gpu_bundle
import gpu_plans
import gpu_profile
import gpu_rehearsal
import gpu_suite
import pytest
from gpu_children import Child
from gpu_plans import Place, plan
from gpu_sections import Section
from gpu_workloads import WORKLOADS

from cgo.errors import CgoError
from cgo.graph import dump

ROOT = Path(__file__).parents[1]


# --- plans ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a plan, its models and its figures."""
    folder, figures = tmp_path_factory.mktemp("plans") / "cnn", {}
    data = plan(WORKLOADS["cnn"].build("small"), Place(folder), figures.update,
                also=lambda data: {"nodes_again": len(data.graph.nodes)})  # fmt: skip
    assert figures["nodes_again"] == figures["nodes"] == len(data.graph.nodes)
    return folder, figures, data


def never(data):
    raise AssertionError("planned anew")


def test_a_plan_that_fits_is_read_with_its_figures(kept):
    folder, figures, data = kept
    read = {}
    place = Place(folder, renew=True)
    assert plan(WORKLOADS["cnn"].build("small"), place, read.update, also=never).graph == data.graph
    assert read == {**figures, "planned_before": True}


def test_a_plan_of_other_models_is_refused_where_it_is_only_read(kept):
    models = WORKLOADS["cnn"].build("small")
    models[0].seed += 1
    with pytest.raises(CgoError, match="a plan of other models"):
        plan(models, Place(kept[0]), {}.update)


def test_a_plan_of_another_tuning_is_a_plan_of_other_models(kept):
    with pytest.raises(CgoError, match="a plan of other models"):
        plan(WORKLOADS["cnn"].build("small"), Place(kept[0]), {}.update, {"measure": False})


def test_a_plan_by_other_code_is_read_and_said_to_be_so(kept, monkeypatch):
    monkeypatch.setattr(gpu_plans, "code_digest", lambda: "of another version")
    read = {}
    plan(WORKLOADS["cnn"].build("small"), Place(kept[0]), read.update, also=never)
    assert read["planned_by_other_code"] is True


def test_stale_and_broken_plans_are_made_anew(tmp_path, monkeypatch):
    models, place = WORKLOADS["cnn"].build("small"), Place(tmp_path / "cnn", renew=True)

    def planned_before():
        figures = {}
        plan(models, place, figures.update)
        return figures.get("planned_before", False)

    assert [planned_before(), planned_before()] == [False, True]
    (place.folder / "figures.json").unlink()  # as if it had been broken off
    assert [planned_before(), planned_before()] == [False, True]
    models[0].seed += 1
    assert [planned_before(), planned_before()] == [False, True]
    monkeypatch.setattr(gpu_plans, "code_digest", lambda: "of another version")
    assert [planned_before(), planned_before()] == [False, True]
    monkeypatch.setattr(gpu_plans, "VERSION", 0)
    assert not planned_before()


def test_the_digest_of_the_code_changes_with_it_and_is_a_wheels_too(tmp_path, monkeypatch):
    before = gpu_plans.code_digest()
    assert gpu_plans.code_digest() == before
    capture = tmp_path / "capture"
    capture.mkdir()
    for path in gpu_plans.cgo.capture.__path__:
        for file in Path(path).glob("*.py"):
            (capture / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(gpu_plans.cgo.capture, "__path__", [str(capture)])
    assert gpu_plans.code_digest() == before  # where it lies does not matter
    (capture / "bind.py").write_text("# another\n")
    assert gpu_plans.code_digest() != before


@pytest.mark.long
def test_models_captured_in_other_processes_give_the_same_graph(tmp_path):
    models = WORKLOADS["heads"].build("small")
    together = plan(models, Place(tmp_path / "one"), lambda part: None)
    apart = plan(models, Place(tmp_path / "two", 2), lambda part: None)
    assert dump(apart.graph) == dump(together.graph)
    assert apart.models == together.models


# --- planning side by side ------------------------------------------------------------------------

HEAD = "import json, os, time\ndef say(**part): print(json.dumps(part), flush=True)\n"


def planner(bodies):
    return lambda section: Child([sys.executable, "-c", HEAD + bodies[section.name]], {})


def named(*names, plans=True):
    return [Section(name, 2.0, None, None, plans=plans) for name in names]


def test_planning_says_what_failed_and_goes_on():
    told = []
    bodies = {"good": 'say(nodes=3, status="ready"); time.sleep(60)', "crash": "os._exit(11)"}
    chosen = [*named("good", "crash"), *named("device", plans=False)]
    found = gpu_suite.plan_only(chosen, planner(bodies), tell=told.append)
    assert {name: part["status"] for name, part in found.items()} == {
        "good": "ready", "crash": "failed",
    }  # fmt: skip
    assert found["good"]["nodes"] == 3
    assert "ended with 11" in found["crash"]["error"]
    assert [line.split(",")[0] for line in told] == [
        "good: planned", "crash: its process ended with 11 before it was done",
    ]  # fmt: skip


def test_as_many_are_planned_side_by_side_as_there_are_processors(tmp_path):
    """The costliest is begun first, and one that takes all processors is alone."""
    body = dedent(f"""
        name = NAME
        open({str(tmp_path)!r} + "/" + name, "w").close()
        time.sleep(0.3)
        beside = sorted(os.listdir({str(tmp_path)!r}))
        os.remove({str(tmp_path)!r} + "/" + name)
        say(beside=beside, status="ready")
    """)
    names = ["cnn", "wide", "cells"]
    bodies = {name: body.replace("NAME", repr(name)) for name in names}
    wanted = {"cells": 2, "wide": 1, "cnn": 1}.__getitem__
    found = gpu_suite.plan_only(named(*names), planner(bodies), wanted, 2, lambda line: None)
    assert next(iter(found)) == "cells"
    assert found["cells"]["beside"] == ["cells"]
    assert {"cnn", "wide"} in [set(found[name]["beside"]) for name in ("cnn", "wide")]


# --- the folder -----------------------------------------------------------------------------------


def test_a_bundle_that_is_too_large_is_refused_by_its_largest_parts(tmp_path):
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "a").write_bytes(b"x" * 1000)
    (tmp_path / "run.sh").write_bytes(b"x" * 24)
    assert gpu_bundle.check_size(tmp_path, 1024) == {"plans": 1000, "run.sh": 24, "total": 1024}
    with pytest.raises(gpu_bundle.BundleError, match=r"1,024 bytes, at most 1,023 .* plans 1,000"):
        gpu_bundle.check_size(tmp_path, 1023)


def test_a_folder_that_git_would_add_is_refused(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("build/\n")
    gpu_bundle.check_ignored(tmp_path / "build" / "bundle", tmp_path)
    with pytest.raises(gpu_bundle.BundleError, match="git does not ignore"):
        gpu_bundle.check_ignored(tmp_path / "bundle", tmp_path)
    gpu_bundle.check_ignored(tmp_path.parent / "elsewhere", tmp_path)


def test_wheels_are_the_projects_and_what_it_needs_and_no_older_ones(tmp_path, monkeypatch):
    def download(folder, python):
        (folder / f"pydantic-{python}.whl").write_text("")

    monkeypatch.setattr(gpu_bundle, "download", download)
    built, wheels = tmp_path / "dist", tmp_path / "wheels"
    built.mkdir()
    with pytest.raises(gpu_bundle.BundleError, match="0 wheels of the project; run `make wheel`"):
        gpu_bundle.carry_wheels(wheels, built, "3.12")
    (built / "cgo_engine-0.1.0-py3-none-any.whl").write_text("")
    wheels.mkdir()
    (wheels / "pydantic-1.0.whl").write_text("of a bundle before")
    found = gpu_bundle.carry_wheels(wheels, built, "3.12")
    assert found == ["cgo_engine-0.1.0-py3-none-any.whl", "pydantic-3.12.whl"]


def test_the_suite_that_is_carried_lists_the_tests_that_need_a_gpu(tmp_path):
    found = gpu_bundle.carry_suite(tmp_path / "suite")
    assert "tests/equivalence/test_cuda.py" in found
    assert "tests/test_graph.py" not in found
    assert (tmp_path / "suite" / "gpu_tests.txt").read_text().split() == found
    assert not (tmp_path / "suite" / "cgo").exists()
    assert not list((tmp_path / "suite" / "tests").glob("nni"))  # it is not there
    for name in found:
        assert "import nni" not in (tmp_path / "suite" / name).read_text()


# --- the stages -----------------------------------------------------------------------------------


@pytest.fixture
def stages(tmp_path):
    """A bundle whose Python is a script: says what it was called with, and ends as it is told."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    gpu_bundle.carry_stages(bundle)
    for name in ("wheels", "plans", "suite", "home"):
        (bundle / name).mkdir()
    (bundle / "wheels" / "a.whl").write_text("")
    (bundle / "manifest.json").write_text("{}")
    (bundle / "suite" / "gpu_tests.txt").write_text("tests/test_a.py\n")
    python = tmp_path / "python"
    python.write_text(
        dedent("""\
        #!/bin/bash
        echo "$PWD $*" >> "$SHM/calls"
        [ "$2" = pip ] && [ "$3" = install ] && mkdir -p "${@: -2:1}"
        case "$*" in *$FAILS*) exit 3 ;; esac
    """)
    )
    python.chmod(0o755)

    def run(script, fails="nothing", **given):
        variables = {"PATH": os.environ["PATH"], "PY": str(python), "OUT": str(tmp_path / "out"),
                     "SHM": str(bundle / "home"), "FAILS": fails, **given}  # fmt: skip
        done = subprocess.run(["bash", str(bundle / script)], env=variables, cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        calls = (bundle / "home" / "calls").read_text().splitlines()
        return done.returncode, calls

    return run


def test_both_stages_are_run_and_any_failure_is_the_exit_status(stages, tmp_path):
    code, calls = stages("run.sh")
    assert code == 0
    done = [line.split(" ", 1) for line in calls]
    begins = ["-m pip install", "-m pip list", "-P -", "-m pytest", "benchmarks/gpu_profile.py",
              "benchmarks/gpu_suite.py"]  # fmt: skip
    assert len(done) == len(begins)
    assert all(line.startswith(begin) for (_, line), begin in zip(done, begins))
    assert {folder for folder, line in done[1:]} == {str(tmp_path / "bundle" / "suite")}
    assert "tests/test_a.py" in done[3][1]
    assert "--budget-s 400" in done[5][1]  # the first stage took no time
    assert len(list((tmp_path / "out").iterdir())) <= 6


def test_the_second_stage_gets_what_the_first_leaves(stages):
    _, calls = stages("run.sh", TOTAL="90")
    budget = int(re.search(r"--budget-s (\d+)", calls[-1])[1])
    assert 0 < budget <= 90


@pytest.mark.parametrize("part", ["-m pytest", "gpu_profile", "gpu_suite"])
def test_a_part_that_fails_stops_no_other_and_is_told(stages, part):
    code, calls = stages("run.sh", fails=part)
    assert code == 1
    assert "gpu_suite" in calls[-1]
    assert any("gpu_profile" in line for line in calls)


def test_a_profile_says_where_it_failed(tmp_path):
    out = tmp_path / "profile.txt"
    given = ["cnn", "--device", "cpu", "--size", "small", "--plans", str(tmp_path / "plans"),
             "--out", str(out)]  # fmt: skip
    assert gpu_profile.main(given) == 0
    text = out.read_text()
    assert text.startswith("== cnn ==\n")
    assert "aten::" in text
    assert "ms, of it the host" in text
    figures = tmp_path / "plans" / "cnn" / "figures.json"
    key = {"definition": "of other models"}
    figures.write_text(json.dumps({**json.loads(figures.read_text()), "key": key}))
    assert gpu_profile.main(given) == 1
    assert "a plan of other models" in out.read_text()


# --- the rehearsal --------------------------------------------------------------------------------

SUMMARY = """\
SKIPPED [10] tests/equivalence/test_cuda.py:35: no CUDA device: nothing of this was tested
SKIPPED [1] tests/test_a.py:3: could not import 'nni'
{last}
"""


def test_tests_are_counted_with_the_reasons_of_those_that_were_skipped():
    found = gpu_rehearsal.count_tests(SUMMARY.format(last="32 skipped in 42.10s"))
    assert found == {"skipped": 32, "others": [], "other_reasons": ["could not import 'nni'"]}
    last = "===== 1 failed, 30 skipped, 900 deselected, 6 errors in 1.2s ====="
    found = gpu_rehearsal.count_tests(SUMMARY.format(last=last))
    assert (found["skipped"], found["others"]) == (30, ["1 failed", "6 errors"])
    assert gpu_rehearsal.count_tests("it crashed")["skipped"] == 0


def test_a_rehearsal_is_judged_by_its_tests_sections_times_and_size(tmp_path):
    (tmp_path / "pytest.txt").write_text("12 skipped, 1 passed in 1s")
    sections = {"cnn": {"status": "ok", "seconds": 2.0}, "cells": {"status": "out of time"}}
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"sections": sections}))
    figures, wrong = gpu_rehearsal.judge(tmp_path, tmp_path, {"stage1": 261.0, "stage2": 3.0})
    assert figures["sections_s"] == {"cnn": 2.0, "cells": 0.0}
    assert [text.split(":")[0] for text in wrong] == [
        "12 tests that need a GPU, at least 32 are known", "tests that were not skipped",
        "section cells", "stage1 took 261 s, at most 260",
    ]  # fmt: skip


def test_a_rehearsal_has_no_network_no_repository_and_none_of_our_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for stage in gpu_rehearsal.STAGE_S:
        (bundle / f"{stage}.sh").write_text('pwd; env; "$PY" -c "import cgo"\n')
    log = io.StringIO()
    python = tmp_path / "python"
    python.symlink_to(sys.executable)  # without the virtual environment's packages
    place, seconds, wrong = gpu_rehearsal.rehearse(bundle, python, log)
    text = log.getvalue()
    assert set(seconds) == {"stage1", "stage2"}
    assert wrong == ["stage1 ended with 1", "stage2 ended with 1"]  # there is no cgo there
    assert str(ROOT) not in text.replace(str(tmp_path), "")
    assert "PYTHONPATH" not in text
    assert "PIP_NO_INDEX=1" in text
    assert "PLACE/here\n" in text
    assert not any((place / "here").iterdir())
