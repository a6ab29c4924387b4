"""What tests hand to a trial to see its steps."""


class Losses:
    """Sees every loss, by model."""

    def __init__(self):
        self.seen = {}

    def on_loss(self, model, step, loss):
        self.seen.setdefault(model, []).append(float(loss))

    def on_gradients(self, model, step, gradients):
        """Not looked at."""
