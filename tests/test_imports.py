"""Import paths."""

import sys
from pathlib import Path

import pytest

from cgo.errors import ImportPathError
from cgo.imports import import_roots, is_import_path, resolve


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


def test_a_module_that_is_not_imported_yet_is_found(tmp_path, monkeypatch):
    (tmp_path / "fresh_user_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_roots(["fresh_user_module:value"]) == (str(tmp_path),)
    assert "fresh_user_module" not in sys.modules
