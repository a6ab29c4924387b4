"""The command line, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cgo

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"

SEARCH = """
data: {source: "support.small:points", batch_size: 16}
training: {metrics: [accuracy], epochs: 2}
models:
  - module: support.small:mlp
    grid: {hidden: [3, 4]}
  - module: support.small:stemmed
    seeds: [0, 1]
  - module: support.small:raises_later
    kwargs: {after: 1000}
engine: {experiment_dir: out}
"""


def call(*arguments, folder, check=True):
    env = {**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cgo", *arguments] if sys.version_info >= (3, 11) else
        [sys.executable, "-m", "cgo", *arguments],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def search(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)
    return path


def test_run_trains_a_search_and_goes_on_with_it(search, tmp_path):
    done = call("run", str(search), folder=tmp_path)
    for expected in ("Leaderboard", "mlp-0.0", "dedup_stems", "loaders: 5 -> 1", "opaque lane"):
        assert expected in done.stdout
    assert len(cgo.open_experiment(tmp_path / "out").models()) == 5
    call("run", str(search), folder=tmp_path)
    assert len(cgo.open_experiment(tmp_path / "out").trials()) == 1


def test_explain_says_what_is_not_merged_and_trains_nothing(search, tmp_path):
    done = call("explain", str(search), "--dump", "--memory", folder=tmp_path)
    assert "Estimated peak memory" in done.stdout
    assert "raises_later-2.0 trains as an opaque lane: " in done.stdout
    assert "depends on trainable parameters" in done.stdout
    assert "cgo.input(" in done.stdout
    for title in ("Fused", "In no group", "predicted ms", "all groups: predicted"):
        assert title in done.stdout
    assert "others' " in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_is_exit_code_1_with_its_error(search, tmp_path):
    search.write_text(SEARCH.replace("{after: 1000}", "{after: 1}"))
    done = call("run", str(search), folder=tmp_path, check=False)
    assert done.returncode == 1
    assert "RuntimeError: gave up" in done.stdout


def test_a_bad_file_is_one_message_and_exit_code_2(search, tmp_path):
    search.write_text(SEARCH.replace("epochs: 2", "epochs: none"))
    done = call("run", str(search), folder=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: models[0].training: TrainingSpec: epochs")
    assert "Traceback" not in done.stderr


def test_the_commented_example_runs(tmp_path):
    for name in ("search.yaml", "search_nets.py"):
        (tmp_path / name).write_text((ROOT / "examples" / name).read_text())
    done = call("run", str(tmp_path / "search.yaml"), folder=tmp_path)
    assert "wide-1.0" in done.stdout


def test_the_demo_runs_whole(tmp_path):
    done = call("demo", "--experiment-dir", str(tmp_path / "demo"), folder=tmp_path)
    models = cgo.open_experiment(tmp_path / "demo").models()
    assert len(models) >= 24
    assert len({(m.module, str(m.kwargs)) for m in models}) == len(models)
    assert max(m.metric for m in models) >= 0.95
    for expected in ("Throughput", "serial loop, training", "merged, training", "best: "):
        assert expected in done.stdout


def test_no_arguments_print_the_help(tmp_path):
    done = call(folder=tmp_path, check=False)
    assert "explain" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["explain"], ["bench"]])
def test_help_needs_neither_torch_nor_a_database(command, tmp_path):
    """Beside the help, its process prints which modules it has imported."""
    program = (
        "import sys; from cgo.cli import main\n"
        "try: main()\n"
        "finally: print('modules:', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "Usage: " in done.stdout
    imported = set(done.stderr.split("modules:")[-1].split())
    assert "cgo.cli.commands" in imported
    assert not {"torch", "numpy", "sqlite3", "psutil", "cgo.engine"} & imported


def test_the_families_of_the_help_are_those_there_are():
    from cgo.bench.families import FAMILIES
    from cgo.cli import commands

    assert tuple(FAMILIES) == commands.FAMILIES


def test_texts_of_others_are_shown_and_not_obeyed():
    """No markup of rich's, no escape sequences, in ids, errors and arguments."""
    import io

    from rich.console import Console

    from cgo.cli import view
    from cgo.cli.explain import _families
    from cgo.passes.unmerged import Family

    text = "\x1b[2J[red]x[/nothing]\u202e\rhidden"
    model = cgo.Model(
        "support.small:mlp",
        {"hidden": 4},
        data=cgo.DataSpec("support.small:points", batch_size=8),
        training=cgo.TrainingSpec(),
    )
    model.error, model.model_id, model.kwargs = text, text, {text: text}
    shown = io.StringIO()
    console = Console(file=shown, width=300, force_terminal=True)
    for part in (
        view.leaderboard([model]), view.failures([model]), view.models_table([model], 5),
        view.plain(text), _families("x", [Family(op="op", nodes=1, reason=text, example=text)]),
    ):  # fmt: skip
        console.print(part)
    printed = shown.getvalue()
    assert printed.count("[red]x[/nothing]") >= 8
    for obeyed in ("\x1b[2J", "\u202e", "\r"):
        assert obeyed not in printed
    assert r"\x1b[2J" in printed
