"""A process that runs one trial after another: `python -m cgo.trial --requests-fd N --events-fd M`.

A fresh process spends seconds on its imports before it begins a trial. This one has them behind it
when a trial comes. Each line that it reads asks for a trial; what happens in the trial goes to the
events, as it does from a process that runs one alone. Between them stand lines of the worker's own:

- `ready`: it has warmed up, or has imported what it was asked to (with what that left behind), or
  the trial asked for has ended and left nothing behind.
- `took`: it has read a request.
- `retired`: the trial has ended and left something behind, for a reason; the process ends. What
  libraries leave when they are imported (patches, threads) is the most frequent one: so it tells
  which the trial imported, and the next process is asked to import them first.

A trial that ends in another way than a clean one ends the process, whose exit code tells how. What
is left of a trial that ended cleanly is looked for in `cgo.runtime.pristine`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

from cgo import trial
from cgo.allowed import ALLOWED_MODULES, as_text
from cgo.commands import Commands
from cgo.platforms.local import IMPORT_ROOTS
from cgo.platforms.protocol import Said


def serve(requests_fd: int, events_fd: int, max_growth_bytes: int | None = None) -> int:
    """Run trials until no more are asked for; returns the exit code."""
    from cgo.runtime.pristine import MAX_GROWTH_BYTES, Pristine
    from cgo.runtime.torch_settings import RandomStates
    from cgo.runtime.warm_up import bring, warm_up, warm_up_eager

    random = RandomStates()
    gc.disable()  # imports make hundreds of thousands of objects, and no garbage to speak of
    warm_up()
    gc.enable()
    for descriptor in (requests_fd, events_fd):
        os.set_inheritable(descriptor, False)  # no process of a trial's is to hold them
    most = MAX_GROWTH_BYTES if max_growth_bytes is None else max_growth_bytes
    with (
        os.fdopen(events_fd, "w", buffering=1, closefd=False) as events,
        ExitStack() as ends,
    ):
        asked = _Asked(os.fdopen(requests_fd, "r", encoding="utf-8"))
        pristine = Pristine(random, most)

        def say(word: str, reason: str = "", libraries: Sequence[str] = ()) -> None:
            resident = pristine.resident_bytes()
            events.write(Said(word, reason, resident, tuple(libraries)).line())

        ends.callback(pristine.end)
        say("ready")
        eager = False
        while True:
            request = asked.next(None if eager else _IDLE_S)
            if request is None:
                break
            if not eager and request.get("eager", True):  # or nobody has asked for a while
                warm_up_eager()
                pristine, eager = Pristine(random, most), True
            if not request:
                continue
            if request["do"] == "bring":
                bring(request["libraries"])
                left = pristine.restore() or ""
                pristine = Pristine(random, most)
                say("ready", left)
                continue
            say("took")
            if reason := _served(request, asked.commands, events, pristine.restore):
                say("retired", reason, pristine.libraries())
                break
            asked.ended(request["document"])
            say("ready")
    return 0


#: Seconds without a request after which what only some trials need is imported, too.
_IDLE_S = 1.0


class _Asked:
    """Requests, one after another, and the commands that come meanwhile.

    Args:
        lines: Read by a thread of its own, as commands have to be heard while a trial runs.
    """

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._waiting: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._commands: dict[str, Commands] = {}  # of trials that have not ended, by document
        self.commands = Commands()  # of the last request
        threading.Thread(target=self._read, name="cgo-requests", daemon=True).start()

    def _read(self) -> None:
        while line := self._lines.readline():
            found = json.loads(line)
            if found["do"] == "bring":
                self._waiting.put(found)
            elif found["do"] == "train":
                self._commands[found["document"]] = Commands()
                self._waiting.put(found)
            elif (commands := self._commands.get(found["document"])) is not None:
                commands.hear(found["command"])
        self._waiting.put(None)

    def next(self, timeout_s: float | None) -> Mapping[str, Any] | None:
        """The next request; None when no more will come, nothing where none has come in time."""
        try:
            request = self._waiting.get(timeout=timeout_s)
        except queue.Empty:
            return {}
        if request and request["do"] == "train":
            self.commands = self._commands[request["document"]]
        return request

    def ended(self, document: str) -> None:
        """Let commands for a trial pass from now on."""
        del self._commands[document]


def _served(
    request: Mapping[str, Any],
    commands: Commands,
    events: TextIO,
    restore: Callable[[], str | None],
) -> str:
    """Run a trial; why this process is to run no other, or nothing.

    Only then does its output go to the trial's log no more: a process that ends has more to say.
    """
    outside = _diverted(request["log"])
    _prepare(request)
    document, vouched = Path(request["document"]), request["vouched"]
    trial.train_document(document, events, vouched=vouched, commands=commands)
    trial.leave()
    if reason := restore():
        return reason
    _flush()
    for descriptor, before in outside.items():
        os.dup2(before, descriptor)
        os.close(before)
    return ""


def _prepare(request: Mapping[str, Any]) -> None:
    """Be in the folder, and have the environment, that a process of its own would have."""
    if request["folder"] is not None:
        os.chdir(request["folder"])
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.environ[IMPORT_ROOTS] = os.pathsep.join(request["import_roots"])
    if request["allowed_modules"] is not None:
        os.environ[ALLOWED_MODULES] = as_text(request["allowed_modules"])
    faulthandler.enable(all_threads=False)  # whoever was before may have switched it off


def _diverted(log: str) -> dict[int, int]:
    """Let all output go to a trial's log, whoever writes it; returns where it went before."""
    _flush()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    before = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    for descriptor in before:
        os.dup2(file, descriptor)
    os.close(file)
    return before


def _flush() -> None:
    """Write what Python and C hold back."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
