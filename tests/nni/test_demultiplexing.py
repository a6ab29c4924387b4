"""Metrics of trials that run side by side reach their own models, whatever the order."""

import random
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cgo.events import Event
from cgo.platforms.base import TrialRequest
from cgo.platforms.nni import NniPlatform, _Running


class Told:
    """A platform that is told what NNI would tell, without NNI."""

    def __init__(self, trials):
        self.events, self.exits = [], []
        self.platform = NniPlatform(concurrency=len(trials))
        self.platform.start(
            lambda trial, event: self.events.append((trial, event)), self.exits.append
        )
        for trial in trials:
            request = TrialRequest(trial, Path("/nowhere"))
            self.platform._running[trial] = _Running(request)

    def wait_for_exit(self):
        for _ in range(100):
            if self.exits:
                return
            time.sleep(0.05)


def payload(trial, sequence, **rest):
    return {"trial": trial, "job": f"job-{trial}", "sequence": sequence, "pid": 1,
            "host": "elsewhere", **rest}  # fmt: skip


def own_value(model, epoch):
    """A number that no other model has in any epoch."""
    trial, _, number = model.partition("-m")
    return 1000.0 * int(trial[1:]) + 10.0 * int(number) + epoch


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 5),
    st.integers(0, 2**32),
)
def test_no_metric_reaches_a_wrong_model(sizes, epochs, seed):
    """Trials of random sizes; their metrics interleaved at random, some of them told twice."""
    dice = random.Random(seed)
    trials = [f"t{n}" for n in range(len(sizes))]
    told = Told(trials)
    queues = []
    for trial, size in zip(trials, sizes):
        rows = [
            payload(trial, epoch, events={
                f"{trial}-m{m}": [["epoch", epoch, {"val": own_value(f"{trial}-m{m}", epoch)}]]
                for m in range(size)
            })
            for epoch in range(epochs)
        ]  # fmt: skip
        queues.append([*rows, payload(trial, epochs, metrics={})])
    expected = sum(size * epochs for size in sizes)
    while any(queues):
        queue = dice.choice([queue for queue in queues if queue])
        metric = queue.pop(0)
        for _ in range(dice.choice([1, 1, 2])):
            told.platform._heard(metric)
    assert len(told.events) == expected
    assert sorted(ended.trial_id for ended in told.exits) == trials
    assert not any(ended.error for ended in told.exits)
    for trial, event in told.events:
        assert event.model.startswith(f"{trial}-")
        assert event.value["val"] == own_value(event.model, event.epoch)


def test_an_end_before_the_last_metric_waits_for_it():
    told = Told(["t0"])
    told.platform._heard(payload("t0", 0, events={"m": [["started", None, None]]}))
    told.platform._ended("job-t0", "SUCCEEDED")
    assert not told.exits
    told.platform._heard(payload("t0", 1, events={"m": [["final", None, 0.5]]}))
    told.platform._heard(payload("t0", 2, metrics={"m": 0.5}))
    told.wait_for_exit()
    assert [e.kind for _, e in told.events] == ["started", "final"]
    assert told.exits[0].error is None


def test_jobs_that_end_unheard_are_told_once_it_is_certain_whose_they_were():
    """Two trials wait; NNI hands parameters out in its own order, so one end alone says nothing."""
    told = Told(["t0", "t1"])
    told.platform._ended("job-x", "FAILED")
    assert not told.exits
    told.platform._heard(payload("t0", 0, events={}))
    told.platform._ended("job-y", "FAILED")
    told.wait_for_exit()
    assert [ended.trial_id for ended in told.exits] == ["t1"]
    assert Event("m", "started", None, None) not in [e for _, e in told.events]
