"""The same equivalence on a CUDA device; skipped aloud where there is none."""

import oracle
import pytest
from support import data, nets
from support.merged import Case, relative

from cgo.planner import Planner
from cgo.runtime.training import train

pytestmark = pytest.mark.gpu


def run(cases, folder, device):
    """Losses and final metrics of a merged trial on the device."""
    losses = {}

    class Losses:
        def on_loss(self, model, step, loss):
            losses.setdefault(model, []).append(float(loss))

        def on_gradients(self, model, step, gradients):
            pass

    plan = Planner().plan([case.model() for case in cases], folder)
    metrics = train(plan.graph_data, folder, lambda event: None, observer=Losses(), device=device)
    return losses, metrics


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_float64_losses_on_cuda_equal_the_plain_loop(cuda, optimizer, tmp_path):
    training = {"optimizer": optimizer, "optimizer_kwargs": {"lr": 0.003}, "epochs": 20}
    families = ("mlp", "cnn", "residual", "cells", "encoder", "lstm", "tied")
    cases = [
        Case(f, f, seed=n, training={**training, "precision": "float64"})
        for n, f in enumerate(families)
    ]
    losses, metrics = run(cases, tmp_path, cuda)
    moved = tuple(tuple(part.to(cuda) for part in split) for split in data.arrays())
    for case in cases:
        factory = getattr(nets, case.factory)
        alone = oracle.train_alone(
            lambda factory=factory, **kwargs: factory(**kwargs).to(cuda),
            case.kwargs,
            moved,
            seed=case.seed,
            batch_size=case.batch_size,
            **case.training,
        )
        assert max(map(relative, losses[case.id], alone.losses)) <= 1e-8
        assert metrics[case.id] == pytest.approx(alone.history[-1]["val_accuracy"], abs=1e-6)


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
