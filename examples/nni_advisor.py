"""A plain NNI experiment whose own advisor sends GraphData documents to merged trials.

No engine of ours: models are planned here, each document is one trial's parameter, and the trial's
command is `python -m cgo.trial`. Metrics come back by model id. Needs `cgo-engine[nni]`.

    python examples/nni_advisor.py
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nni_advisor_side
from nni.experiment import CustomAlgorithmConfig, Experiment

import cgo
from cgo.planner import Planner


def document(widths: list[int], folder: Path) -> dict[str, Any]:
    """Perceptrons of these widths, merged into one document."""
    data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
    training = cgo.TrainingSpec(metrics=("accuracy",), optimizer="Adam", epochs=3)
    models = [
        cgo.Model("cgo.zoo:mlp", {"widths": [width]}, data=data, training=training,
                  model_id=f"width-{width}")
        for width in widths
    ]  # fmt: skip
    plan = Planner().plan(models, folder)
    assert plan.graph_data is not None, plan.failures
    return plan.graph_data.dump()


def main() -> None:
    """Run the experiment and print what each model reached."""
    with tempfile.TemporaryDirectory(prefix="cgo-nni-advisor-") as temporary:
        folder = Path(temporary)
        documents = [document([8, 16, 32], folder / "a"), document([64, 128], folder / "b")]
        (folder / "documents.json").write_text(json.dumps(documents))
        experiment = Experiment("local")
        experiment.config.trial_command = f"{sys.executable} -m cgo.trial"
        experiment.config.trial_code_directory = Path(nni_advisor_side.__file__).parent
        experiment.config.trial_concurrency = 1
        experiment.config.max_trial_number = len(documents)
        experiment.config.search_space = {}
        experiment.config.experiment_working_directory = str(folder / "nni")
        experiment.config.tuner = None
        experiment.config.advisor = CustomAlgorithmConfig(
            class_name="nni_advisor_side.GraphAdvisor",
            code_directory=Path(nni_advisor_side.__file__).parent,
            class_args={"documents": str(folder / "documents.json"),
                        "results": str(folder / "results.json")},
        )  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        experiment.start(port)
        try:
            results = _wait_for(folder / "results.json", len(documents))
        finally:
            experiment.stop()
    for name, accuracy in sorted(results.items(), key=lambda item: -item[1]):
        print(f"{name:<10} {accuracy:.3f}")


def _wait_for(path: Path, trials: int, seconds: float = 120) -> dict[str, float]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists():
            found = json.loads(path.read_text())
            if found["trials"] == trials:
                return dict(found["metrics"])
        time.sleep(0.5)
    raise TimeoutError(f"no results after {seconds:g} s")


if __name__ == "__main__":
    main()
