"""One call over many tensors."""

import torch

__all__ = ["add_", "addcmul", "addcmul_", "copy_", "mul", "mul_", "unscale_"]

NAMES = (
    "torch._foreach_add_",
    "torch._foreach_addcmul",
    "torch._foreach_addcmul_",
    "torch._foreach_copy_",
    "torch._foreach_mul",
    "torch._foreach_mul_",
    "torch._amp_foreach_non_finite_check_and_unscale_",
)

add_, addcmul_, copy_ = torch._foreach_add_, torch._foreach_addcmul_, torch._foreach_copy_
addcmul, mul, mul_ = torch._foreach_addcmul, torch._foreach_mul, torch._foreach_mul_

#: Multiplies by a scale's inverse, and notes whether something was not finite.
unscale_ = torch._amp_foreach_non_finite_check_and_unscale_
