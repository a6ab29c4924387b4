"""What was chosen before: in a trial's own folder, and for equal trials on this machine.

Measured times differ from run to run, and so would the choices that are made of them, and the bits
that they compute. So a choice is kept, with the table of costs, for the graph that it was made for:
the same search, run again on the same device with the same versions, computes the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cgo.errors import TrialError
from cgo.graph import Ref, inputs_of
from cgo.passes.assign_layouts import Option
from cgo.passes.sharing import argument_key
from cgo.paths import read_plain
from cgo.runtime.choice import Choice
from cgo.runtime.cost_table import CostTable, device_key
from cgo.runtime.verdicts import Decision, Swap, decision_of
from cgo.tuning import CHANNELS, LANES, STACKED

log = logging.getLogger(__name__)

#: Of a record; those of the largest trials have a hundredth.
_MOST_BYTES = 2**26

#: Options by group, and whether images have channels last.
_Found = tuple[dict[str, Option], "bool | None"]


class Memory:
    """The choices for one graph, whatever its models are called, in the table of costs.

    Args:
        table: Where they are kept; of one device, version and number of threads.
        ruled: The graph, and its programs.
        asked: JSON values that a choice depends on as well.
        anew: Find nothing, so that everything is measured and chosen again, and kept.
    """

    def __init__(self, table: CostTable, ruled: Choice, asked: Any, *, anew: bool = False) -> None:
        self._table, self._anew = table, anew
        form, self._numbers = _form(ruled)
        self._key = _digest([form, asked])

    def find(self) -> _Found | None:
        """What was chosen for such a graph."""
        return None if self._anew else _found(self._table.recall(self._key))

    def add(self, options: Mapping[str, Option], last: bool | None) -> _Found:
        """Keep what was chosen; returns what is kept, which another trial may have chosen first."""
        rows = {name: [o.form, o.layout, o.width, o.seconds] for name, o in options.items()}
        known = self._table.recall(self._key)
        anew = self._anew or (known is not None and _found(known) is None)
        kept = self._table.remember(self._key, {"options": rows, "last": last}, anew=anew)
        return _found(kept) or (dict(options), last)

    def compiled(self, record: Record | None) -> Callable[[str], Decision | None]:
        """Tells how a step was compiled: as the trial's own record has it, or as here."""

        def known(step: str) -> Decision | None:
            if record is not None and step in record.compiled:
                return record.compiled[step]
            found = None if self._anew else self._table.recall(self._step(step))
            decision = decision_of(found)
            if found is not None and decision is None:
                log.warning("a remembered decision on compiling has another form; it is made again")
            return decision

        return known

    def settling(self, record: Record | None) -> Callable[[str, Decision], None]:
        """Keeps how a step is compiled, here and in the trial's record."""
        own: set[str] = set()  # steps that this trial decides on

        def settle(step: str, decision: Decision) -> None:
            value = decision.as_json() if isinstance(decision, Swap) else decision
            anew = self._anew or step in own
            if self._table.remember(self._step(step), value, anew=anew) == value:
                own.add(step)
            if record is not None:
                record.settle(step, decision)

        return settle

    def _step(self, name: str) -> str:
        program, _, ids = name.rpartition("/")
        return _digest([self._key, program, [self._numbers.get(i, i) for i in ids.split(",")]])


#: Keywords that say which model's or whose data something is, and not what has to be done.
_NAMES = frozenset({"model", "twins", "content", "data"})


def _form(ruled: Choice) -> tuple[list[Any], dict[str, int]]:
    """A graph and its programs without the names of nodes and models; models by number."""
    ids = sorted({model for program in ruled.programs for model in program})
    numbers = {model: number for number, model in enumerate(ids)}
    place = {node.name: index for index, node in enumerate(ruled.graph.nodes)}
    rows: list[Any] = []
    for node in ruled.graph.nodes:
        refs: list[Ref] = []
        kwargs = tuple((k, v) for k, v in node.kwargs if k not in _NAMES)
        literals = argument_key(node.args, refs), argument_key(kwargs)
        read = [(place[ref.name], ref.index) for ref in inputs_of(node)]
        owners = sorted(numbers.get(owner, -1) for owner in node.owners)
        rows.append((node.op, repr(literals), read, repr(node.types), node.group, owners,
                     node.autocast))  # fmt: skip
    return [rows, [[numbers[m] for m in program] for program in ruled.programs]], numbers


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Record:
    """A trial's choices, in a file of its folder: a trial that goes on, or is repeated, finds them.

    Args:
        path: Where choices are written; what is there already is found.
        given: Another trial's file, whose choices are found as well.
        device: Choices of another device, version or number of threads are not found.

    Raises:
        TrialError: a file is no such record.
    """

    def __init__(self, path: Path, device: torch.device, given: str | None = None) -> None:
        self._path, self._device = path, device_key(device)
        self._choices: dict[str, dict[str, list[Any]]] = {}
        self._last: dict[str, bool | None] = {}  # channels last in memory
        self.compiled: dict[str, Decision] = {}  # steps by name, and how they were compiled
        for source in (Path(given) if given else None, path if path.exists() else None):
            if source is not None:
                self._read(source)

    def _read(self, path: Path) -> None:
        document = read_record(path)
        if document["device"] == self._device:
            self._choices |= document["choices"]
            found = {step: decision_of(v) for step, v in document.get("compiled", {}).items()}
            self.compiled |= {step: d for step, d in found.items() if d is not None}
            self._last |= document.get("images_last", {})

    def find(self, ruled: Choice) -> tuple[dict[str, Option], bool | None] | None:
        """What was chosen for this graph, divided so; and whether with channels last."""
        found = self._choices.get(_key(ruled))
        if found is None:
            return None
        options = {name: Option(*row) for name, row in found.items()}
        return options, self._last.get(_key(ruled))

    def add(self, ruled: Choice, options: Mapping[str, Option], last: bool | None) -> None:
        """Keep a choice."""
        rows = {name: [o.form, o.layout, o.width, o.seconds] for name, o in options.items()}
        self._choices[_key(ruled)] = rows
        self._last[_key(ruled)] = last
        self._write()

    def settle(self, step: str, decision: Decision) -> None:
        """Keep how a step is compiled."""
        if self.compiled.get(step) != decision:
            self.compiled[step] = decision
            self._write()

    def _write(self) -> None:
        document = {
            "device": self._device,
            "choices": self._choices,
            "images_last": self._last,
            "compiled": {
                step: found.as_json() if isinstance(found, Swap) else found
                for step, found in self.compiled.items()
            },
        }
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self._path)


def read_record(path: Path) -> dict[str, Any]:
    """A trial's `lowering.json`, looked at before it is obeyed: it may come from elsewhere.

    Raises:
        TrialError: it is no plain file, too large, or of another form.
    """
    try:
        document = json.loads(read_plain(path, _MOST_BYTES))
        if not _is_record(document):
            raise ValueError("it has another form")
    except (OSError, ValueError, RecursionError) as error:
        raise TrialError(
            f"{path} is no record of lowering choices: {type(error).__name__}: {error}; give a "
            "trial's lowering.json, or none"
        ) from error
    assert isinstance(document, dict)
    return document


def _is_record(document: Any) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("device"), str):
        return False
    choices = document.get("choices")
    compiled, last = document.get("compiled", {}), document.get("images_last", {})
    if not all(isinstance(found, dict) for found in (choices, compiled, last)):
        return False
    assert isinstance(choices, dict)
    settled = all(value is None or decision_of(value) is not None for value in compiled.values())
    return (
        settled and all(map(_is_flag, last.values())) and all(map(_are_options, choices.values()))
    )


def _found(value: Any) -> _Found | None:
    """What `Memory.add` keeps; None if it is none, or has another form."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"options", "last"}:
        known = False
    else:
        known = _are_options(value["options"]) and _is_flag(value["last"])
    if not known:
        log.warning("a remembered choice of kernels has another form; it is made again")
        return None
    return {name: Option(*row) for name, row in value["options"].items()}, value["last"]


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _are_options(rows: Any) -> bool:
    return isinstance(rows, dict) and all(map(_is_option, rows.values()))


def _is_option(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4:
        return False
    form, layout, width, seconds = row
    known = isinstance(form, str) and layout in (LANES, STACKED, CHANNELS)
    return known and type(width) is int and width >= 1 and type(seconds) in (int, float)


def _key(ruled: Choice) -> str:
    """What a trial's choice holds for: the graph with its groups, and its programs."""
    nodes = [(node.name, node.op, node.group) for node in ruled.graph.nodes]
    return _digest([nodes, ruled.programs])
