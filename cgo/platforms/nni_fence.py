"""What keeps others away from NNI's manager, which by itself lets everybody in.

`nni_fence.js` beside this file does it, inside the manager; node loads it before NNI.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_SCRIPT = Path(__file__).with_name("nni_fence.js")
_OPTIONS, _FENCE = "NODE_OPTIONS", "CGO_NNI_FENCE"

_lock = threading.Lock()


@contextlib.contextmanager
def fenced(port: int, *, private: bool, local: bool) -> Iterator[None]:
    """A manager that is started now lets one tuner connect, and others according to the settings.

    Args:
        port: The manager's.
        private: Only from this machine, and from no page of another site in a browser on it.
            Workers' own channels stay open.
        local: All workers are on this machine: with `private`, the port is bound to it alone.
    """
    with _lock:  # the environment is the process's
        before = os.environ.get(_OPTIONS)
        settings = {"port": port, "private": private, "local": private and local, "options": before}
        os.environ[_FENCE] = json.dumps(settings)
        os.environ[_OPTIONS] = f'{before or ""} --require "{_quoted(str(_SCRIPT))}"'.strip()
        try:
            yield
        finally:
            del os.environ[_FENCE]
            if before is None:
                del os.environ[_OPTIONS]
            else:
                os.environ[_OPTIONS] = before


def _quoted(path: str) -> str:
    return path.replace("\\", "\\\\").replace('"', '\\"')
