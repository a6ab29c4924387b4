import math

import pytest

from cgo import limits
from cgo.errors import GraphDataError, GraphDataTooLargeError
from cgo.limits import check_counts, check_tensor, check_values, storage_elements


@pytest.mark.parametrize(
    "value",
    [{}, {"a": [1, 2.5, None, True, "é", {"b": []}]}, {"a": (1, 2)}, {"a": 2**1000}, {"a": -0.0}],
)
def test_json_values(value):
    check_values(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, math.inf]}, "^a.1: inf is no finite number"),
        ({"a": {"b": math.nan}}, "^a.b: nan is no finite"),
        ({"a": 2**2000}, "^a: a number of 2,001 bits"),
        ({"a": b"x"}, "^a: a bytes is no JSON value"),
        ({"a": {1: 2}}, "^a: the key 1 is no text"),
        ({"\ud800": 1}, "half a character"),
        ({"a\n": {"x" * 100: math.inf}}, r"^'a\\n'.'x{60}': inf"),
        (object(), "^the document: a object is no JSON value"),
    ],
)
def test_other_values(value, message):
    with pytest.raises(GraphDataError, match=message):
        check_values(value)


def test_depth():
    def nested(levels):
        return {"a": nested(levels - 1)} if levels else 1

    check_values(nested(limits.MOST_DEPTH))
    with pytest.raises(GraphDataTooLargeError, match="nested too deeply"):
        check_values(nested(limits.MOST_DEPTH + 2))


def test_length(monkeypatch):
    monkeypatch.setattr(limits, "MOST_TEXT", 3)
    check_values({"abc": "abc"})
    for value in ({"abcd": 1}, {"a": ["abcd"]}):
        with pytest.raises(GraphDataTooLargeError, match="a text of 4 characters; at most 3"):
            check_values(value)


def test_counts(monkeypatch):
    monkeypatch.setattr(limits, "MOST_MODELS", 2)
    check_counts({"models": [1], "aliases": {"a": "b"}, "nodes": 7})
    with pytest.raises(GraphDataTooLargeError, match="has 3 models; at most 2"):
        check_counts({"models": [1, 2], "aliases": {"a": "b"}})


@pytest.mark.parametrize(
    ("shape", "stride", "elements"),
    [((2, 3), None, 6), ((), None, 1), ((2, 3), (1, 2), 6), ((2, 3), (10, 1), 13), ((4,), (0,), 1),
     ((0, 5), (1, 1), 0), ((), (), 1)],
)  # fmt: skip
def test_memory_that_a_tensor_reaches_into(shape, stride, elements):
    assert storage_elements(shape, stride) == elements
    check_tensor("%x", shape, stride)


@pytest.mark.parametrize(
    ("shape", "stride", "message"),
    [
        ((-1,), None, "a negative size in shape"),
        ((2,), (-1,), "a negative stride"),
        ((2, 2), (1,), "1 strides for 2 dimensions"),
        ((1,) * 65, None, "a tensor of 65 dimensions"),
        ((2**36, 2), None, "at most 68,719,476,736 elements"),
        ((0, 2**62), None, "at most"),
        ((2, 2), (2**36, 1), "strides .* reach over more"),
        ((1, 2), (2**62, 1), "strides .* reach over more"),
    ],
)
def test_tensors_that_are_refused(shape, stride, message):
    with pytest.raises(GraphDataError, match=f"^%x: .*{message}"):
        check_tensor("%x", shape, stride)
