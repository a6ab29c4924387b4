"""Optimizers whose state no checkpoint can keep."""

import torch


class Note:
    """What only the optimizer's own module knows."""


class Optimizer(torch.optim.SGD):
    def __init__(self, parameters, how, **kwargs):
        super().__init__(parameters, **kwargs)
        self.how = how

    def state_dict(self):
        if self.how == "raises":
            raise SystemExit("no state")
        note = {"note": Note()} if self.how == "keeps" else {}
        return super().state_dict() | note

    def load_state_dict(self, state_dict):
        if self.how == "refuses":
            raise ValueError("not again")
        super().load_state_dict(state_dict)
