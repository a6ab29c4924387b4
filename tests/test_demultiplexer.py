"""From streams of events to attributes and listener calls, keyed by model id."""

import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cgo
from cgo import AbstractGraphListener, ModelStatus
from cgo.demultiplexer import Demultiplexer
from cgo.events import Event

DATA = cgo.DataSpec("support.small:points", batch_size=16)


def model(id_, epochs=3):
    training = cgo.TrainingSpec(metrics=("accuracy",), epochs=epochs)
    return cgo.Model("support.small:mlp", data=DATA, training=training, model_id=id_)


def row(value):
    return {"train_loss": 1.0, "val_loss": 2.0, "val_accuracy": value, "lr": 0.1, "seconds": 0.5}


def stream(id_, metrics, error=None):
    """The events of one model, as a trial sends them."""
    events = [Event(id_, "started", None, None)]
    events += [Event(id_, "epoch", epoch, row(value)) for epoch, value in enumerate(metrics)]
    if error is None:
        events.append(Event(id_, "final", None, metrics[-1]))
    ended = {"success": error is None, "error": error, "weights": f"weights/{id_}", "sha256": "0"}
    return [*events, Event(id_, "ended", None, ended)]


class Calls(AbstractGraphListener):
    def __init__(self):
        self.seen = {}

    def on_metric(self, model, metric):
        self.seen.setdefault(model.model_id, []).append(("final", metric))

    def on_intermediate_metric(self, model, metric):
        self.seen.setdefault(model.model_id, []).append(("epoch", metric))

    def on_training_end(self, model, success):
        self.seen.setdefault(model.model_id, []).append(("end", success))


class Bench:
    """A demultiplexer with its journal and one listener."""

    def __init__(self, *models):
        self.journal = []
        self.demultiplexer = Demultiplexer(
            lambda trial, event: self.journal.append(event), lambda trial, ended: lambda: {}
        )
        self.calls = Calls()
        self.demultiplexer.register(self.calls)
        for each in models:
            self.demultiplexer.add(each)

    def feed(self, events):
        for event in events:
            self.demultiplexer.dispatch("t", event)
        return self


class Finals(AbstractGraphListener):
    """All that a listener has to define."""

    def __init__(self):
        self.seen = []

    def on_metric(self, model, metric):
        self.seen.append((model.model_id, metric))


def facts(each):
    return (each.status, each.metric, each.intermediate_metrics, each.history, each.error)


def test_a_listener_need_define_on_metric_only():
    listener, bench = Finals(), Bench(model("a"), model("b"))
    bench.demultiplexer.register(listener)
    bench.feed(stream("a", [0.25, 0.5])).feed(stream("b", [0.1], error="it raised"))
    assert listener.seen == [("a", 0.5)]
    assert bench.calls.seen["a"][-1] == ("end", True)  # the others are still called

    class Nothing(AbstractGraphListener):
        pass

    with pytest.raises(TypeError, match="on_metric"):
        Nothing()


def test_a_plain_stream_sets_attributes_and_calls_in_order():
    a = model("a")
    bench = Bench(a).feed(stream("a", [0.1, 0.2, 0.3]))
    assert a.status is ModelStatus.TRAINED
    assert a.metric == 0.3
    assert a.intermediate_metrics == [0.1, 0.2, 0.3]
    assert a.history == [row(0.1), row(0.2), row(0.3)]
    assert a.state_dict() == {}
    assert bench.calls.seen["a"] == [
        ("epoch", 0.1), ("epoch", 0.2), ("epoch", 0.3), ("final", 0.3), ("end", True),
    ]  # fmt: skip


def test_a_failed_model_keeps_its_epochs_and_has_no_metric():
    a = model("a")
    bench = Bench(a).feed(stream("a", [0.1], error="it broke"))
    assert facts(a) == (ModelStatus.FAILED, None, [0.1], [row(0.1)], "it broke")
    assert bench.calls.seen["a"] == [("epoch", 0.1), ("end", False)]
    with pytest.raises(cgo.CgoError, match="has no weights"):
        a.state_dict()


def test_the_journal_is_written_before_anyone_is_told():
    a = model("a")
    order = []
    demultiplexer = Demultiplexer(lambda trial, e: order.append(e.kind), lambda t, e: lambda: {})

    class Late(Calls):
        def on_intermediate_metric(self, model, metric):
            order.append("told")

    demultiplexer.register(Late())
    demultiplexer.add(a)
    for event in stream("a", [0.1])[:2]:
        demultiplexer.dispatch("t", event)
    assert order == ["started", "epoch", "told"]


def test_aliases_get_their_twins_events():
    a, b = model("a"), model("b")
    bench = Bench(a, b)
    bench.demultiplexer.alias("b", "a")
    bench.feed(stream("a", [0.1, 0.2]))
    assert facts(a) == facts(b)
    assert bench.calls.seen["a"] == bench.calls.seen["b"]
    assert [e.model for e in bench.journal if e.kind == "ended"] == ["a", "b"]


def test_unknown_models_late_and_repeated_events_are_logged_and_change_nothing(caplog):
    a = model("a")
    events = stream("a", [0.1, 0.2])
    bench = Bench(a).feed(events)
    before = facts(a)
    caplog.set_level(logging.INFO)
    bench.feed([Event("stranger", "epoch", 0, row(0.9)), *events])
    assert facts(a) == before
    assert "unknown model 'stranger'" in caplog.text
    assert "late event" in caplog.text
    assert len(bench.journal) == len(events)


def test_an_epoch_ahead_of_a_gap_waits_for_the_missing_one(caplog):
    a = model("a")
    start, first, second, final, end = stream("a", [0.1, 0.2])
    bench = Bench(a).feed([start, second])
    assert a.intermediate_metrics == []
    bench.feed([first, final, end])
    assert a.intermediate_metrics == [0.1, 0.2]
    assert "came before epoch 0" in caplog.text


def test_an_epoch_that_never_comes_does_not_hold_the_end(caplog):
    a = model("a")
    start, _, second, final, end = stream("a", [0.1, 0.2])
    Bench(a).feed([start, second, final, end])
    assert a.status is ModelStatus.TRAINED
    assert a.intermediate_metrics == [0.2]
    assert "is missing" in caplog.text


def test_an_end_without_a_final_metric_takes_the_last_epochs(caplog):
    a = model("a")
    events = [event for event in stream("a", [0.1, 0.2]) if event.kind != "final"]
    bench = Bench(a).feed(events)
    assert a.metric == 0.2
    assert ("final", 0.2) in bench.calls.seen["a"]


def test_a_raising_listener_is_logged_and_stops_nobody(caplog):
    a = model("a")
    bench = Bench(a)

    class Broken(Calls):
        def on_intermediate_metric(self, model, metric):
            raise ValueError("listener bug")

    later = Calls()
    bench.demultiplexer.register(Broken())
    bench.demultiplexer.register(later)
    bench.feed(stream("a", [0.1]))
    assert "ValueError: listener bug" in caplog.text
    assert later.seen == bench.calls.seen


def test_trial_events_are_written_and_told_to_nobody():
    bench = Bench(model("a")).feed([Event("", "trial", None, {"what": "finished"})])
    assert [event.kind for event in bench.journal] == ["trial"]
    assert bench.calls.seen == {}


def test_waiting_ends_with_the_last_model_and_its_listeners():
    a, b = model("a"), model("b")
    bench = Bench(a, b)
    assert not bench.demultiplexer.wait(["a"], 0.01)
    thread = threading.Thread(target=lambda: bench.feed(stream("a", [0.1]) + stream("b", [0.2])))
    thread.start()
    assert bench.demultiplexer.wait(["a", "b"], 10)
    assert bench.calls.seen["b"][-1] == ("end", True)
    thread.join()


@st.composite
def interleavings(draw):
    """Streams of several models, interleaved, with events repeated anywhere after they came."""
    streams = []
    for name in draw(st.sampled_from(["ab", "abc", "abcd"])):
        metrics = draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))
        error = draw(st.sampled_from([None, "broke"]))
        streams.append(stream(name, metrics, error))
    left = [list(events) for events in streams]
    mixed = []
    while any(left):
        source = draw(st.sampled_from([events for events in left if events]))
        mixed.append(source.pop(0))
        if draw(st.booleans()):
            mixed.append(draw(st.sampled_from(mixed)))
    return streams, mixed


@given(interleavings())
def test_any_interleaving_with_repeats_equals_the_plain_streams(case):
    streams, mixed = case
    plain = [model(events[0].model) for events in streams]
    messy = [model(events[0].model) for events in streams]
    expected = Bench(*plain).feed(event for events in streams for event in events)
    found = Bench(*messy).feed(mixed)
    assert [facts(each) for each in messy] == [facts(each) for each in plain]
    assert found.calls.seen == expected.calls.seen


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_listener_that_leaves_is_logged_and_the_thread_goes_on(raised, caplog):
    a = model("a")
    bench = Bench(a)

    class Leaves(Calls):
        def on_intermediate_metric(self, model, metric):
            raise raised

    bench.demultiplexer.register(Leaves())
    thread = threading.Thread(target=lambda: bench.feed(stream("a", [0.1])))
    thread.start()
    thread.join()
    assert a.status is ModelStatus.TRAINED
    assert f"{type(raised).__name__}" in caplog.text
    assert bench.calls.seen["a"][-1] == ("end", True)


def test_a_journal_that_cannot_be_written_keeps_nobody_waiting(caplog):
    def full(trial, event):
        raise OSError("no space left")

    a = model("a")
    demultiplexer = Demultiplexer(full, lambda trial, ended: lambda: {})
    demultiplexer.add(a)
    for event in stream("a", [0.1, 0.2]):
        demultiplexer.dispatch("t", event)
    assert demultiplexer.wait(["a"], 0)
    assert facts(a)[:3] == (ModelStatus.TRAINED, 0.2, [0.1, 0.2])
    assert "ended of model 'a' is not in the journal" in caplog.text
    assert "no space left" in caplog.text


def test_one_of_two_equal_models_is_ended_by_itself(caplog):
    a, b = model("a"), model("b")
    demultiplexer = Bench(a, b).demultiplexer
    demultiplexer.alias("b", "a")
    first, *rest = stream("a", [0.1, 0.2, 0.3])
    demultiplexer.dispatch("t", first)
    value = {"success": False, "error": "enough", "weights": None, "sha256": None}
    ended = Event("a", "ended", None, value | {"cancelled": True})
    demultiplexer.end("-", ended)
    assert demultiplexer.ended("a")
    assert not demultiplexer.settled("a")
    demultiplexer.end("-", ended)  # again
    for event in rest:
        demultiplexer.dispatch("t", event)
    assert demultiplexer.settled("a")
    assert (a.status, a.history, a.error) == (ModelStatus.CANCELLED, [], "enough")
    assert (b.status, len(b.history)) == (ModelStatus.TRAINED, 3)
    assert "late event" not in caplog.text  # nobody wonders that it trained on
