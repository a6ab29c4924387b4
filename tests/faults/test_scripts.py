"""Searches as people start them: scripts, modules, standard input; and Ctrl-C, pressed once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
WAIT_S = 180

#: What a search script is; FOLDER is where its experiment goes.
NET = """
import sys
import cgo
from torch import nn
print("this is", __name__, flush=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        return self.body(x)


def data():
    from support.small import points
    return points()


def search(name):
    spec = cgo.DataSpec(f"{name}:data", batch_size=20)
    model = cgo.Model(f"{name}:Net", data=spec, training=cgo.TrainingSpec(), model_id="m")
    with cgo.CGOEngine(FOLDER, import_paths=[TESTS]) as engine:
        engine.submit_models(model)
        engine.wait_models()
    print("ended", model.status.value, model.error, flush=True)
"""


def written(path, tmp_path, body, source=NET):
    path.parent.mkdir(parents=True, exist_ok=True)
    source = source.replace("FOLDER", repr(str(tmp_path / "out"))).replace(
        "TESTS", repr(str(TESTS))
    )
    path.write_text(source + body)
    return path


def started(arguments, folder, **options):
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it puts into the background with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def run(arguments, folder, given=None):
    with started(arguments, folder, stdin=subprocess.PIPE) as child:
        try:
            out, err = child.communicate(given, timeout=WAIT_S)
        finally:
            child.kill()
    return child.returncode, out, err


GUARDED = """
if __name__ == "__main__":
    search(NAME)
"""


def test_a_script_that_names_itself_is_not_imported_twice(tmp_path):
    path = written(tmp_path / "my_search.py", tmp_path, GUARDED.replace("NAME", '"my_search"'))
    code, out, err = run([path], tmp_path)
    assert out == "this is __main__\nended trained None\n", err
    assert code == 0
    (log,) = tmp_path.glob("out/trials/*/log.txt")
    assert log.read_text().splitlines().count("this is my_search") == 1


def test_a_script_without_a_guard_is_refused_when_its_model_is_made(tmp_path):
    path = written(tmp_path / "my_search.py", tmp_path, '\nsearch("my_search")\n')
    code, out, err = run([path], tmp_path)
    assert code == 1
    assert out == "this is __main__\n"
    assert "SpecError: DataSpec: " in err.splitlines()[-1]
    assert "source: 'my_search:data' lives in the script being run" in err.splitlines()[-1]
    assert 'if __name__ == "__main__":' in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_module_of_a_package_that_is_run_by_its_name(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    body = GUARDED.replace("NAME", '"package.module"')
    written(tmp_path / "package" / "module.py", tmp_path, body)
    code, out, err = run(["-m", "package.module"], tmp_path)
    assert (code, out) == (0, "this is __main__\nended trained None\n"), err


@pytest.mark.long
def test_a_script_in_a_package_that_is_run_by_its_path(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    body = GUARDED.replace("NAME", '"script"')
    path = written(tmp_path / "package" / "script.py", tmp_path, body)
    code, out, err = run([path], tmp_path)
    assert (code, out) == (0, "this is __main__\nended trained None\n"), err


def test_code_from_standard_input_may_name_a_module(tmp_path):
    written(tmp_path / "nets.py", tmp_path, "")
    code, out, err = run(["-"], tmp_path, 'import nets\nnets.search("nets")\n')
    assert (code, out) == (0, "this is nets\nended trained None\n"), err


def test_a_module_that_searches_when_it_is_imported_says_so_and_waits_for_nobody(tmp_path):
    """It is being imported all the while; a trial that imports it would search again."""
    body = '\nsearch("my_search")\n'
    path = written(tmp_path / "my_search.py", tmp_path, body)
    code, out, err = run(["-c", "import my_search"], tmp_path)
    assert out.startswith("this is my_search\nended failed "), err
    assert "NestedEngineError: a CGOEngine was made inside a trial, by" in out
    assert f"{path}, line " in out
    assert code == 0


#: A search whose planner, or dispatcher, stays in user code.
STUCK = """
import sys
import threading
import time
import cgo
from torch import nn


def factory():
    if threading.current_thread() is not threading.main_thread():
        print("stuck", flush=True)
        time.sleep(600)
    return nn.Linear(6, 3)


def importing():
    print("stuck", flush=True)
    import endless_module


def leaver():
    return nn.Linear(6, 3)


class Listener(cgo.AbstractGraphListener):
    def on_intermediate_metric(self, model, metric):
        print("stuck", flush=True)
        time.sleep(600)

    def on_metric(self, model, metric):
        pass

    def on_training_end(self, model, success):
        print("told", success, model.status.value, flush=True)


def engine_of(name):
    engine = cgo.CGOEngine(FOLDER, import_paths=[TESTS])
    engine.register_graph_listener(Listener())
    spec = cgo.DataSpec("support.small:points", batch_size=20)
    model = cgo.Model(f"stuck_search:{name}", data=spec, training=cgo.TrainingSpec(), model_id="m")
    engine.submit_models(model)
    return engine, model


def waits(name):
    engine, model = engine_of(name)
    with engine:
        try:
            engine.wait_models()
        finally:
            print("waited", model.status.value, flush=True)


def closes(name):
    engine, model = engine_of(name)
    time.sleep(3)
    engine.close()
    print("closed", model.status.value, flush=True)


def leaves(name):
    engine_of(name)
    time.sleep(3)
    print("left", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    print("done", flush=True)
"""


@pytest.fixture
def stuck(tmp_path):
    written(tmp_path / "stuck_search.py", tmp_path, "", STUCK)
    (tmp_path / "endless_module.py").write_text("import time\ntime.sleep(600)\n")

    def start(how, name):
        return started(["stuck_search.py", how, name], tmp_path)

    return start


def until(child, line):
    for found in child.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"{line!r} was never printed: {child.stderr.read()}")


@pytest.mark.parametrize(
    "name", ["factory", "importing", pytest.param("leaver", marks=pytest.mark.long)]
)
def test_one_interrupt_ends_a_search_that_is_in_user_code(name, stuck):
    """In a factory, in an import, and in a listener."""
    with stuck("waits", name) as child:
        try:
            until(child, "stuck")
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=WAIT_S)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    thread = "dispatcher" if name == "leaver" else "planner"
    assert f"cgo-{thread} is still at " in err
    assert "it is left behind" in err
    if name != "leaver":  # whose dispatcher tells nobody anything
        assert out == "told False cancelled\nwaited cancelled\n"


@pytest.mark.parametrize(
    ("how", "printed"), [("closes", "closed cancelled\ndone"), ("leaves", "left")]
)
def test_closing_needs_no_interrupt(how, printed, stuck):
    """By itself, and when Python ends."""
    with stuck(how, "factory") as child:
        try:
            out, err = child.communicate(timeout=WAIT_S)
        finally:
            child.kill()
    assert child.returncode == 0, err
    assert printed in out
    assert "cgo-planner is still at " in err
    assert "stuck_search.py" in err
