"""A process between two trials: as it was before any, or not used again.

A trial's numbers are those that it would have in a process of its own. So what the one before has
left is undone where it can be undone for certain (settings, random streams, modules of users), and
for the rest it is looked whether there is any: patches of modules and classes, code of users that
something still holds, threads, processes, memory. Of what there is a reason is given, and the
process is replaced. Nothing here mends by guessing.

Not seen, because nothing tells of it: what C code keeps for itself, such as limits of threads in
libraries of linear algebra other than torch's; and a plain value that was written into a library
in the same trial that was the first to import it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator

import psutil

from cgo.runtime.accelerator import forget_accelerators
from cgo.runtime.patches import Contents
from cgo.runtime.samples import Frozen
from cgo.runtime.settings import Settings, python_settings, reseed
from cgo.runtime.torch_settings import RandomStates, release, torch_settings
from cgo.runtime.user_modules import UserModules

#: Bytes by which a process may have grown.
MAX_GROWTH_BYTES = 2 * 2**30

#: Seconds in which threads and processes that a trial has told to end may do so.
_ENDING_S = 1.0

#: Of a reason.
_MOST_NAMES = 5


class Pristine:
    """How this process is now, before any trial.

    Args:
        max_growth_bytes: By how much more memory it may hold later.
        random: Torch's random streams as they were when the process began.
    """

    def __init__(self, random: RandomStates, max_growth_bytes: int = MAX_GROWTH_BYTES) -> None:
        self._random, self._max_growth_bytes = random, max_growth_bytes
        self._random.put_back()
        self._threads = _threads()
        self._users = UserModules()
        self._settings = Settings((*python_settings(), *torch_settings()))
        self._known = set(sys.modules)
        self._contents = [Contents(sys.modules)]
        self._collect()
        _trim()
        self._resident_bytes = self.resident_bytes()

    def _collect(self) -> None:
        """Collect what a trial has left, without looking through all that was there before it.

        That is frozen; a trial whose loaders fork freezes what is there at that moment, too. Python
        could tell how much is frozen, but counts it one by one.
        """
        if Frozen.more:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        Frozen.more = False

    @staticmethod
    def end() -> None:
        """Let the process end as any other: what is frozen would be told of as leaked."""
        gc.unfreeze()

    def resident_bytes(self) -> int:
        """What this process holds of the machine's memory."""
        return int(psutil.Process().memory_info().rss)

    def restore(self) -> str | None:
        """Undo what a trial has left; the reason why that cannot be done, or None."""
        try:
            return next(self._reasons(), None)
        except Exception as error:  # looking at it fails
            return f"{type(error).__name__}: {error}"

    def _reasons(self) -> Iterator[str]:
        compiled = self._users.take_out()
        if compiled:
            yield f"compiled modules cannot be imported anew: {_some(compiled)}"
        if left := self._settings.put_back():
            yield f"changed for good: {_some(left)}"
        self._random.put_back()
        reseed()
        forget_accelerators()
        self._collect()
        release()
        yield from self._running()
        if self._users.held():  # or it is garbage that user code has frozen
            Frozen.more = True
            self._collect()
        if held := self._users.held():
            yield f"something holds code of {_some(held)}"
        for contents in self._contents:
            if changed := list(contents.changed()):
                yield f"replaced: {_some(changed)}"
        self._note_libraries()
        _trim()
        grown = self.resident_bytes() - self._resident_bytes
        if grown > self._max_growth_bytes:
            yield f"grown by {grown:,} bytes, the most is {self._max_growth_bytes:,}"

    def libraries(self) -> list[str]:
        """What was imported meanwhile, in this order, and is not of users, whose code is gone."""
        return [name for name in list(sys.modules) if name not in self._known]

    def _running(self) -> Iterator[str]:
        """Threads and processes that do not end."""
        until = time.monotonic() + _ENDING_S
        while left := self._left():
            if time.monotonic() > until:
                yield f"still running: {_some(left)}"
                return
            time.sleep(0.01)

    def _left(self) -> list[str]:
        threads = [name for thread, name in _threads().items() if thread not in self._threads]
        return [f"thread {name}" for name in threads] + [f"process {pid}" for pid in _family()]

    def _note_libraries(self) -> None:
        """What was imported and stays is looked at from now on, too."""
        fresh = {name: sys.modules[name] for name in list(sys.modules) if name not in self._known}
        if fresh:
            self._known |= fresh.keys()
            self._contents.append(Contents(fresh))


def _threads() -> dict[int | None, str]:
    return {thread.ident: thread.name for thread in threading.enumerate()}


def _family() -> list[int]:
    """Processes that this one, or one that it started, has started in its group."""
    own, found = os.getpid(), []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # ended in between
            if pid != own and os.getpgid(pid) == os.getpgrp():
                found.append(pid)
    children = {child.pid for child in psutil.Process().children()}
    return sorted(children.union(found)) if os.getpgrp() == own else sorted(children)


def _trim() -> None:
    """Let the allocator give back what is free: idle memory is for others, and is no growth."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
