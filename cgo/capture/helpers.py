"""Processes that capture models beside this one, where there are many.

Each takes models from the end of the queue that this process takes from the front, one at a time,
so that nothing is divided beforehand. What a model's capture gives does not depend on where it is
made, nor on what was captured before.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from cgo.imports import search_first
from cgo.machine import cores, python_command
from cgo.model import Model
from cgo.user_code import told

log = logging.getLogger(__name__)

#: Seconds that a process takes until it captures, about.
START_S = 2.0

#: Told of each model: what it was captured as, or None and why it could not be.
Done = Callable[[Model, Any, str], None]


class Helpers:
    """Processes that help with one queue of models; a context, left when the queue is empty.

    Args:
        waiting: Models to be captured; who takes one pops it.
        done: Told what became of each that a helper took; from a thread of its own.
        roots: Folders in which user modules are found.
        most: Of processes.
    """

    def __init__(
        self, waiting: deque[Model], done: Done, roots: Sequence[str], most: int | None = None
    ) -> None:
        self._waiting, self._done, self._roots = waiting, done, tuple(roots)
        self._most = cores() - 1 if most is None else most
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def take(self) -> Model | None:
        """The next model, for this process."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def consider(self, seconds_each: float) -> None:
        """Start as many as repay their start, if a model takes so long."""
        left = seconds_each * len(self._waiting)
        while len(self._threads) < self._most and left > 3 * START_S * (len(self._threads) + 1):
            self._start()

    def _start(self) -> None:
        own, its = Pipe()
        command = [*python_command("cgo.capture.helper"), str(its.fileno())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        its.close()
        self._processes.append(process)
        name = f"cgo-capture-{process.pid}"
        thread = threading.Thread(target=self._feed, args=(process, own), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _feed(self, process: subprocess.Popen[bytes], pipe: Connection) -> None:
        """Give a process one model after another."""
        with pipe:
            try:
                pipe.send_bytes(pickle.dumps(self._roots))
                pipe.recv_bytes()  # it is there
            except (EOFError, OSError) as error:
                log.warning("no process to capture in: %s", told(error))
                return
            while (model := self._take_last()) is not None:
                try:
                    pipe.send_bytes(pickle.dumps(_fields(model)))
                    captured, failure = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    code = process.wait()
                    text = f"capturing it ended its process, with exit code {code}"
                    self._done(model, None, f"model {model.model_id!r}: {text}")
                    return
                self._done(model, captured, failure)

    def _take_last(self) -> Model | None:
        """A model that can be built from its names elsewhere."""
        with self._lock:
            for place in range(len(self._waiting) - 1, -1, -1):
                model = self._waiting[place]
                if isinstance(model.module, str):
                    del self._waiting[place]
                    return model
        return None

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Wait for what is in hand; after an exception, let it go."""
        if kind is not None:
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()


def _fields(model: Model) -> dict[str, Any]:
    """What `Model` takes."""
    return {
        "module": model.module,
        "kwargs": model.kwargs,
        "data": model.data,
        "training": model.training,
        "seed": model.seed,
        "model_id": model.model_id,
    }


def serve(pipe: Connection) -> None:
    """In a helper: capture what comes, until the pipe is closed."""
    from cgo.planner import Planner

    roots: tuple[str, ...] = pickle.loads(pipe.recv_bytes())
    search_first(roots)
    planner = Planner()
    pipe.send_bytes(b"ready")
    while True:
        try:
            fields = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        model = Model(**fields)
        planner.capture([model])
        pipe.send_bytes(pickle.dumps(planner.take(model.model_id)))
