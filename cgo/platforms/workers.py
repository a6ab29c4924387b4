"""A process of the local platform: one that runs trials one after another, or a single one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, BinaryIO

import psutil

from cgo.commands import Command, encode
from cgo.platforms.protocol import Bring, Order, Request


@dataclass(eq=False)
class Worker:
    """A process, and our ends of its pipes."""

    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]  # with which it was started
    events_fd: int
    parent_fd: int  # closing it ends the process
    requests: IO[bytes] | None = None  # None: it runs the trial that it was started with
    commands: IO[bytes] | None = None  # of that trial
    output: BinaryIO | None = None  # what it says outside of trials
    reader: threading.Thread | None = None
    ready: bool = False  # waits for a request
    warmed: bool = False  # it was, at least once
    took: bool = False  # has read the last request
    brought: frozenset[str] | None = None  # modules whose libraries it has imported
    bringing: bool = False  # is at it
    alone: bool = False  # these may have left something: it is for trials that name those modules
    doomed: bool = False  # is told to end, or to be killed
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, request: Request) -> None:
        """Send a request; to one that has ended by now it is lost."""
        self.ready = self.took = False
        assert self.requests is not None
        self._write(self.requests, request.line())

    def bring(self, modules: frozenset[str], libraries: tuple[str, ...]) -> None:
        """Let one that is ready import what trials of these modules import; then it is again."""
        self.ready, self.bringing, self.alone, self.brought = False, True, True, modules
        assert self.requests is not None
        self._write(self.requests, Bring(libraries).line())

    def tell(self, document: str, command: Command) -> bool:
        """Send a command to the trial of a document; False: nobody reads it any more."""
        if self.requests is not None:
            return self._write(self.requests, Order(document, encode(command)).line())
        return self.commands is not None and self._write(self.commands, encode(command) + "\n")

    @staticmethod
    def _write(stream: IO[bytes], line: str) -> bool:
        try:
            stream.write(line.encode())
            stream.flush()
        except (OSError, ValueError):  # it has ended, or we have closed our end
            return False
        return True

    def signal(self, number: int) -> None:
        """Signal the process and all that it has started, unless it has been waited for."""
        self.doomed = True
        with self._lock:
            self._signal(number)

    def _signal(self, number: int) -> None:
        if self.process.returncode is None:
            # Gone in between, or (on macOS) nothing but a process that has ended.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def bury(self) -> None:
        """When it has ended, kill what it leaves: that would hold its pipe and its memory."""
        _await_end(self.process.pid)
        with self._lock:
            # Before it is waited for, so that its number is not another's by now.
            self._signal(signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Close our ends of its pipes, but for the events."""
        os.close(self.parent_fd)
        for stream in (self.requests, self.commands):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def last_words(self) -> bytes:
        """What it has said outside of trials."""
        if self.output is None:
            return b""
        self.output.seek(0)
        return self.output.read()


def start_alone(command: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> Worker:
    """Start a process for one trial; raises `OSError`."""
    return _start(command, environment, log, serving=False)


def start_serving(command: Sequence[str], environment: Mapping[str, str]) -> Worker:
    """Start a process that runs what it is asked for; raises `OSError`."""
    return _start(command, environment, tempfile.TemporaryFile(), serving=True)


def _start(
    command: Sequence[str], environment: Mapping[str, str], output: BinaryIO, *, serving: bool
) -> Worker:
    names = ["--events-fd", "--parent-fd", "--requests-fd" if serving else "--commands-fd"]
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        pipes = {name: os.pipe() for name in names}
        # Of events it has the end that is written to, of the others the one that is read.
        ends = {n: pipe if n != "--events-fd" else pipe[::-1] for n, pipe in pipes.items()}
        for their, our in ends.values():
            theirs.callback(os.close, their)
            ours.callback(os.close, our)
        options = [text for name in names for text in (name, str(ends[name][0]))]
        process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[their for their, _ in ends.values()],
            start_new_session=True,
        )
        ours.pop_all()
    events, parent = ends["--events-fd"][1], ends["--parent-fd"][1]
    asked = os.fdopen(ends[names[-1]][1], "wb")
    if not serving:
        return Worker(process, environment, events, parent, commands=asked)
    return Worker(process, environment, events, parent, asked, output=output)


def _await_end(pid: int) -> None:
    """Block until a child has ended, and leave it to be waited for."""
    # Where nobody may wait for children (SIGCHLD is ignored), there is nothing to be left.
    with contextlib.suppress(ChildProcessError, psutil.NoSuchProcess):
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return
        child = psutil.Process(pid)  # macOS, before Python 3.13
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
