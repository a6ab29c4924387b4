"""Import paths."""

import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cgo.errors import ImportPathError
from cgo.imports import (
    _has_guard,
    import_roots,
    is_import_path,
    libraries_of,
    loaded,
    resolve,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b:c", True), ("a:c.d", True), ("a.b", False), ("a:b:c", False), ("a b:c", False)],
)
def test_the_form_of_an_import_path(text, expected):
    assert is_import_path(text) is expected


def test_resolving_finds_attributes_of_attributes():
    assert resolve("collections:OrderedDict.fromkeys") is not None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json", "not of the form"),
        ("__main__:thing", "move it to a module"),
        ("no_such_module_at_all:x", "cannot import 'no_such_module_at_all'"),
        ("json:nothing", "module 'json' has no 'nothing'"),
        ("support.raises_on_import:x", "RuntimeError: broken at import"),
    ],
)
def test_what_cannot_be_resolved_says_why(path, message):
    with pytest.raises(ImportPathError, match=f"^source: .*{message}"):
        resolve(path, field="source")


def test_roots_are_the_folders_of_user_modules_only():
    tests = str(Path(__file__).parent)
    paths = ["support.small:mlp", "support.nets:cnn", "torch.nn:Linear", "json:loads"]
    assert import_roots(paths) == (tests,)


def test_libraries_are_those_that_modules_of_users_hold_names_of(tmp_path, monkeypatch):
    """Through further modules of users; not Python's own, nor what every trial imports."""
    (tmp_path / "fresh_space.py").write_text(
        "import json, torch\nfrom sklearn.datasets import load_digits\nimport fresh_parts\n"
        "from fresh_parts import made\n"
    )
    (tmp_path / "fresh_parts.py").write_text(
        "import fresh_space\nimport safetensors.torch as st\nfrom pydantic import BaseModel\n"
        "made = st.torch.Size()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries_of({"fresh_space"}) == ()
    import fresh_space

    assert fresh_space
    found = libraries_of({"fresh_space.Net", "json", "nothing.there"})
    assert found == ("pydantic.main", "safetensors.torch", "sklearn.datasets._base")
    for name in ("fresh_space", "fresh_parts"):
        del sys.modules[name]


def test_a_module_that_is_not_imported_yet_is_found(tmp_path, monkeypatch):
    (tmp_path / "fresh_user_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_roots(["fresh_user_module:value"]) == (str(tmp_path),)
    assert "fresh_user_module" not in sys.modules


@pytest.fixture
def running(tmp_path, monkeypatch):
    """Makes a script the one that runs, as `python FILE` does."""

    def run(source, name="my_search", spec_name=None):
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        main = ModuleType("__main__")
        main.__file__ = str(path)
        main.__spec__ = None if spec_name is None else SimpleNamespace(name=spec_name)
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.syspath_prepend(tmp_path)
        exec(compile(source, str(path), "exec"), main.__dict__)
        return main

    return run


GUARD = "\nif __name__ == '__main__':\n    pass\n"
NET = "class Net:\n    part = 3\n"


def test_a_name_of_the_running_script_is_that_script_and_is_not_imported(running):
    main = running(NET + GUARD)
    assert resolve("my_search:Net") is main.Net
    assert resolve("my_search:Net.part") == 3
    assert loaded("my_search") is main
    assert "my_search" not in sys.modules
    with pytest.raises(ImportPathError, match="module 'my_search' has no 'Missing'"):
        resolve("my_search:Missing")
    assert "my_search" not in sys.modules


def test_a_module_that_runs_by_its_name_is_found_by_it(running):
    main = running(NET + GUARD, name="module", spec_name="package.module")
    assert resolve("package.module:Net") is main.Net


def test_a_script_without_a_guard_is_refused_with_the_way_out(running):
    running(NET)
    with pytest.raises(
        ImportPathError, match=r"source: 'my_search:Net' lives in the script being"
    ) as e:
        resolve("my_search:Net", field="source")
    assert "my_search.py" in str(e.value)
    assert "under `if __name__ == \"__main__\":`, or move 'Net' to a module" in str(e.value)


def test_other_modules_are_what_they_were_beside_a_script(running):
    running(NET)
    assert resolve("json:loads") is json.loads


@pytest.mark.parametrize(
    ("source", "guarded"),
    [
        ("if __name__ == '__main__':\n    main()", True),
        ("if '__main__' == __name__ and True:\n    main()", True),
        ("if __name__ != '__main__':\n    raise ImportError\nmain()", True),
        ("__name__ == '__main__' and main()", True),
        ("main() if __name__ == '__main__' else None", True),
        ("try:\n    if __name__ in ('__main__', 'x'):\n        main()\nfinally:\n    pass", True),
        ("main()", False),
        ("def main():\n    if __name__ == '__main__':\n        pass\nmain()", False),
        ("if __name__ == 'other':\n    main()", False),
        ("x = '__main__'; y = __name__", False),
        ("this is no Python", True),
    ],
)
def test_what_counts_as_a_guard(source, guarded, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(source)
    assert _has_guard(str(path)) is guarded


def test_a_script_that_cannot_be_read_is_taken_to_have_a_guard(tmp_path):
    assert _has_guard(str(tmp_path / "archive.pyz" / "__main__.py"))


def test_a_module_that_another_thread_imports_is_taken_as_far_as_it_has_come(tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text(
        "import threading\nvalue = 3\ngo = threading.Event()\ngo.wait(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=resolve, args=("slow_module:value",))
    thread.start()
    while not hasattr(sys.modules.get("slow_module"), "go"):
        time.sleep(0.01)
    assert resolve("slow_module:value") == 3
    assert thread.is_alive()
    sys.modules["slow_module"].go.set()
    thread.join()
    del sys.modules["slow_module"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("def __getattr__(name):\n    raise GeneratorExit", "GeneratorExit"),
    ],
)
def test_a_module_that_leaves_when_it_is_imported_is_an_error(body, text, tmp_path, monkeypatch):
    (tmp_path / "leaving_module.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportPathError, match=f"cannot import 'leaving_module' .*: {text}$"):
        resolve("leaving_module:value")
    sys.modules.pop("leaving_module", None)


def test_a_module_that_a_program_made_has_no_root(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
    assert import_roots(["made_up:value"]) == ()
