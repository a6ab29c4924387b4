"""Models that join a trial which trains others: their document, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cgo import weights
from cgo.errors import GraphDataError
from cgo.graph import ModelId
from cgo.graph_data import MAX_BYTES, GraphData
from cgo.paths import read_plain
from cgo.reading import is_vouched, read_document
from cgo.runtime.accelerator import FILLED, accelerator_for
from cgo.runtime.admission import admit
from cgo.runtime.placing import needs_of
from cgo.runtime.watching import Limits


@dataclass(frozen=True)
class Joiners:
    """A document that is added to a running trial's."""

    data: GraphData  # without those that cannot be trained
    constants: Mapping[str, Tensor]
    refused: Mapping[ModelId, str]  # why others cannot be

    @property
    def ids(self) -> list[ModelId]:
        """All models that it had, without aliases."""
        return [entry.id for entry in self.data.models] + sorted(self.refused)


def read_joiners(
    path: Path,
    limits: Limits,
    devices: Sequence[torch.device],
    beside: GraphData,
    vouched: str | None = None,
) -> Joiners:
    """Read a further document, as a trial of its own would.

    Args:
        path: The document; it lies in a folder of its own, with its files.
        limits: On each operator.
        devices: Where its models are to be trained.
        beside: The models that are there.
        vouched: The SHA-256 of a document whose operators need not be tried.

    Raises:
        GraphDataError: the document or a file of it is refused, or its models do not fit into
            what memory is free.
        OSError: there is no such file.
    """
    content = read_plain(path, MAX_BYTES)
    data, refused = read_document(content, path.parent)
    data.check_files()
    constants = constants_of(data)
    data, more = admit(data, constants, limits, vouched=is_vouched(content, vouched))
    _check_memory(data, devices, beside)
    return Joiners(data, constants, refused | more)


def constants_of(data: GraphData) -> dict[str, Tensor]:
    """Tensors that a document's graph refers to by content."""
    if data.constants is None:
        return {}
    return weights.load(data.base / data.constants.file)


def _check_memory(data: GraphData, devices: Sequence[torch.device], beside: GraphData) -> None:
    """All models keep their state; companies take turns, so that the largest step is counted."""
    needs = needs_of(data).values()
    needed = sum(need.state_bytes for need in needs)
    steps = [need.step_bytes for need in (*needs, *needs_of(beside).values())]
    needed += max(steps, default=0)
    free = FILLED * sum(accelerator_for(device).free_bytes() for device in devices)
    if needed > free:
        raise GraphDataError(f"its models take {needed:,} bytes; {free:,.0f} may be taken")
