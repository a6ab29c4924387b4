"""A module is put back as it was."""

import contextlib
import copy
from collections import OrderedDict, deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cgo.capture.kept import Kept


class Plain:
    """An object with attributes of any name."""

    def __init__(self, inner):
        self.inner = inner

    def __eq__(self, other):
        return type(other) is Plain and vars(self) == vars(other)

    __hash__ = None


LEAVES = st.none() | st.integers() | st.text(max_size=3)
NESTS = st.recursive(
    LEAVES | st.sets(st.integers(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(deque)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict)
        | inner.map(Plain)
    ),
    max_leaves=6,
)


def containers(value, depth=1):
    """Everything that can be written into, as deep as a module's attributes are looked into."""
    if depth == 4:
        return
    if isinstance(value, Plain):
        yield from containers(vars(value), depth + 1)
    if isinstance(value, (list, deque, dict, set)):
        yield value
    if isinstance(value, (list, deque, dict, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item, depth + 1)


def spoil(container, way):
    """Write into a container in one of several ways."""
    if way == 0 or not container:
        add = getattr(container, "append", None) or getattr(container, "add", None)
        add(-1) if add else container.update(new=-1)
    elif way == 1:
        container.clear()
    elif isinstance(container, dict):
        container.update(reversed([(key, container.pop(key)) for key in list(container)]))
        container[next(iter(container))] = object()
    elif isinstance(container, set):
        container.pop()
    else:
        container[0] = object()


@given(NESTS, st.data())
def test_nests_of_containers_are_put_back(nest, data):
    net = nn.Linear(2, 2)
    net.nest = nest
    before, found = copy.deepcopy(nest), list(containers(nest))
    kept = Kept(net)
    for container in found:
        if data.draw(st.booleans()):
            spoil(container, data.draw(st.integers(0, 2)))
    net.more = 1
    net.nest = None
    kept.put_back()
    assert net.nest is nest
    assert nest == before
    assert not hasattr(net, "more")
    assert list(map(id, containers(nest))) == list(map(id, found))


def test_the_order_of_a_dictionary_is_put_back():
    net = nn.Linear(2, 2)
    net.cache = {"a": 1, "b": 2}
    kept = Kept(net)
    net.cache["a"] = net.cache.pop("a")
    kept.put_back()
    assert list(net.cache) == ["a", "b"]


def bind_anew(net):
    net.weight = nn.Parameter(torch.zeros(3, 3))
    net.running = net.running + 1


def write(net):
    with torch.no_grad():
        net.weight.mul_(2)
    net.running += 1
    net.weight.requires_grad_(False)


def resize(net):
    net.running.resize_(5).zero_()
    net.weight.data = torch.ones(1)


def change_parts(net):
    net.register_buffer("more", torch.zeros(1))
    net.part = nn.Linear(1, 1)
    net.register_forward_hook(lambda *_: None)
    net.eval()


@pytest.mark.parametrize("change", [bind_anew, write, resize, change_parts])
def test_tensors_keep_who_they_are_and_what_they_hold(change):
    net = nn.Linear(2, 2)
    net.register_buffer("running", torch.arange(3.0))
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    values = {path: tensor.detach().clone() for path, tensor in own.items()}
    with contextlib.suppress(ZeroDivisionError), Kept(net).afterwards():
        net(torch.ones(1, 2)).sum().backward()
        change(net)
        raise ZeroDivisionError
    now = dict(net.named_parameters()) | dict(net.named_buffers())
    assert list(now) == list(own)
    for path, tensor in now.items():
        assert tensor is own[path]
        assert torch.equal(tensor, values[path])
        assert tensor.grad is None
        assert tensor.requires_grad is (path != "running")
    assert net.training
    assert not net._forward_hooks
    assert not list(net.children())
