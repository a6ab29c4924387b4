"""The README's example and the examples folder do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(path, folder):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(example.strip().splitlines()) <= 12
    script = tmp_path / "script.py"
    script.write_text(example)
    assert "trained" in run(script, tmp_path)


@pytest.mark.parametrize("name", ["quickstart.py", "listener.py"])
def test_examples_run(name, tmp_path):
    assert "best:" in run(ROOT / "examples" / name, tmp_path)


def test_the_readme_names_targets_that_exist():
    targets = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text()))
    makefile = (ROOT / "Makefile").read_text()
    assert {"test", "test-all", "lint", "typecheck"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
