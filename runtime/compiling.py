"""Compiling beside training: in a process of its own, whose failures are nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cgo.runtime.artifacts import Artifacts
from cgo.runtime.structure import Structure

#: Seconds that one structure may take; a compiler that hangs is ended.
_LIMIT_S = 600.0

_PROGRAM = "import sys; sys.path[:] = {path!r}; from cgo.runtime.compile_worker import main; main()"


@dataclass(frozen=True)
class Outcome:
    """What became of a structure: the seconds that it took, and why it failed.

    That is `lasting` where the compiler refuses it, and not where its process was ended.
    """

    seconds: float
    error: str | None = None
    lasting: bool = False


class Compiling:
    """Compiles structures in the background, one after another.

    Args:
        artifacts: Where they are kept.
        limit_s: Seconds for each.
        nice: What its priority is lowered by, so that training is given the processor first.
    """

    def __init__(self, artifacts: Artifacts, limit_s: float = _LIMIT_S, nice: int = 10) -> None:
        self.artifacts, self._limit_s, self._nice = artifacts, limit_s, nice
        self._process: subprocess.Popen[str] | None = None
        self._requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._asked: list[str] = []  # without answer yet, in order
        self._since = 0.0  # that the first of them is worked on
        self._outcomes: dict[str, Outcome] = {}

    @property
    def pid(self) -> int | None:
        """The process; None before anything is asked, and after it ended."""
        return None if self._process is None else self._process.pid

    def ask(self, key: str, structure: Structure) -> None:
        """Have a structure compiled, unless it was asked for before."""
        with self._changed:
            if key in self._outcomes or key in self._asked:
                return
            if not self._asked:
                self._since = time.monotonic()
            self._asked.append(key)
        request = json.dumps({"key": key, "document": structure.document})
        try:
            self._start()
        except OSError as error:
            self._fail(f"no process to compile in: {error}")
        self._requests.put(request + "\n")

    def outcome(self, key: str) -> Outcome | None:
        """What became of it; None while it is being compiled."""
        with self._changed:
            if self._asked and time.monotonic() - self._since > self._limit_s:
                self._end(f"not compiled within {self._limit_s:.0f} s")
            return self._outcomes.get(key)

    def wait(self, keys: Sequence[str] | None = None) -> None:
        """Until these have an outcome, as far as they were asked for; None: all."""
        while True:
            with self._changed:
                asked = set(self._asked if keys is None else keys) & set(self._asked)
                if all([self.outcome(key) is not None for key in asked]):
                    return
                self._changed.wait(0.1)

    def close(self) -> None:
        """End the process."""
        self._end("training has ended")

    def _start(self) -> None:
        if self._process is not None:
            return
        program = _PROGRAM.format(path=sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # with compilers that it starts, it can be ended as a whole
        )
        self._requests = queue.SimpleQueue()
        setting = {
            "folder": str(self.artifacts.folder),
            "threads": torch.get_num_threads(),
            "nice": self._nice,
        }
        self._requests.put(json.dumps(setting) + "\n")
        given = self._process, self._requests
        for task in (self._listen, self._write):
            threading.Thread(target=task, args=given, daemon=True).start()

    def _write(
        self, process: subprocess.Popen[str], requests: queue.SimpleQueue[str | None]
    ) -> None:
        """Hand over requests; a pipe that is full is not waited for by training."""
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, which `_listen` hears
            for line in iter(requests.get, None):
                process.stdin.write(line)
                process.stdin.flush()

    def _listen(
        self, process: subprocess.Popen[str], requests: queue.SimpleQueue[str | None]
    ) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                answer = json.loads(line)
                with self._changed:
                    error, lasting = answer.get("error"), answer.get("lasting", False)
                    outcome = Outcome(answer["seconds"], error, lasting)
                    self._outcomes[answer["key"]] = outcome
                    self._asked.remove(answer["key"])
                    self._since = time.monotonic()
                    self._changed.notify_all()
        code = process.wait()
        requests.put(None)
        with self._changed:
            if self._process is process:
                self._process = None
                self._fail(f"the compiling process ended ({code})")

    def _end(self, reason: str) -> None:
        with self._changed:
            process, self._process = self._process, None
            self._fail(reason)
        if process is not None:
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            process.wait()

    def _fail(self, reason: str) -> None:
        with self._changed:
            spent = time.monotonic() - self._since if self._asked else 0.0
            for key in self._asked:
                self._outcomes[key] = Outcome(spent, reason)
            self._asked.clear()
            self._changed.notify_all()
