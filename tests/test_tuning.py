"""The settings of tuning."""

import pytest

from cgo import Tuning
from cgo.errors import SpecError


def test_the_budget_is_a_share_of_long_trainings_and_bounded_in_short_ones():
    tuning = Tuning()
    assert tuning.budget_s(10_000) == 200
    assert tuning.budget_s(400) == 10
    assert tuning.budget_s(5) == 0.5
    assert Tuning(measure=False).budget_s(10_000) == 0


def test_settings_travel_as_json():
    tuning = Tuning(most_s=3.0, layout="stacked", width=4)
    assert Tuning.from_json(tuning.as_json()) == tuning
    assert tuning.forced
    assert not Tuning().forced


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": "diagonal"}, "layout 'diagonal' is none of lanes, stacked, channels"),
        ({"width": 0}, "width 0; at least 1"),
        ({"most_s": -1.0}, "most_s -1.0"),
        ({"share": 2.0}, "share 2.0"),
        ({"checkpoint": True, "tape": True}, "checkpoint with tape or compile"),
        ({"checkpoint": True, "compile": True}, "checkpoint with tape or compile"),
    ],
)
def test_senseless_settings_are_refused(given, message):
    with pytest.raises(SpecError, match=message):
        Tuning(**given)


def test_unknown_settings_are_refused():
    with pytest.raises(SpecError, match="tuning: speed is none of"):
        Tuning.from_json({"speed": 11})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"measure": 1}, "measure 1: Input should be a valid boolean"),
        ({"most_s": "fast"}, "most_s 'fast': Input should be a valid number"),
        ({"most_s": float("inf")}, "most_s inf: no finite number"),
        ({"share": float("nan")}, "share nan: no finite number"),
        ({"share": None}, "share None"),
        ({"record": 1}, "record 1: Input should be a valid string"),
        ({"layout": ["lanes"]}, "layout"),
        ({"width": 2.5}, "width 2.5"),
        ({"width": True}, "width True: Input should be a valid integer"),
        ({"tape": "yes"}, "tape 'yes'"),
        ({"compile": "gcc"}, "compile 'gcc'"),
        ({"memory_bytes": 2**70}, "memory_bytes"),
        ({"memory_bytes": "1G"}, "memory_bytes '1G'"),
        ({"checkpoint": None}, "checkpoint None"),
        ({"\x1b[31m": 1}, r"tuning: \\x1b\[31m is none of"),
    ],
)
def test_values_of_other_types_are_refused(given, message):
    with pytest.raises(SpecError, match=f"^tuning: .*{message.removeprefix('tuning: ')}"):
        Tuning.from_json(given)


@pytest.mark.parametrize("given", [[], None, 1, "fast"])
def test_settings_are_an_object(given):
    with pytest.raises(SpecError, match=r"^tuning: expected an object of settings"):
        Tuning.from_json(given)
