"""The models that share a loader: its batches go to all of them, epoch by epoch.

Models that have trained for as many epochs step together, as one company. Those that join later
are a company of their own: its program is made beside that of the others, which goes on as it is.
A model sees the batches of its own epochs in the order of those epochs, so that companies at
different epochs have no batch in common. They take turns, whole epochs each: who is behind trains,
the others wait, and where both have come to the same epoch they become one company, if that
repays. Nobody waits for longer, all in all, than it still had to train: who has waited for as many
epochs as it has left takes every other turn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cgo.graph import Graph, ModelId, restrict
from cgo.model import DataSpec
from cgo.runtime.allowance import Allowance
from cgo.runtime.company import Company, Setting
from cgo.runtime.data import Loader, open_data
from cgo.runtime.member import Member
from cgo.runtime.tuning import Tuner
from cgo.user_code import told

log = logging.getLogger(__name__)


class Cohort:
    """The companies that share a loader.

    Args:
        spec: Of their data.
        regrouped: Merges the graphs of companies that become one.
        allowance: What that may take.
        setting: Of the trial; its tuners are made once for each device.
    """

    def __init__(
        self,
        spec: DataSpec,
        regrouped: Callable[[Sequence[Graph]], Graph],
        allowance: Allowance,
        setting: Setting,
    ) -> None:
        self.spec = spec
        self.companies: list[Company] = []
        self._regrouped, self._allowance = regrouped, allowance
        self._make_tuner = setting.tuner
        self._tuners: dict[torch.device, Tuner] = {}
        self._setting = replace(setting, tuner=self._tuner)
        self._loader: Loader | None = None
        self._turns = 0
        self._apart: set[frozenset[ModelId]] = set()  # who could not become one company

    def _tuner(self, device: torch.device) -> Tuner:
        if device not in self._tuners:
            self._tuners[device] = self._make_tuner(device)
        return self._tuners[device]

    def company(
        self,
        graph: Graph,
        members: Sequence[Member],
        constants: Mapping[str, Tensor],
        *,
        feeding: bool = False,
    ) -> Company:
        """Models that are to step together, once they are added."""
        return Company(graph, members, constants, replace(self._setting, feeding=feeding))

    def add(self, company: Company) -> None:
        """Let a company train from now on, after those who wait already."""
        company.turn = self._turns
        self.companies.append(company)

    def close(self) -> None:
        """Close what is open: the tables of costs, and the loader, whose processes then end."""
        self._loader = None
        for tuner in self._tuners.values():
            tuner.close()

    def running(self) -> list[Member]:
        """Models that still train."""
        return [member for company in self.companies for member in company.running()]

    def epoch(self) -> None:
        """One epoch of the company whose turn it is."""
        self.companies = [company for company in self.companies if company.running()]
        self._meet()
        company = self._next()
        others = [other for other in self.companies if other is not company]
        fresh = company.made_s is None
        if fresh:
            company.inherited += [other.stems for other in others if other.stems is not None]
        company.epoch(self._open)
        self._allowance.trained(company.last_s - (company.made_s or 0.0) * fresh)
        if fresh:
            self._account(company, max((other.last_s for other in others), default=company.last_s))

    def _open(self) -> Loader:
        if self._loader is None:
            self._loader = Loader(open_data(self.spec), self.companies[0].lanes[0].device)
        return self._loader

    def _next(self) -> Company:
        """Of those that are behind, and those that have waited enough, who trained least lately."""
        behind = min(company.behind for company in self.companies)
        first = min((c for c in self.companies if c.behind == behind), key=lambda c: c.turn)
        due = [c for c in self.companies if c is first or c.waited >= c.left]
        chosen = min(due, key=lambda company: company.turn)
        for company in self.companies:
            company.waited += company is not chosen and company.behind > behind
        self._turns += 1
        chosen.turn = self._turns
        return chosen

    def _account(self, company: Company, epoch_s: float) -> None:
        """Tell what a new company's program has taken, and learn from it."""
        joining = company.joined_s is not None
        seconds = (company.made_s or 0.0) + (company.joined_s or 0.0)
        self._allowance.made(len(company.members), seconds, joining=joining)
        if joining:
            ids = sorted(company.members)
            self._setting.tell("joined", models=ids, seconds=seconds, epoch_s=epoch_s)

    # --- companies that become one ----------------------------------------------------------------

    def _meet(self) -> None:
        """Make one company of those that have come to the same epoch, where that repays."""
        by_epoch: dict[int, list[Company]] = {}
        for company in self.companies:
            by_epoch.setdefault(company.behind, []).append(company)
        for found in by_epoch.values():
            if len(found) > 1 and self._repays(found):
                self._merge(found)

    def _repays(self, companies: Sequence[Company]) -> bool:
        """Whether a common program costs less than it saves: the shorter epoch, each time."""
        members = [member for company in companies for member in company.running()]
        if frozenset(member.id for member in members) in self._apart:
            return False
        shortest = min(company.last_s for company in companies)
        epochs = sorted((company.left for company in companies), reverse=True)[1]
        return self._allowance.allows(len(members), gain_s=shortest * epochs)

    def _merge(self, companies: Sequence[Company]) -> None:
        started = time.perf_counter()
        members = [member for company in companies for member in company.running()]
        ids = {member.id for member in members}
        try:
            for company in companies:
                company.settle()
            graphs = [restrict(company.graph, models=ids) for company in companies]
            graph = self._regrouped([graph for graph in graphs if graph.nodes])
            constants = {k: v for company in companies for k, v in company.constants.items()}
            feeding = any(company.setting.feeding for company in companies)
            one = self.company(graph, members, constants, feeding=feeding)
        except Exception as error:  # it would only save time
            log.warning("models are not merged: %s", told(error))
            self._apart.add(frozenset(ids))
            return
        one.joined_s = time.perf_counter() - started
        one.turn = min(company.turn for company in companies)
        one.waited = max(company.waited for company in companies)
        one.inherited = [company.stems for company in companies if company.stems is not None]
        self.companies = [c for c in self.companies if c not in companies] + [one]

    def sync(self) -> None:
        """Bring each model's own optimizer up to date, for a checkpoint."""
        for company in self.companies:
            company.sync()
