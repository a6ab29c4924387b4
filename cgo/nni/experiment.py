"""One call that lets a `NasExperiment` run merged."""

from __future__ import annotations

from typing import Any, TypeVar

from nni.experiment.config.utils import parse_time
from nni.nas.experiment import NasExperiment

from cgo.nni.engine import CGOExecutionEngine

Experiment = TypeVar("Experiment", bound=NasExperiment)


def merge_experiment(experiment: Experiment, **options: Any) -> Experiment:
    """Let an experiment train its models merged: `merge_experiment(NasExperiment(...)).run()`.

    `max_trial_number` and `max_experiment_duration` of its config are counted in models. NNI's own
    manager is not started: for NNI's training services, and its web page, give
    `platform=NniPlatform(...)`.

    Args:
        experiment: Not running yet; changed in place.
        options: Arguments of `CGOExecutionEngine`.

    Returns:
        The experiment.
    """

    def factory(config: Any) -> CGOExecutionEngine:
        canonical = experiment.config.canonical_copy()
        duration = canonical.max_experiment_duration
        limits = {
            "max_models": canonical.max_trial_number,
            "max_duration_s": None if duration is None else float(parse_time(duration)),
        }
        return CGOExecutionEngine(**limits | options)

    experiment.execution_engine_factory = factory
    experiment._nni_manager_required = lambda: False
    return experiment
