"""Factories of networks from NNI's frozen model spaces; trials import this module."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import nn

from cgo.nni.texts import check_text

if "nni" not in sys.modules:
    # In a trial nobody has asked for Lightning yet, which takes seconds to import.
    os.environ.setdefault("NNI_FRAMEWORK", "none")


def build(space: str) -> nn.Module:
    """The network that a frozen `ExecutableModelSpace` stands for.

    Args:
        space: The space without its evaluator, as `nni.dump` writes it.

    Returns:
        A new module with fresh weights.
    """
    check_text(space, "module")
    import nni
    from nni.nas.space import ModelStatus

    if '"framework"' in space:  # a graph is turned into code of its framework
        nni.set_default_framework("pytorch")
    frozen: Any = nni.load(space)
    frozen.status = ModelStatus.Frozen  # a graph's text does not hold it, others hold a string
    module = frozen.executable_model()
    if not isinstance(module, nn.Module):
        raise TypeError(f"the space gives a {type(module).__name__}, no torch.nn.Module")
    return module
