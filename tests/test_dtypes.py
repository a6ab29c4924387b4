import pytest
import torch

from cgo.dtypes import DTYPES, SYMBOLS, torch_constant, torch_dtype
from cgo.errors import GraphError


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_name_is_a_dtype(name):
    assert isinstance(torch_dtype(name), torch.dtype)
    assert str(torch_dtype(name)) == f"torch.{name}"


def test_constants():
    assert torch_constant("layout", "strided") is torch.strided
    assert torch_constant("memory_format", "channels_last") is torch.channels_last
    for kind, names in SYMBOLS.items():
        for name in names if kind != "device" else ():
            assert torch_constant(kind, name) is getattr(torch, name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dtype", "load"), ("dtype", "strided"), ("layout", "float32"), ("device", "trial"),
     ("hub", "load"), ("dtype", ""), ("memory_format", "__name__")],
)  # fmt: skip
def test_nothing_else_is_looked_up(kind, name):
    with pytest.raises(GraphError, match="is none that a graph can use"):
        torch_constant(kind, name)
