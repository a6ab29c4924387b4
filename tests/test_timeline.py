"""Where the time went: read from a journal, all of it accounted for."""

import pytest

from cgo.events import Event
from cgo.store import Store, open_experiment
from cgo.timeline import timeline


@pytest.fixture
def clock(monkeypatch):
    """The journal's time, set by hand."""
    now = [100.0]
    monkeypatch.setattr("cgo.store.time.time", lambda: now[0])
    return now


def trial(what, **figures):
    return Event("", "trial", None, {"what": what, **figures})


def epoch(model, number, seconds):
    return Event(model, "epoch", number, {"val_loss": 1.0, "seconds": seconds})


def test_each_part_is_told(tmp_path, clock):
    store = Store(tmp_path)
    report = {"capture_s": 1.5, "merge_s": 0.5, "estimate": {"plain_s": 40.0}}
    store.add_trial("t0000", ["a", "b"], report)
    for at, event in (
        (100.25, trial("begun")),
        (101.0, trial("lowered", seconds=0.1)),
        (103.0, trial("tuned", seconds=2.0)),
        (107.0, epoch("a", 0, 6.0)),
        (107.0, epoch("b", 0, 6.0)),
        (111.0, epoch("a", 1, 4.0)),
        (111.5, trial("finished")),
    ):
        clock[0] = at
        store.record("t0000", event)
    store.close()
    (spent,) = timeline(open_experiment(tmp_path))
    assert (spent.trial_id, spent.models, spent.alone_s) == ("t0000", 2, 40.0)
    parts = (spent.capture_s, spent.merge_s, spent.start_s, spent.lowering_s, spent.tuning_s)
    assert parts == (1.5, 0.5, 0.25, 0.75, 2.0)
    assert (spent.training_s, spent.other_s) == (8.0, 0.5)
    assert spent.total_s == 13.5


def test_a_trial_that_told_nothing_and_one_that_died(tmp_path, clock):
    store = Store(tmp_path)
    store.add_trial("t0000", ["a"], {"models": 1, "part_of": "t0009"})
    store.add_trial("t0001", ["a"], {})
    clock[0] = 103.0
    store.record("t0001", trial("begun"))
    store.close()
    (spent,) = timeline(open_experiment(tmp_path))
    assert (spent.trial_id, spent.start_s, spent.total_s) == ("t0001", 3.0, 3.0)
    assert spent.alone_s is None
