"""The README's example and the examples folder do what they say."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

installed = {distribution.metadata["Name"] for distribution in distributions()}
needs_nni = pytest.mark.skipif("nni" not in installed, reason="NNI is not installed")


def run(path, folder, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_example_runs(tmp_path):
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(example.strip().splitlines()) <= 12
    script = tmp_path / "script.py"
    script.write_text(example)
    assert "trained" in run(script, tmp_path)


@pytest.mark.parametrize("name", ["quickstart.py", "listener.py"])
def test_examples_run(name, tmp_path):
    assert "best:" in run(ROOT / "examples" / name, tmp_path)


@needs_nni
def test_the_nni_search_runs(tmp_path):
    options = ("--models", "3", "--epochs", "1", "--alone", "--platform", "local")
    output = run(ROOT / "examples" / "nni_search.py", tmp_path, *options)
    assert "3 models trained; the best:" in output
    assert "models a minute" in output


@pytest.mark.long
@needs_nni
def test_the_nni_advisor_runs(tmp_path):
    output = run(ROOT / "examples" / "nni_advisor.py", tmp_path)
    names = {line.split()[0] for line in output.splitlines() if line.startswith("width-")}
    assert names == {f"width-{width}" for width in (8, 16, 32, 64, 128)}


def test_the_readme_names_targets_that_exist():
    targets = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text()))
    makefile = (ROOT / "Makefile").read_text()
    assert {"test", "test-all", "lint", "typecheck"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
