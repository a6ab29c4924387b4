"""Torch's private names: each stands in one module, and is there in this version."""

import ast
import importlib
import pkgutil
from functools import reduce
from pathlib import Path

import pytest
import torch

import cgo.passes
import cgo.private
import cgo.runtime
from cgo.private import causal_masks, interpreter
from cgo.runtime.tape import TapeError, compile_tape, record
from cgo.runtime.taped import Taped

MODULES = [name for _, name, _ in pkgutil.iter_modules(cgo.private.__path__)]
NAMES = [
    (module, name)
    for module in MODULES
    for name in importlib.import_module(f"cgo.private.{module}").NAMES
]


def resolved(name):
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        return reduce(getattr, parts[size:], found)
    raise AttributeError(name)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_this_torch_still_has(module, name):
    try:
        resolved(name)
    except AttributeError as error:
        pytest.fail(
            f"torch {torch.__version__} has no {name}, see cgo/private/{module}.py: {error}"
        )


def private_names(path):
    """Names under torch, imported or read, that have an underscore at the front somewhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found = [ast.unparse(node)]
        else:
            continue
        for name in (name for name in found if "(" not in name):
            parts = name.split(".")
            hidden = [p for p in parts if p.startswith("_") and not p.startswith("__")]
            if parts[0] == "torch" and hidden:
                yield name


def sources():
    for package in (cgo, cgo.passes, cgo.runtime):
        for folder in package.__path__:
            yield from (p for p in Path(folder).rglob("*.py") if p.parent.name != "private")


#: A check that the documentation of torch names, with its underscore.
PUBLIC = {"torch._assert_async"}


def test_nobody_else_reaches_for_private_names():
    found = {(path.name, name) for path in sources() for name in private_names(path)}
    assert {pair for pair in found if pair[1] not in PUBLIC} == set()


@pytest.fixture
def without_torchscript(monkeypatch):
    monkeypatch.setattr(interpreter, "NAMES", ("torch._C.CompilationUnitOfAnotherTorch",))


def test_without_torchscript_steps_are_replayed_from_python(without_torchscript):
    weight = torch.randn(3, requires_grad=True)

    def step(x):
        weight.grad = None
        loss = (x * weight).sum().square()
        loss.backward()
        return [loss.detach(), weight.grad]

    x = torch.randn(3)
    with pytest.raises(TapeError, match="CompilationUnitOfAnotherTorch"):
        compile_tape(record(step, (x,))[1])
    taped = Taped(step, [], wanted=True)
    for _ in range(4):
        expected = [value.clone() for value in step(x)]
        assert all(torch.equal(a, b) for a, b in zip(taped([x]), expected))
    assert taped.replaying


def test_a_torch_that_finds_causal_masks_in_another_way_is_left_alone(monkeypatch):
    monkeypatch.delattr("torch.nn.modules.transformer._detect_is_causal_mask")
    with causal_masks.detected_by(lambda *given: False):
        assert not hasattr(torch.nn.modules.transformer, "_detect_is_causal_mask")
