"""Runs a trial in this process that further models join, or that is told to end some."""

import math

import pytest
from support.merged import ALL, KNOWN, Case, Merged

from cgo import trial
from cgo.commands import Command, Commands
from cgo.planner import Planner


@pytest.fixture
def unlimited(monkeypatch):
    """Joining may take any time: these trials train for a moment."""
    monkeypatch.setattr("cgo.runtime.allowance.SHARE", math.inf)


def add_of(cases, folder, batch_operators=ALL, tuning=KNOWN):
    """The command that adds cases, with their document written into `folder`."""
    settings = {"tuning": tuning.as_json(), "trial_id": folder.name}
    plan = Planner(True, batch_operators).plan([c.model() for c in cases], folder, settings)
    assert not plan.failures, plan.failures
    ids = tuple(entry.id for entry in plan.graph_data.models)
    return Command("add", str(folder / "graph.json"), ids)


class Joined(Merged):
    """A merged trial that is commanded after epochs of its models.

    Args:
        cases: Those that it begins with.
        orders: What is commanded after an epoch, by (model, epoch): commands, or cases to add.
        folder: The trial's is in it, and those of what is added.
        step: Called at each loss with (this, model, step).
    """

    def __init__(self, cases, orders, folder, batch_operators=ALL, step=None, **given):
        self.commands, self.step = Commands(), step
        self.orders = {}
        for number, (when, order) in enumerate(orders.items()):
            if order and isinstance(order[0], Case):
                order = [add_of(order, folder / f"added-{number}", batch_operators)]
            self.orders[when] = order
        (folder / "trial").mkdir(parents=True)
        super().__init__(cases, folder / "trial", True, batch_operators, **given)

    def run(self, data, *, folder, report):
        self.report = report
        return trial.execute(
            data, folder=folder, report=self.heard, observer=self, commands=self.commands
        )

    def heard(self, event):
        self.report(event)
        if event.kind == "epoch":
            for command in self.orders.pop((event.model, event.epoch), ()):
                self.commands.put(command)

    def on_loss(self, model, step, loss):
        super().on_loss(model, step, loss)
        if self.step is not None:
            self.step(self, model, step)

    def order(self):
        """Which models were trained in which epoch, one after another."""
        return [(event.model, event.epoch) for event in self.events if event.kind == "epoch"]
