"""The advisor of `nni_advisor.py`; NNI imports it in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
from nni.runtime.tuner_command_channel.command_type import CommandType


class GraphAdvisor(MsgDispatcherBase):  # type: ignore[misc]
    """Sends each document as a trial, and keeps the final metrics by model id.

    Args:
        documents: A JSON file with a list of GraphData documents.
        results: Where the metrics are written.
    """

    def __init__(self, documents: str, results: str) -> None:
        super().__init__()
        self._documents = json.loads(Path(documents).read_text())
        self._results = Path(results)
        self._metrics: dict[str, float] = {}
        self._finished = 0
        self._sent = 0

    def handle_initialize(self, data: Any) -> None:
        """The experiment begins."""
        self.send(CommandType.Initialized, "")

    def handle_request_trial_jobs(self, data: int) -> None:
        """NNI has room for so many trials."""
        for _ in range(data):
            if self._sent == len(self._documents):
                self.send(CommandType.NoMoreTrialJobs, "")
                return
            order = {
                "parameter_id": self._sent,
                "parameter_source": "algorithm",
                "parameters": self._documents[self._sent],
            }
            self.send(CommandType.NewTrialJob, json.dumps(order))
            self._sent += 1

    def handle_report_metric_data(self, data: Any) -> None:
        """Metrics name our models: they are never told apart by order or by parameter."""
        value = data["value"]
        payload = json.loads(value) if isinstance(value, str) else value
        payload = json.loads(payload) if isinstance(payload, str) else payload
        if data["type"] == "FINAL":
            self._metrics |= payload["metrics"]
            self._finished += 1
            partial = self._results.with_suffix(".part")
            partial.write_text(json.dumps({"trials": self._finished, "metrics": self._metrics}))
            partial.replace(self._results)

    def handle_trial_end(self, data: Any) -> None:
        """Nothing to do: the end may be told before the last metric."""

    def handle_update_search_space(self, data: Any) -> None:
        """There is none."""

    def handle_add_customized_trial(self, data: Any) -> None:
        """Trials are ours alone."""

    def handle_import_data(self, data: Any) -> None:
        """There is nothing to import."""
