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
