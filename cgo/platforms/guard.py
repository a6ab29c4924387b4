"""Kills a process tree when the process that wants it is gone: `python -m cgo.platforms.guard PID`.

Its standard input is a pipe from the launcher. However that dies, the pipe closes.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

import psutil


def start(pid: int) -> subprocess.Popen[bytes]:
    """Guard a process of ours; closing the result's `stdin` kills what it guards."""
    return subprocess.Popen(
        [sys.executable, "-m", "cgo.platforms.guard", str(pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # an interrupt from the terminal is not for it
    )


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def main() -> None:
    """Wait for the launcher's end of the pipe to close, then kill."""
    pid = int(sys.argv[1])
    while sys.stdin.buffer.read(1):
        pass
    kill_tree(pid)


if __name__ == "__main__":
    main()
