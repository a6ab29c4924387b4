"""Whether merging can win, everything counted; where it cannot, models train as they are.

What merging costs comes before training: a model is captured, merged, lowered and written down.
What it saves is a share of every step. So few steps, or one model, may not repay it. Both sides are
estimated from the time of a step of some of the models and from figures that were measured once:
they need to be right only where the two are close, and there it matters little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """What is known of one model before it is captured."""

    step_s: float  # forward and backward of one full batch
    layers: int  # parts of the module without parts of their own


@dataclass(frozen=True)
class Costs:
    """What a model and one of its layers cost before a step is trained, in seconds.

    Measured on one thread of a CPU, for the networks of `cgo demo` and of NAS-Bench-201: to capture
    and merge in the engine, where a model is called some times, and to lower in the trial; of a
    trial as a whole, to write its steps' code and try it.

    Example:
        >>> costs, small = Costs(), Sample(step_s=0.004, layers=12)
        >>> 0.05 < costs.capture(small) < 0.1
        True
        >>> costs.lowering(small)
        0.048
    """

    model_s: float = 0.01
    calls: float = 3.5
    layer_s: float = 0.0035
    lowered_layer_s: float = 0.004
    trial_s: float = 0.4

    def capture(self, sample: Sample) -> float:
        """Seconds of capturing and merging one model."""
        return self.model_s + sample.layers * self.layer_s + self.calls * sample.step_s

    def lowering(self, sample: Sample) -> float:
        """Seconds of making it a part of a program."""
        return sample.layers * self.lowered_layer_s


#: Training and evaluation alone against merged, by the number of models from which on: small
#: steps gain more, and on a GPU the time is in the launches that are saved.
_GAINS = {
    "cpu": ((1, 1.1), (2, 1.25), (4, 1.5)),
    "cuda": ((1, 1.5), (2, 1.9), (4, 3.0), (16, 6.0)),
}

#: Seconds of a step on a CPU from which on nothing but the layout of images is gained.
_LARGE_S = 0.1
_LEAST_GAIN = 1.05

#: An evaluated batch takes such a part of a training step, and that as much of its forward and
#: backward, with the optimizer's part.
_EVALUATION, _OPTIMIZER = 0.35, 1.25


@dataclass(frozen=True)
class Estimate:
    """Both sides of the decision, in seconds of one worker."""

    models: int
    plain_s: float
    merged_s: float

    @property
    def merge(self) -> bool:
        """Whether merging is expected to win."""
        return self.merged_s < self.plain_s

    def __str__(self) -> str:
        return (
            f"{self.models} model(s): {self.plain_s:.2g} s one after another, "
            f"{self.merged_s:.2g} s merged, capture and lowering counted"
        )

    def share(self, models: int) -> Estimate:
        """The part of some of the models, which are like the others."""
        part = models / self.models
        return Estimate(models, self.plain_s * part, self.merged_s * part)


def estimate(
    samples: Sequence[Sample],
    epochs: Sequence[int],
    batches: tuple[int, int],
    *,
    device: str = "cpu",
    spare_s: float = 0.0,
    costs: Costs | None = None,
) -> Estimate:
    """Estimate both ways of training.

    Args:
        samples: Of some of the models; the others are taken to be like their mean.
        epochs: Of each model.
        batches: Of an epoch's training, and of its evaluation.
        device: "cpu", or any other for a GPU.
        spare_s: For how long workers are not ready yet, so that captures cost nothing.
        costs: What comes before training.

    Example:
        >>> small = Sample(step_s=0.004, layers=12)
        >>> estimate([small], [1] * 16, (23, 6)).merge
        False
        >>> estimate([small], [20] * 16, (23, 6)).merge
        True
    """
    costs = costs or Costs()
    training, evaluation = batches
    step_s = _OPTIMIZER * sum(sample.step_s for sample in samples) / len(samples)
    each = len(epochs) / len(samples)
    capture_s = each * sum(map(costs.capture, samples))
    lowering_s = costs.trial_s + each * sum(map(costs.lowering, samples))
    plain_s = step_s * sum(epochs) * (training + _EVALUATION * evaluation)
    trained_s = plain_s / gain(len(epochs), step_s, device)
    merged_s = max(0.0, capture_s - spare_s) + lowering_s + trained_s
    return Estimate(len(epochs), plain_s, merged_s)


def gain(models: int, step_s: float, device: str) -> float:
    """How many times faster models are expected to train merged."""
    table = _GAINS["cpu" if device == "cpu" else "cuda"]
    most = next(value for least, value in reversed(table) if models >= least)
    if device != "cpu":
        return most
    share = min(1.0, step_s / _LARGE_S)
    return max(_LEAST_GAIN, most + share * (_LEAST_GAIN - most))
