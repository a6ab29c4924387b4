"""LSTM and GRU, unrolled over time into products batched over the members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cgo.runtime.emitter import Emitter, Group, Packed, item
from cgo.runtime.forms import form
from cgo.runtime.forms.linear import batched_linear_of
from cgo.tuning import STACKED

Cell = Callable[[Tensor, list[Tensor], Tensor, "Tensor | None"], list[Tensor]]


@form("unrolled LSTM", "lstm", layouts="stacked")
def lstm(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """An LSTM over padded sequences, step by step."""
    return _unrolled(emitter, group, unrolled_lstm, states=2)


@form("unrolled GRU", "gru", layouts="stacked")
def gru(emitter: Emitter, group: Group) -> Sequence[Packed] | None:
    """A GRU over padded sequences, step by step."""
    return _unrolled(emitter, group, unrolled_gru, states=1)


def _unrolled(
    emitter: Emitter, group: Group, network: Callable[..., list[Tensor]], states: int
) -> Sequence[Packed] | None:
    given = group.arguments
    if "data" in given or given["input"].ndim != 3 or (given["train"] and given["dropout"]):
        return None
    start = given["hx"] if isinstance(given["hx"], tuple) else (given["hx"],)
    per_layer = 4 if given["has_biases"] else 2
    per_layer *= 2 if given["bidirectional"] else 1
    if len(start) != states or len(given["params"]) != per_layer * given["num_layers"]:
        return None  # projections
    several = emitter.call(
        network,
        emitter.stacked(given["input"]),
        [emitter.stacked(column) for column in start],
        [emitter.stacked(column) for column in given["params"]],
        given["has_biases"],
        given["bidirectional"],
        given["batch_first"],
    )
    return [Packed(emitter.call(item, several, index), STACKED) for index in range(1 + states)]


def unrolled_lstm(*given: Any) -> list[Tensor]:
    """`unrolled` with LSTM cells."""
    return unrolled(lstm_cell, *given)


def unrolled_gru(*given: Any) -> list[Tensor]:
    """`unrolled` with GRU cells."""
    return unrolled(gru_cell, *given)


def unrolled(
    cell: Cell,
    x: Tensor,
    start: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """A recurrent network of M members.

    Args:
        cell: One step: gates of the input, states, recurrent weight and bias to new states.
        x: (M, N, T, I), or (M, T, N, I) unless `batch_first`.
        start: First states, each (M, layers * directions, N, H).
        weights: Of each layer and direction: input and recurrent weight, then biases.
        biases: Whether there are biases.
        bidirectional: Whether each layer also runs backwards.
        batch_first: Which order `x` has; the output has the same.

    Returns:
        The output and the last states, shaped as torch's with a leading M.
    """
    directions = 2 if bidirectional else 1
    per_direction = 4 if biases else 2
    if batch_first:
        x = x.transpose(1, 2)
    last: list[list[Tensor]] = []
    for layer in range(len(weights) // (per_direction * directions)):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * per_direction : (number + 1) * per_direction]
            states = [state[:, number] for state in start]
            output, states = _run(cell, x, states, own, backwards=direction == 1)
            outputs.append(output)
            last.append(states)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    finals = [torch.stack(states, 1) for states in zip(*last)]
    return [x.transpose(1, 2) if batch_first else x, *finals]


def _run(
    cell: Cell, x: Tensor, states: list[Tensor], own: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction; `x` is (M, T, N, I)."""
    bias, recurrent_bias = (own[2], own[3]) if len(own) == 4 else (None, None)
    gates = batched_linear_of(x, own[0], bias).unbind(1)  # the inputs' share, of all steps at once
    outputs = []
    for gate in reversed(gates) if backwards else gates:
        states = cell(gate, states, own[1], recurrent_bias)
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), states


def lstm_cell(
    gates: Tensor, states: list[Tensor], weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """States are hidden and cell, each (M, N, H); gates in torch's order i, f, g, o."""
    hidden, cell = states
    gates = gates + batched_linear_of(hidden, weight, bias)
    enter, forget, new, out = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return [out.sigmoid() * cell.tanh(), cell]


def gru_cell(
    gates: Tensor, states: list[Tensor], weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """The state is hidden, (M, N, H); gates in torch's order r, z, n."""
    (hidden,) = states
    reset, update, new = gates.chunk(3, -1)
    own_reset, own_update, own_new = batched_linear_of(hidden, weight, bias).chunk(3, -1)
    reset, update = (reset + own_reset).sigmoid(), (update + own_update).sigmoid()
    new = (new + reset * own_new).tanh()
    return [(hidden - new) * update + new]
