"""A module of the user's that holds names of other modules."""

import os
from json import loads
from subprocess import run

from support.small import mlp
from torch.nn import Linear

__all__ = ["Linear", "loads", "mlp", "os", "run"]
