"""Which elements a kernel's program takes, and whose numbers; the steps are in test_updates.py."""

import pytest
import torch

pytest.importorskip("triton", reason="no Triton: nothing of its kernels was tested")

from cgo.runtime import fused_updates
from cgo.runtime.accelerator import accelerator_for
from cgo.runtime.fused_updates import FusedUpdates
from cgo.runtime.triton_kernels.optimizers import BLOCK

CPU = torch.device("cpu")


def tables(pieces, owners):
    made = FusedUpdates("sgd", pieces, owners, torch.zeros(9), 3, accelerator_for(CPU))
    return [(group, table.tolist()) for group, table in made._launches]


def test_rows_follow_lanes_and_gaps():
    """Gaps behind pieces are in the flat tensors, and not in the gradients."""
    pieces = [(0, [3, 3]), (8, [BLOCK + 2]), (8 + BLOCK + 4, [5])]
    assert tables(pieces, [0, 2, 1, 0]) == [
        (
            [0, 1, 2],
            [
                [0, 0, 3, 0],
                [3, 3, 3, 2],
                [8, 6, BLOCK, 1],
                [8 + BLOCK, 6 + BLOCK, 2, 1],
                [8 + BLOCK + 4, 6 + BLOCK + 2, 5, 0],
            ],
        )
    ]


def test_large_pieces_are_launched_by_themselves(monkeypatch):
    monkeypatch.setattr(fused_updates, "_APART_BYTES", 4 * 6)
    assert tables([(0, [2, 2]), (4, [3, 3]), (12, [1])], [0, 1, 0, 1, 2]) == [
        ([1], [[4, 0, 3, 0], [7, 3, 3, 1]]),
        ([0, 2], [[0, 0, 2, 0], [2, 2, 2, 1], [12, 4, 1, 2]]),
    ]


def test_numbers_are_each_models_own_in_the_kernels_order():
    made = FusedUpdates("adam", [(0, [1, 1])], [0, 1], torch.zeros(2), 2, accelerator_for(CPU))
    groups = [
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.3},
        {"lr": 0.2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.0},
    ]
    made.read(groups)
    expected = [[0.1, 0.2], [0.3, 0.0], [1e-8, 1e-7], [0.9, 0.8], [0.99, 0.95]]
    assert made._numbers.tolist() == expected  # in float64: not rounded
