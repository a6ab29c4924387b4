"""Modes that see every operator call, and which of them is in force."""

from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

__all__ = ["TorchDispatchMode", "current_mode", "without_modes"]

NAMES = (
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode",
)

#: The innermost mode, or None.
current_mode = _get_current_dispatch_mode

#: A context in which no mode sees anything.
without_modes = _disable_current_modes


class TorchDispatchMode(_TorchDispatchMode):
    """Torch's, which imports no compiler to be told that it is not compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
