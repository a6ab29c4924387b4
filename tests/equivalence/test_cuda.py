"""The same equivalence on a CUDA device; skipped aloud where there is none."""

import gc
import math

import oracle
import pytest
import torch
from support import data, nets
from support.keyed import KeyedStreams
from support.merged import Case, relative
from support.observers import Losses

from cgo.planner import Planner
from cgo.runtime.training import train

pytestmark = pytest.mark.gpu


CAPTURED = {"measure": False, "capture": True}


def run(cases, folder, device, tuning=CAPTURED, events=None):
    """Losses and final metrics of a merged trial on the device."""
    losses = Losses()
    heard = [] if events is None else events
    plan = Planner().plan([case.model() for case in cases], folder, {"tuning": tuning})
    metrics = train(plan.graph_data, folder, heard.append, observer=losses, device=device)
    return losses.seen, metrics


def alone_on(device, case, moved, **given):
    """The plain loop there, over data that are there."""
    factory = getattr(nets, case.factory)
    return oracle.train_alone(
        lambda **kwargs: factory(**kwargs).to(device),
        case.kwargs,
        moved,
        seed=case.seed,
        batch_size=case.batch_size,
        **given,
        **case.training,
    )


def told(events, what):
    return [e.value for e in events if e.kind == "trial" and e.value["what"] == what]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_float64_losses_on_cuda_equal_the_plain_loop(cuda, optimizer, capture, tmp_path):
    training = {"optimizer": optimizer, "optimizer_kwargs": {"lr": 0.003}, "epochs": 20}
    families = ("mlp", "cnn", "residual", "cells", "encoder", "lstm", "tied")
    cases = [
        Case(f, f, seed=n, training={**training, "precision": "float64"})
        for n, f in enumerate(families)
    ]
    events = []
    tuning = {"measure": False, "capture": capture, "tape": capture}
    losses, metrics = run(cases, tmp_path, cuda, tuning, events)
    assert bool(told(events, "captured")) is capture
    assert not told(events, "eager")
    moved = tuple(tuple(part.to(cuda) for part in split) for split in data.arrays())
    for case in cases:
        alone = alone_on(cuda, case, moved)
        assert max(map(relative, losses[case.id], alone.losses)) <= 1e-8
        assert metrics[case.id] == pytest.approx(alone.history[-1]["val_accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    "tuning",
    [{"capture": True, "tape": True}, {"capture": False}, {"capture": True, "kernels": False}],
    ids=lambda tuning: ",".join(f"{key}={value}" for key, value in tuning.items()),
)
def test_dropout_on_cuda_equals_the_loop_that_draws_from_keyed_streams(cuda, tuning, tmp_path):
    """Replayed, eager, and without kernels of our own; the loop's numbers are NumPy's."""
    training = {"epochs": 8, "precision": "float64", "optimizer_kwargs": {"lr": 0.01}}
    families = ("mlp", "cnn", "residual", "cells", "encoder", "lstm", "tied")
    cases = [
        Case(f, f, {"dropout": 0.1 + n / 50}, seed=n, training=training)
        for n, f in enumerate(families)
    ]
    cases += [
        Case(kind, "trap", {"kind": kind}, seed=9, training=training)
        for kind in ("alpha_dropout", "noise", "strided_norm", "lasting_dropout")
    ]
    events = []
    losses, _ = run(cases, tmp_path, cuda, {"measure": False, **tuning}, events)
    assert bool(told(events, "captured")) is tuning["capture"]
    assert not told(events, "eager")
    moved = tuple(tuple(part.to(cuda) for part in split) for split in data.arrays())
    for case in cases:
        alone = alone_on(cuda, case, moved, streams=KeyedStreams)
        assert max(map(relative, losses[case.id], alone.losses)) <= 1e-8


def test_random_streams_on_cuda_do_not_depend_on_company(cuda, tmp_path):
    cases = [
        Case("dropout", "mlp", {"dropout": 0.3}, training={"epochs": 2}),
        Case("opaque", "trap", {"kind": "multinomial"}, training={"epochs": 2}),
        Case("other", "cnn", {"dropout": 0.2}, training={"epochs": 2}),
    ]
    together, _ = run(cases, tmp_path / "together", cuda)
    for case in cases:
        alone, _ = run([case], tmp_path / case.id, cuda)
        assert alone[case.id] == pytest.approx(together[case.id], rel=1e-5)
        assert len(alone[case.id]) == 10


def test_replays_are_deterministic(cuda, tmp_path):
    """With deterministic algorithms, the same trial gives the same bits, dropout included."""
    cases = [Case(f"m{n}", family, {"dropout": 0.2}, seed=n, training={"epochs": 8})
             for n, family in enumerate(("mlp", "cnn", "residual"))]  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, _ = run(cases, tmp_path / "first", cuda)
        second, _ = run(cases, tmp_path / "second", cuda)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


def test_a_lane_that_becomes_nan_changes_no_bit_of_its_neighbours(cuda, tmp_path):
    def company(name, lr):
        given = {"epochs": 4, "optimizer_kwargs": {"lr": lr}}
        cases = [Case("good", "cnn", seed=1, training={"epochs": 4}),
                 Case("bad", "cnn", seed=2, training=given)]  # fmt: skip
        return run(cases, tmp_path / name, cuda)[0]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole, broken = company("whole", 0.01), company("broken", 1e30)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not all(map(math.isfinite, broken["bad"]))
    assert broken["good"][: len(broken["bad"])] == whole["good"][: len(broken["bad"])]


def test_an_epoch_of_replays_does_not_synchronise(cuda, tmp_path):
    """`torch.cuda.set_sync_debug_mode` raises at whatever waits for the device."""
    from cgo.runtime.company import Company

    plain, epochs = Company._train, []

    def watched(self, loader, epoch, members):
        torch.cuda.set_sync_debug_mode("error" if epoch > 2 else "default")
        try:
            plain(self, loader, epoch, members)
            epochs.append(epoch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    cases = [Case("a", "mlp", {"dropout": 0.2}, training={"epochs": 5}),
             Case("b", "cnn", training={"epochs": 5})]  # fmt: skip
    plan = Planner().plan([case.model() for case in cases], tmp_path, {"tuning": CAPTURED})
    Company._train = watched
    try:
        metrics = train(plan.graph_data, tmp_path, lambda event: None, device=cuda)
    finally:
        Company._train = plain
    assert epochs == list(range(5))
    assert set(metrics) == {"a", "b"}


def test_out_of_memory_divides_the_models(cuda, tmp_path):
    # Activations are most of what they take: the models' own state cannot be divided.
    cases = [Case(f"m{n}", "cnn", {"width": 64}, seed=n, batch_size=160, training={"epochs": 2})
             for n in range(8)]  # fmt: skip
    events = []
    # Nothing is planned, so that memory does run out.
    unplanned = {**CAPTURED, "memory_bytes": 2**60}
    whole, _ = run(cases, tmp_path / "whole", cuda, unplanned, events)
    peak = max(e["measured_bytes"] for e in told(events, "memory") if "measured_bytes" in e)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(cuda)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, 0.75 * peak / total))
    events = []
    try:
        short, _ = run(cases, tmp_path / "short", cuda, unplanned, events)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told(events, "divided")
    for model, losses in whole.items():
        assert short[model] == pytest.approx(losses, rel=1e-4)
