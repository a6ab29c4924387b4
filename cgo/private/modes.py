"""The modes that see every call of a function of torch's, or of an operator."""

from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["modes"]

NAMES = (
    "torch.overrides._get_current_function_mode_stack",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
)


def modes() -> tuple[object, ...]:
    """Those in force, outermost first."""
    return (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
