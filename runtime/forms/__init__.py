"""Fused forms: how a group of equal operators is executed as one.

A form takes an `Emitter` and a `Group` and returns the packed results, one an output, or None where
it does not apply. Forms are tried in the order of their registration, but for those that have to be
chosen; then comes the general rule (`vmap`, traced), then a loop over the members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cgo.runtime.emitter import Emitter, Group, Packed

Rule = Callable[["Emitter", "Group"], "Sequence[Packed] | None"]

#: Whether a form is there, on a device and by a setting: `Tuning.kernels`.
Offered = Callable[["torch.device", "bool | None"], bool]

#: The modules that register forms, in the order in which their forms are tried.
MODULES = (
    "convolution",
    "linear",
    "norm",
    "embedding",
    "attention",
    "recurrent",
    "pooling",
    "losses",
    "elementwise",
    "reductions",
    "shapes",
)


@dataclass(frozen=True)
class Form:
    """One way of executing groups of some operators.

    `name` is also its key in cost tables. `layouts` says how it takes and gives its values:
    "stacked" `(M, ...)`, "channels" `(N, M*C, ...)` or "either". `offered` tells of a device and
    `Tuning.kernels` whether the form is there; with it, it is taken where it was chosen for a
    group, and not by itself. One that `takes_over` does the work of `behind_norms`, too.
    """

    name: str
    operators: frozenset[str]  # names without overload: "aten.conv2d"
    layouts: str
    rule: Rule
    offered: Offered | None = None
    takes_over: bool = False

    @property
    def chosen(self) -> bool:
        """Whether it has to be chosen."""
        return self.offered is not None

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (self.rule.__doc__ or "").partition("\n")[0]


_FORMS: dict[str, list[Form]] = {}


def form(
    name: str,
    operators: str,
    *,
    layouts: str,
    offered: Offered | None = None,
    takes_over: bool = False,
) -> Callable[[Rule], Rule]:
    """Register a form for the operators named, separated by spaces, without "aten."."""

    def register(rule: Rule) -> Rule:
        names = frozenset(
            operator if "." in operator else f"aten.{operator}" for operator in operators.split()
        )
        made = Form(name, names, layouts, rule, offered, takes_over)
        for operator in names:
            _FORMS.setdefault(operator, []).append(made)
        return rule

    return register


def forms_of(operator: str) -> Sequence[Form]:
    """The forms registered for an operator, given without overload."""
    _load()
    return _FORMS.get(operator, ())


def all_forms() -> list[Form]:
    """Every form once, by name."""
    _load()
    unique = {made.name: made for found in _FORMS.values() for made in found}
    return [unique[name] for name in sorted(unique)]


@cache
def _load() -> None:
    for name in MODULES:
        import_module(f"cgo.runtime.forms.{name}")
