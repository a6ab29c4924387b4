"""What is installed, and what importing it costs."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def modules_after(code):
    probe = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    found = modules_after("import cgo")
    assert not {"torch", "numpy", "pydantic", "cgo.engine", "cgo.model"} & found


def test_a_trial_imports_no_engine_and_no_pass_that_merges():
    found = modules_after("import cgo.trial, cgo.runtime.training")
    assert "cgo.runtime.lanes" in found
    unwanted = {"cgo.engine", "cgo.scheduler", "cgo.planner", "cgo.store", "cgo.cli", "typer"}
    assert not unwanted & found
    assert not any(name.startswith("cgo.capture") for name in found)
    # Layouts go by costs, which are those of the trial's device; whether stems are stored, in which
    # order nodes run and where models are placed goes by its data, its memory and its devices.
    passes = {name for name in found if name.startswith("cgo.passes.")}
    names = "assign_layouts balance order_nodes place samplewise sharing split_stems work"
    assert passes == {f"cgo.passes.{name}" for name in names.split()}


def test_metrics_and_graphs_of_no_run_are_not_imported():
    """torchmetrics and with it scipy, scikit-learn, networkx: each takes a while."""
    found = modules_after("import cgo.engine, cgo.runtime.training, cgo.zoo; cgo.zoo.digits()")
    assert not {"torchmetrics", "scipy", "sklearn", "networkx", "torch._dynamo"} & found


def test_every_exported_name_is_there():
    import cgo

    assert all(getattr(cgo, name) is not None for name in cgo.__all__)
    assert set(cgo.__all__) <= set(dir(cgo))


def test_the_wheel_holds_one_import_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), "."],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cgo"}
    for needed in (
        "cgo/py.typed", "cgo/graph_data.schema.json", "cgo/search.schema.json",
        "cgo/passes/dedup_stems.py", "cgo/runtime/lanes.py", "cgo/capture/convert.py",
        "cgo/cli/demo.py", "cgo/platforms/local.py", "cgo/platforms/nni_fence.js",
    ):  # fmt: skip
        assert needed in names
