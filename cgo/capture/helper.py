"""A process that captures models for another: `python -m cgo.capture.helper FD`."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from cgo.capture.helpers import serve


def main(arguments: list[str]) -> int:
    """Serve the pipe whose descriptor is the only argument."""
    with Connection(int(arguments[0])) as pipe:
        serve(pipe)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
