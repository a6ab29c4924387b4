"""Events from a trial: what is read of them, and what is refused."""

import io
import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cgo.errors import TrialError
from cgo.events import MOST_ERROR, MOST_LINE, Event, checked, cut, decode, encode, events_in

ENDED = {"success": True, "error": None, "weights": "weights/a.safetensors", "sha256": "0" * 64}
FAILED = {"success": False, "error": "why", "weights": None, "sha256": None}
GOOD = [
    Event("a", "started", None, None),
    Event("a", "epoch", 0, {"train_loss": 1.5, "val_loss": math.inf, "lr": 1}),
    Event("a", "final", None, 0.5),
    Event("a", "ended", None, ENDED),
    Event("a", "ended", None, FAILED),
    Event("a", "ended", None, FAILED | {"cancelled": True}),
    Event("", "trial", None, {"what": "lowered", "models": 3}),
]


@pytest.mark.parametrize("event", GOOD)
def test_an_event_survives(event):
    assert decode(encode(event)) == event


def test_nan_survives():
    assert math.isnan(decode(encode(Event("a", "final", None, math.nan))).value)


@pytest.mark.parametrize(
    "event",
    [
        Event("../x", "started", None, None),
        Event("a\x1b[31m", "started", None, None),
        Event("a" * 300, "started", None, None),
        Event(1, "started", None, None),
        Event("", "started", None, None),
        Event("a", "trial", None, {"what": "lowered"}),
        Event("", "trial", None, {}),
        Event("", "trial", None, []),
        Event("a", "invented", None, None),
        Event("a", ["started"], None, None),
        Event("a", "started", 0, None),
        Event("a", "started", None, {}),
        Event("a", "epoch", None, {}),
        Event("a", "epoch", -1, {}),
        Event("a", "epoch", True, {}),
        Event("a", "epoch", 2**31, {}),
        Event("a", "epoch", 0, {"loss": "low"}),
        Event("a", "epoch", 0, {"loss": None}),
        Event("a", "epoch", 0, {"loss": 10**400}),
        Event("a", "epoch", 0, [1.0]),
        Event("a", "final", None, None),
        Event("a", "final", None, "0.5"),
        Event("a", "final", None, True),
        Event("a", "ended", None, None),
        Event("a", "ended", None, {"success": 1, "error": None}),
        Event("a", "ended", None, FAILED | {"error": None}),
        Event("a", "ended", None, FAILED | {"error": ["why"]}),
        Event("a", "ended", None, ENDED | {"weights": "../../x"}),
        Event("a", "ended", None, ENDED | {"weights": "/etc/passwd"}),
        Event("a", "ended", None, ENDED | {"weights": None}),
        Event("a", "ended", None, ENDED | {"sha256": 1}),
    ],
)
def test_other_forms_are_refused(event):
    with pytest.raises(TrialError, match=r"^not an event: ") as caught:
        checked(event)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


LINES = ["", "[]", "1", "null", "{", "[" * 100_000, "{}", '{"model": "a"}', "\x1b[2J", "1" * 5000,
         '{"model": "a", "kind": "started", "epoch": null, "value": null, "more": 1}']  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_that_are_no_events(line):
    with pytest.raises(TrialError, match="not an event: ") as caught:
        decode(line)
    assert str(caught.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
FIELDS = {
    "model": st.sampled_from(["a", "", "/"]) | JSON,
    "kind": st.sampled_from(["started", "epoch", "final", "ended", "trial"]) | JSON,
    "epoch": st.none() | st.integers(-1, 3) | JSON,
    "value": st.sampled_from([ENDED, FAILED, None, 1.0, {}]) | JSON,
}


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_any_line_is_an_event_or_refused(fields):
    try:
        event = decode(json.dumps(fields))
    except TrialError:
        return
    assert checked(event) is event


def test_a_stream_is_read_past_what_is_none(monkeypatch):
    monkeypatch.setattr("cgo.events.MOST_LINE", 200)
    first, last = encode(GOOD[0]), encode(GOOD[2])
    text = "\n".join([first, "x" * 10_000, "y" * 199, "nonsense", last])
    refused = []
    found = list(events_in(io.StringIO(text), refused.append))
    assert found == [GOOD[0], GOOD[2]]
    assert [text.partition(":")[0] for text in refused] == [
        "an event of more than 200 characters", "not an event", "not an event",
    ]  # fmt: skip


class Endless(io.StringIO):
    """A line without an end, of a hundred million characters."""

    left = 100 * MOST_LINE

    def readline(self, size):
        assert 0 < size <= MOST_LINE + 1, "a whole line is asked for"
        self.left -= size
        return "x" * size if self.left > 0 else ""


def test_an_endless_line_is_never_held_as_a_whole():
    refused = []
    assert list(events_in(Endless(), refused.append)) == []
    assert len(refused) == 1


def test_a_babbling_trial_does_not_fill_the_log():
    refused = []
    assert list(events_in(io.StringIO("nonsense\n" * 1000), refused.append)) == []
    assert len(refused) == 100
    assert refused[-1].endswith("(the last that is told)")


def test_long_errors_keep_both_ends():
    assert cut("short") == "short"
    done = cut("a" * MOST_ERROR + "b" * MOST_ERROR)
    assert done.startswith("a")
    assert done.endswith("b")
    assert len(done) < MOST_ERROR + 100
