"""What a running trial is told: one JSON object a line, beside the events that it tells.

A trial obeys between its steps and epochs; until then a command waits here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

from cgo.errors import TrialError
from cgo.graph import ModelId
from cgo.ids import is_model_id

log = logging.getLogger(__name__)

#: What a document's settings say of graphs that were put together without being merged.
JOINED = "joined"

Kind = Literal["add", "stop", "drain"]

#: Characters of a line that are read.
MOST_LINE = 2**22


@dataclass(frozen=True)
class Command:
    """One thing that a trial is to do.

    - "add": train the `models` of a further `document`, a path of a GraphData in a folder of its
      own. The trial answers by a "trial" event: "added", with the models' ids, or "refused". One
      that ends without an answer has not taken them.
      Its operators are not tried if `vouched` is its SHA-256 (see `TrialRequest`).
    - "stop": end `models` as cancelled, at the next step or epoch; they keep their histories.
    - "drain": refuse every later "add", and end when all models have ended.
    """

    kind: Kind
    document: str = ""
    models: tuple[ModelId, ...] = ()
    vouched: str = ""


def encode(command: Command) -> str:
    """The command as one line of JSON."""
    return json.dumps(asdict(command), separators=(",", ":"))


def decode(line: str) -> Command:
    """Read one line.

    Raises:
        TrialError: the line is no command.
    """
    try:
        found = json.loads(line)
        models = found.get("models", [])
        texts = [found.get(name, "") for name in ("document", "vouched")]
        command = Command(found["kind"], texts[0], tuple(models), texts[1])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise TrialError(f"not a command: {line[:200]!a}") from error
    if not isinstance(models, list) or not _is_command(command):
        raise TrialError(f"not a command: {line[:200]!a}")
    return command


def _is_command(command: Command) -> bool:
    texts = command.document, command.vouched
    if not all(isinstance(t, str) for t in texts) or not all(map(_is_id, command.models)):
        return False
    match command.kind:
        case "add":
            return bool(command.document)
        case "stop":
            return bool(command.models)
        case "drain":
            return True
        case _:
            return False


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and is_model_id(value)


class Commands:
    """The commands that wait for a trial; any thread may put some in.

    Example:
        >>> commands = Commands()
        >>> commands.put(Command("stop", models=("a",)))
        >>> commands.stopped
        frozenset({'a'})
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._added: deque[Command] = deque()
        #: Models that are to end, whether the trial has them yet or not; looked at in every step.
        self.stopped: frozenset[ModelId] = frozenset()
        self.draining = False

    @classmethod
    def following(cls, fd: int) -> Commands:
        """Those that come through a pipe, read by a thread until it is closed."""
        commands = cls()
        stream = os.fdopen(fd, encoding="utf-8", errors="replace")
        thread = threading.Thread(target=commands.read, args=(stream,), daemon=True)
        thread.name = "cgo-commands"
        thread.start()
        return commands

    def read(self, lines: TextIO) -> None:
        """Take every line of a stream as a command; what is none is logged."""
        while line := lines.readline(MOST_LINE):
            self.hear(line)

    def hear(self, line: str) -> None:
        """Take a line as a command; one that is none is logged."""
        try:
            self.put(decode(line))
        except TrialError as error:
            log.warning("%s", error)

    def put(self, command: Command) -> None:
        """Let a command wait for the trial."""
        with self._lock:
            if command.kind == "stop":
                self.stopped |= frozenset(command.models)
            elif command.kind == "drain":
                self.draining = True
            else:
                self._added.append(command)

    def first(self) -> Command | None:
        """What is to be added next."""
        with self._lock:
            return self._added[0] if self._added else None

    def drop(self) -> None:
        """Let go of that: it has been answered."""
        with self._lock:
            self._added.popleft()

    def forget(self, models: Iterable[ModelId]) -> None:
        """Let go of the stops of models that have ended."""
        with self._lock:
            self.stopped -= frozenset(models)
