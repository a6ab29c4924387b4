"""What is seen of a process after a trial; whole trials are in tests/test_worker.py."""

import gc
import importlib
import sys
import types

import pytest
import torch

from cgo.runtime.patches import Contents
from cgo.runtime.settings import Setting, Settings, python_settings
from cgo.runtime.torch_settings import RandomStates, torch_settings
from cgo.runtime.user_modules import UserModules


def test_settings_are_put_back_or_told_of():
    held = {"fixed": 1, "free": 1, "stubborn": 1, "gone": 1}

    def setting(name, write=None):
        return Setting(name, lambda: held[name], write)

    settings = Settings(
        (
            setting("fixed"),
            setting("free", lambda value: held.update(free=value)),
            setting("stubborn", lambda value: held.update(stubborn=3)),
            setting("gone", lambda value: None),
        )
    )
    assert settings.put_back() == []
    held.update(fixed=2, free=2, stubborn=2)
    del held["gone"]
    assert settings.put_back() == ["fixed", "stubborn", "gone"]
    assert held["free"] == 1


def test_this_process_can_be_asked_for_all_settings_and_given_them():
    settings = (*python_settings(), *torch_settings())
    assert len({setting.name for setting in settings}) == len(settings)
    before = Settings(settings)
    for setting in settings:
        if setting.write is not None:
            setting.write(setting.read())
    assert before.put_back() == []


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("torch.made")
    source = (
        "class Thing:\n    def act(self): ...\n\ndef call(x=1): ...\n\nvalue, count = None, 3\n"
    )
    exec(source, vars(made))
    made.Thing.__module__ = "torch.made"
    monkeypatch.setitem(sys.modules, "torch.made", made)
    return made


def test_an_untouched_module_has_not_changed(module):
    contents = Contents({"torch.made": module})
    module.count = 4
    module.sub = types.ModuleType("torch.made.sub")
    assert list(contents.changed()) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: setattr(m, "value", 1), "torch.made.value"),
        (lambda m: setattr(m, "count", 2), "torch.made.count"),
        (lambda m: setattr(m, "more", print), "torch.made.more"),
        (lambda m: delattr(m, "value"), "torch.made.value"),
        (lambda m: setattr(m.Thing, "act", print), "torch.made.Thing.act"),
        (lambda m: setattr(m.Thing, "__call__", print), "torch.made.Thing.__call__"),
        (lambda m: setattr(m.call, "__defaults__", (2,)), "None.call"),
        (lambda m: sys.modules.pop("torch.made"), "torch.made"),
    ],
)
def test_changes_of_modules_classes_and_functions_are_named(change, name, module):
    module.call.__module__ = "None"
    contents = Contents({"torch.made": module})
    change(module)
    assert name in list(contents.changed())


@pytest.fixture
def written(tmp_path, monkeypatch):
    (tmp_path / "a_user").mkdir()
    (tmp_path / "a_user" / "__init__.py").write_text("")
    (tmp_path / "a_user" / "nets.py").write_text("def net(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_users_modules_are_taken_out_and_what_holds_them_is_seen(written):
    users = UserModules()
    nets = importlib.import_module("a_user.nets")
    import graphlib  # of Python's, and imported by nobody else here

    held = nets.net
    assert users.take_out() == []
    assert "a_user" not in sys.modules
    assert "a_user.nets" not in sys.modules
    assert sys.modules["graphlib"] is graphlib
    del nets
    gc.collect()
    assert users.held() == ["a_user.nets"]
    assert held() is None
    del held
    gc.collect()
    assert users.held() == []
    assert importlib.import_module("a_user.nets").net
    users.take_out()


def test_random_streams_begin_anew():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        states = RandomStates()
        expected = torch.rand(3)
        torch.manual_seed(6)
        states.put_back()
        assert torch.initial_seed() == 5
        assert torch.equal(torch.rand(3), expected)
