"""A section in a process of its own: what it crashes, hangs or leaks ends with it.

A CUDA error makes a whole process useless, and a compiler cannot be interrupted; so each section
has a process that may be killed. It says what it finds in lines of JSON, and waits between
preparing and running until it is told that the device is free.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_sections import Job, Section, described

#: What a section's process says of itself, beside its figures.
READY, OK, FAILED = "ready", "ok", "failed"

#: How long a process that prints where it is may take for it.
_SHOWN_S = 0.5


def serve(section: Section, job: Job) -> None:
    """Be the process of a section: prepare, wait for a line on the standard input, run."""
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # see `Child.show`
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the lines

    def emit(part: dict[str, Any]) -> None:
        lines.write(json.dumps(_finite(part)) + "\n")

    def wait() -> None:
        emit({"status": READY})
        if not sys.stdin.readline():
            raise SystemExit("the suite has ended")

    run_here(section, job, emit, wait)


def run_here(section: Section, job: Job, emit: Any, wait: Any = lambda: None) -> None:
    """Prepare and run a section in this process; an error is a part of what it found."""
    try:
        prepared = section.prepare(job, emit)
        wait()
        section.run(job, prepared, emit)
        emit({"status": OK})
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        emit({"status": FAILED, "error": described(error), "where": where})


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes text."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Child:
    """A section's process, seen from the suite.

    Args:
        command: Starts it.
        environment: Variables beside this process's own.

    Attributes:
        figures: What it has found so far.
        heard: Called each time that it has found something.
        status: What it last said of itself; empty before it said anything.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.figures: dict[str, Any] = {}
        self.status = ""
        self.heard: Callable[[], None] = lambda: None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_ready(self, until: float) -> bool:
        """Whether it is prepared, or has ended, before this `time.monotonic()`."""
        return self._wait((READY, OK, FAILED), until)

    def show(self) -> None:
        """Let it print where it is, to the standard error."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SHOWN_S)

    def go(self) -> None:
        """Let it use the device."""
        if self.status == READY:
            assert self._process.stdin is not None
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def wait_end(self, until: float) -> bool:
        """Whether it has ended before this `time.monotonic()`."""
        return self._wait((OK, FAILED), until)

    def _wait(self, states: tuple[str, ...], until: float) -> bool:
        while self.status not in states:
            try:
                left = min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)
                line = self._lines.get(timeout=left)
            except queue.Empty:
                return False
            if line is None:
                code = self._process.wait()
                self.status = FAILED
                self.figures["error"] = f"its process ended with {code} before it was done"
            else:
                part = json.loads(line)
                self.status = part.pop("status", self.status)
                self.figures |= part
                if part:
                    self.heard()
        return True

    def end(self) -> None:
        """Stop it and what it started, by the number of its own process group."""
        if self._process.poll() is None:
            try:
                self._process.wait(1.0 if self.status in (OK, FAILED) else 0.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
