"""How much of a trial's time may be spent on models that join it while others train."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Of the time that was trained, what joining may take from those that train.
SHARE = 0.05


@dataclass
class Allowance:
    """Seconds that joining has taken, and that training has earned it.

    To read a document, build its models and make their program takes time in which nobody trains.
    It may take a fixed share of the time in which was trained; what would take more waits until
    that much was trained, or until nobody is left to wait for it.

    Args:
        share: Of the time that was trained; infinite: nothing waits.
        a_model_s: What making a program has taken for each of its models, the last time.
    """

    share: float
    a_model_s: float = 0.0
    trained_s: float = 0.0
    spent_s: float = 0.0

    def allows(self, models: int, gain_s: float = math.inf) -> bool:
        """Whether a program for so many models may be made now.

        Args:
            models: How many.
            gain_s: What it is expected to save; it has to be twice of what it takes.
        """
        cost_s = self.a_model_s * models
        if math.isinf(self.share):
            return True
        return self.spent_s + cost_s <= self.share * self.trained_s and 2 * cost_s <= gain_s

    def trained(self, seconds: float) -> None:
        """Count an epoch."""
        self.trained_s += seconds

    def made(self, models: int, seconds: float, *, joining: bool) -> None:
        """Learn from what a program has taken; only what was made for joining is counted."""
        self.a_model_s = seconds / max(models, 1)
        if joining:
            self.spent_s += seconds
